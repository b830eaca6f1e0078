"""The modality-aware mixture of experts: groups, router, balance and statistics."""

from megatron_most.moe.dispatcher import ModalityAwareMoELayer
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.experts import GroupedExperts, SequentialExperts, TransformerEngineExperts
from megatron_most.moe.router import ModalityAwareRouter, discard_routing_step, end_routing_step
from megatron_most.moe.routing_choice import choose_routing
from megatron_most.moe.routing_statistics import collect_routing

__all__ = [
    "ExpertGroups",
    "GroupedExperts",
    "ModalityAwareMoELayer",
    "ModalityAwareRouter",
    "SequentialExperts",
    "TransformerEngineExperts",
    "choose_routing",
    "collect_routing",
    "discard_routing_step",
    "end_routing_step",
]
