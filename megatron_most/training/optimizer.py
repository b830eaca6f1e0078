"""Megatron's gradient buffers, optimizer and learning-rate schedule."""

from __future__ import annotations

import math

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

from megatron_most.config import RunConfig
from megatron_most.model import MoSTModel
from megatron_most.training.muon import muon_options
from megatron_most.training.parts import freeze, group_overrides, named_parts


def wrap_model(config: RunConfig, model_chunks: list[MoSTModel]) -> list[DistributedDataParallel]:
    """Freeze what is not to learn, and wrap each chunk for mixed precision and gradient reduction.

    Gradients are kept and reduced in fp32; what is frozen has none.
    """
    freeze(config, model_chunks)
    _tell_experts_apart(config, model_chunks)
    megatron = model_chunks[0].config
    options = config.optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        # Not for parameters: a module would have to be called before its parameters are used, and in the order of their
        # registration, which codebook tables are not.
        overlap_param_gather=False,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    if options.overlap_grad_reduce:
        # As Megatron would by itself; here because the layout of the buffers is made before them.
        ddp_config.bucket_size = _bucket_size()
    is_first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
    wrapped = []
    for index, chunk in enumerate(model_chunks):
        module = Float16Module(megatron, chunk) if config.precision.dtype == "bf16" else chunk
        # As in Megatron's own training loop: with virtual stages, only the first chunk is worth splitting into buckets.
        is_split = is_first_stage and index == 0
        layout = _buffer_layout(module, ddp_config, is_split) if options.use_distributed_optimizer else None
        wrapped.append(
            DistributedDataParallel(megatron, ddp_config, module, disable_bucketing=index > 0, full_param_layout=layout)
        )
    return wrapped


def _bucket_size() -> int:
    """Elements of a gradient bucket, which is reduced when it is complete: more where many ranks share it."""
    return max(40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size())


def _buffer_layout(
    module: torch.nn.Module, ddp_config: DistributedDataParallelConfig, is_split: bool
) -> FullParamLayout:
    """Where each weight that learns stands in the buffers of which the distributed optimizer's ranks have shares.

    Args:
        is_split: into buckets of ``ddp_config.bucket_size`` elements; into one else.
    """
    return DistributedOptimizer.compute_full_param_layout(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        ddp_config.bucket_size if is_split else None,
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        ddp_config,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def _tell_experts_apart(config: RunConfig, model_chunks: list[MoSTModel]) -> None:
    """Have the gradients of experts reduced over the ranks that hold copies of them.

    Megatron does so for experts that are spread over ranks and takes others for a part of the dense model. They are not
    where they are split over fewer tensor ranks than it: gradients and norms would silently be wrong (0.19.2).
    """
    layout = config.parallel
    is_dense = layout.expert_model_parallel_size == 1 and layout.expert_tensor_size == layout.tensor_model_parallel_size
    for _, parameter, part in named_parts(config, model_chunks):
        if part.startswith("experts."):
            parameter.allreduce = is_dense


def build_optimizer(config: RunConfig, wrapped: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW, or Muon and AdamW, over fp32 master weights, and the hooks by which Megatron's schedules reach them.

    Each part of the model has parameter groups of its own, with the part's learning rate.

    Megatron takes the fused kernel of Transformer Engine or Apex where one is installed, torch's AdamW elsewhere.

    Raises:
        ConfigError: Muon is asked for and its library is missing.
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
    )
    overrides = {**get_standard_config_overrides(megatron_config), **group_overrides(config, wrapped)}
    optimizer = get_megatron_optimizer(megatron_config, wrapped, overrides)
    megatron = wrapped[0].config
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.grad_scale_func = optimizer.scale_loss
    if options.overlap_grad_reduce:
        # Reduce gradients once, with the last micro-batch, not with each.
        no_sync = [chunk.no_sync for chunk in wrapped]
        megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return optimizer


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer, num_updates: int) -> OptimizerParamScheduler:
    """The learning-rate schedule after ``num_updates`` updates: a function of them and the configuration alone.

    Call ``scheduler.step(1)`` before an update: update n uses the rate at n, so that warm-up starts above zero and the
    last one ends the decay.
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
    """The rate of the parts that are not scaled."""
    return scheduler.get_lr({})
