"""Megatron's gradient buffers, optimizer and learning-rate schedule."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.model import MoSTModel
from megatron_most.training.muon import muon_options
from megatron_most.training.parts import Table, find_tables, freeze, group_overrides, named_parts
from megatron_most.training.table_rows import drop_frozen_gradients, set_row_rates


def wrap_model(config: RunConfig, model_chunks: list[MoSTModel]) -> list[DistributedDataParallel]:
    """Freeze the frozen parts, and wrap each chunk for mixed precision and gradient reduction.

    Gradients are accumulated and reduced in fp32. Frozen parameters have none.
    """
    freeze(config, model_chunks)
    _mark_experts(config, model_chunks)
    megatron = model_chunks[0].config
    options = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    if options.overlap_grad_reduce:
        # Megatron's default, set here because the buffer layout is computed before Megatron sets it.
        ddp_config.bucket_size = _bucket_size()
    is_first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
    wrapped = []
    for index, chunk in enumerate(model_chunks):
        module = Float16Module(megatron, chunk) if config.precision.dtype == "bf16" else chunk
        # As in Megatron's training loop: with virtual stages, only the first chunk is split into buckets.
        is_split = is_first_stage and index == 0
        layout = _buffer_layout(module, ddp_config, is_split) if options.use_distributed_optimizer else None
        wrapped.append(
            DistributedDataParallel(megatron, ddp_config, module, disable_bucketing=index > 0, full_param_layout=layout)
        )
    _fuse_weight_gradients(wrapped)
    return wrapped


def _fuse_weight_gradients(wrapped: list[DistributedDataParallel]) -> None:
    """Let Transformer Engine's linear layers accumulate weight gradients directly in the gradient buffers.

    Megatron's ``gradient_accumulation_fusion`` does so for all layers, but Megatron's own linear layers, such as the
    heads, need a kernel of Apex for it (tensor_parallel/layers.py:1070). Layers with a frozen weight are left out: that
    weight has no gradient buffer.
    """
    for chunk in wrapped:
        for module in chunk.modules():
            weights = list(module.parameters(recurse=False))
            if hasattr(module, "fuse_wgrad_accumulation") and all(hasattr(x, "main_grad") for x in weights):
                module.fuse_wgrad_accumulation = True


def _bucket_size() -> int:
    """Elements of a gradient bucket. Larger with more data-parallel ranks, as in Megatron."""
    return max(40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size())


def _buffer_layout(
    module: torch.nn.Module, ddp_config: DistributedDataParallelConfig, is_split: bool
) -> FullParamLayout:
    """Where each trainable parameter is in the buffers that the distributed optimizer shards over ranks.

    Args:
        is_split: use buckets of ``ddp_config.bucket_size`` elements; otherwise one bucket.
    """
    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        ddp_config.bucket_size if is_split else None,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def _mark_experts(config: RunConfig, model_chunks: list[MoSTModel]) -> None:
    """Mark experts, so that their gradients are reduced over the ranks that hold copies of them.

    Without expert parallelism, Megatron treats experts as dense parameters. That is silently wrong if experts and dense
    layers have different tensor-parallel sizes (0.19.2).
    """
    layout = config.parallel
    is_dense = layout.expert_model_parallel_size == 1 and layout.expert_tensor_size == layout.tensor_model_parallel_size
    for _, parameter, part in named_parts(config, model_chunks):
        if part.startswith("experts."):
            parameter.allreduce = is_dense  # type: ignore[attr-defined]  # an attribute that Megatron reads


def build_optimizer(config: RunConfig, wrapped: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW, or Muon and AdamW, on fp32 master weights; also sets the hooks of Megatron's schedules.

    Every part of the model has its own parameter groups, with the part's learning rate. Megatron uses the fused AdamW
    of Transformer Engine or Apex if one is installed, else torch's; on a GPU, that is fused as well.

    Raises:
        ConfigError: Muon is configured, but its library is not installed.
    """
    options = config.optimizer
    kind = muon_options(config, wrapped) if options.optimizer == "muon" else {"optimizer": "adam"}
    megatron_config = MegatronOptimizerConfig(
        **kind,
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        grad_norm_skip_threshold=math.inf
        if options.grad_norm_skip_threshold is None
        else options.grad_norm_skip_threshold,
        bf16=config.precision.dtype == "bf16",
        params_dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_param_gather=options.overlap_param_gather,
    )
    overrides = {**get_standard_config_overrides(megatron_config), **group_overrides(config, wrapped)}
    optimizer = get_megatron_optimizer(megatron_config, wrapped, overrides)
    tables = find_tables(config, wrapped)
    set_row_rates(config, tables, optimizer)
    if platform.device().type == "cuda":
        fuse_adam(optimizer)
    megatron = wrapped[0].config
    megatron.finalize_model_grads_func = functools.partial(_finalize_gradients, config, tables)
    megatron.grad_scale_func = optimizer.scale_loss
    if options.overlap_grad_reduce:
        # Reduce gradients with the last micro-batch only.
        no_sync = [chunk.no_sync for chunk in wrapped]
        megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return optimizer


def _finalize_gradients(config: RunConfig, tables: list[Table], *args: Any, **kwargs: Any) -> None:
    """Megatron's reductions, which its schedules call after the last micro-batch."""
    finalize_model_grads(*args, **kwargs)
    drop_frozen_gradients(config, tables)


def fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Switch torch's AdamW, if Megatron uses it, to torch's fused kernel: one pass over memory instead of many.

    Megatron has no option for this. Call it before the first update: the fused kernel keeps step counts on the device.
    """
    for member in optimizer.chained_optimizers:
        if isinstance(member.optimizer, torch.optim.Adam):  # AdamW is a subclass
            for group in member.optimizer.param_groups:
                group.update(fused=True, foreach=False)


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer, num_updates: int) -> OptimizerParamScheduler:
    """The learning-rate schedule after ``num_updates`` updates. It depends only on that number and the configuration.

    Call ``scheduler.step(1)`` before an update: update n, counted from 1, uses the rate at n. Warmup thus starts above
    zero, and the last update ends the decay.
    """
    options = config.optimizer
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=config.training.train_iters,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(num_updates)
    return scheduler


def learning_rate(scheduler: OptimizerParamScheduler) -> float:
    """The learning rate of parts without a scale."""
    return scheduler.get_lr({})
