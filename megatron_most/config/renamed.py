"""Keys that had another name. Files that earlier versions recorded are still read; a user is told the new name."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "model.norm_epsilon": "model.layernorm_epsilon",
    "model.init_std": "model.init_method_std",
    "model.num_dense_layers": "model.first_k_dense_replace",
    "model.backend": "model.transformer_impl",
    "model.attention.num_heads": "model.attention.num_attention_heads",
    "model.attention.head_dim": "model.attention.kv_channels",
    "model.attention.qk_nope_head_dim": "model.attention.qk_head_dim",
    "model.attention.qk_rope_head_dim": "model.attention.qk_pos_emb_head_dim",
    "model.attention.rope.type": "model.attention.rope.rope_type",
    "model.attention.rope.base": "model.attention.rope.rotary_base",
    "model.attention.rope.scaling_factor": "model.attention.rope.rotary_scaling_factor",
    "model.attention.rope.original_max_position": "model.attention.rope.original_max_position_embeddings",
    "model.moe.ffn_hidden_size": "model.moe.moe_ffn_hidden_size",
    "model.moe.shared_ffn_hidden_size": "model.moe.moe_shared_expert_intermediate_size",
    "model.moe.score_function": "model.moe.moe_router_score_function",
    "model.moe.normalize_top_k": "model.moe.norm_topk_prob",
    "model.moe.routed_scaling_factor": "model.moe.moe_router_topk_scaling_factor",
    "model.moe.balance_loss": "model.moe.moe_router_load_balancing_type",
    "model.moe.balance_coeff": "model.moe.moe_aux_loss_coeff",
    "model.moe.z_loss_coeff": "model.moe.moe_z_loss_coeff",
    "model.moe.expert_bias_update_rate": "model.moe.moe_router_bias_update_rate",
    "model.moe.dispatcher": "model.moe.moe_token_dispatcher_type",
    "model.moe.shared_expert_overlap": "model.moe.moe_shared_expert_overlap",
    "model.moe.groups[].top_k": "model.moe.groups[].moe_router_topk",
    "model.moe.groups[].n_group": "model.moe.groups[].moe_router_num_groups",
    "model.moe.groups[].topk_group": "model.moe.groups[].moe_router_group_topk",
    "model.moe.groups[].balance_coeff": "model.moe.groups[].moe_aux_loss_coeff",
    "model.moe.groups[].z_loss_coeff": "model.moe.groups[].moe_z_loss_coeff",
    "optimizer.beta1": "optimizer.adam_beta1",
    "optimizer.beta2": "optimizer.adam_beta2",
    "optimizer.eps": "optimizer.adam_eps",
    "optimizer.warmup_steps": "optimizer.lr_warmup_iters",
    "optimizer.decay_style": "optimizer.lr_decay_style",
    "optimizer.distributed": "optimizer.use_distributed_optimizer",
    "optimizer.overlap": "optimizer.overlap_grad_reduce",
    "precision.fp8_amax_history": "precision.fp8_amax_history_len",
    "precision.bf16_first_layers": "precision.num_layers_at_start_in_bf16",
    "precision.bf16_last_layers": "precision.num_layers_at_end_in_bf16",
    "training.steps": "training.train_iters",
    "training.eval_batches": "training.eval_iters",
    "checkpoint.interval": "checkpoint.save_interval",
    "checkpoint.asynchronous": "checkpoint.async_save",
    "checkpoint.keep_every": "checkpoint.save_retain_interval",
    "logging.interval": "logging.log_interval",
}
"""Old path -> new path, which differ only in the last word; ``[]`` stands for every index of a list."""


def with_new_names(config: Any) -> Any:
    """A copy of a configuration, as nested dicts, with the current name of every key."""
    return _renamed(config, RENAMED, "")


def with_old_names(config: Any) -> Any:
    """A copy with the old names, for hashes of configurations."""
    return _renamed(config, {new: old for old, new in RENAMED.items()}, "")


def _renamed(values: Any, names: dict[str, str], path: str) -> Any:
    if isinstance(values, dict):
        found = {}
        for key, value in values.items():
            below = f"{path}.{key}" if path else str(key)
            found[names[below].rpartition(".")[2] if below in names else key] = _renamed(value, names, below)
        return found
    if isinstance(values, list):
        return [_renamed(value, names, f"{path}[]") for value in values]
    return values
