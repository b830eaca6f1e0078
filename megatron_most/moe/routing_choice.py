"""Whether routers use the Triton kernel: as configured, or where it is faster on this machine.

On an H100 the kernel was no faster (docs/performance.md), so operators are the default.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.moe.router import ModalityAwareRouter, discard_routing_step
from megatron_most.moe.token_planes import pack_planes

_LEAST_GAIN = 0.9
"""The kernel is taken if it needs at most this share of the operators' time, so that noise does not decide."""


def choose_routing(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> None:
    """Set what routes in all layers of training, by ``model.moe.moe_router_fusion``. Collective.

    If it is null, one router of each rank is timed both ways, and rank 0 prints the times and the choice. All ranks
    choose the same: a resumed run may choose another, which gives other last bits.

    Args:
        chunks: this rank's model chunks, not wrapped.
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, ModalityAwareRouter)]
    moe = config.model.moe
    is_wanted = moe.moe_router_fusion
    if is_wanted is None:
        is_wanted = platform.can_run_triton() and not moe.is_group_limited and _is_kernel_faster(config, routers)
    for router in routers:
        router.use_kernel(is_wanted)


def _is_kernel_faster(config: RunConfig, routers: list[ModalityAwareRouter]) -> bool:
    """Collective; this rank may have no router."""
    trial = _Trial(config, routers[0]) if routers else None
    is_running = _on_all_ranks(trial is None or trial.can_use_kernel())
    if not is_running:
        _say("router: torch's operators used, because the Triton kernel does not run on every rank")
        return False
    calls = [None if trial is None else functools.partial(trial.run, is_kernel) for is_kernel in (False, True)]
    operators, kernel = platform.compare_seconds(*calls)
    is_faster = kernel < _LEAST_GAIN * operators
    _say(
        f"router: {config.positions_per_rank} tokens, forward and backward: {operators * 1e3:.3f} ms with torch's"
        f" operators, {kernel * 1e3:.3f} ms with the Triton kernel; {'the kernel' if is_faster else 'operators'} used"
    )
    return is_faster


class _Trial:
    """Forward and backward of a micro-batch in which modalities take turns. It leaves nothing in the router."""

    def __init__(self, config: RunConfig, router: ModalityAwareRouter) -> None:
        self.router = router
        device, num_modalities = router.weight.device, len(router.groups.choices)
        rows = config.training.micro_batch_size
        positions = config.positions_per_rank // rows
        generator = torch.Generator().manual_seed(0)
        width = router.weight.numel() // router.weight.shape[-1]
        self.logits = torch.randn(positions, rows, width, generator=generator).to(device).requires_grad_()
        modality = (torch.arange(positions) % num_modalities).repeat(rows, 1)
        planes = pack_planes(modality, torch.zeros_like(modality, dtype=torch.bool), num_modalities)
        self.planes = planes.to(device).transpose(0, 1)
        self.gradient = torch.ones(positions * rows, router.groups.num_experts, device=device)

    def can_use_kernel(self) -> bool:
        """Triton compiles when a kernel first runs, and needs a C compiler for that. Without communication."""
        self.router.use_kernel(True)
        try:
            with torch.no_grad():
                self.router.routing(self.logits, self.planes)
            torch.cuda.synchronize()
        except Exception:  # whatever a compiler may raise
            return False
        return True

    def run(self, is_kernel: bool) -> None:
        self.router.use_kernel(is_kernel)
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        probs, _ = self.router.routing(self.logits, self.planes)
        torch.autograd.grad(probs, self.logits, self.gradient)
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale  # the first backward pass of all sets it
        discard_routing_step([self.router])


def _on_all_ranks(is_true: bool) -> bool:
    flag = torch.tensor(float(is_true), device=platform.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)
