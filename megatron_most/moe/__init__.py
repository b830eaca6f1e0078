"""The modality-aware mixture of experts: groups, router, balance and statistics."""

from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.router import ModalityAwareRouter
from megatron_most.moe.statistics import collect_routing

__all__ = ["ExpertGroups", "ModalityAwareRouter", "collect_routing"]
