"""Stand-ins that let Megatron-Core 0.19.2 run on CPUs with gloo, and on any device without Transformer Engine.

Stand-ins for a device are installed only without CUDA, so that CPUs and GPUs run the same code. Without Transformer
Engine, on CPUs or GPUs, one name that Megatron leaves empty is filled in, and two functions that wait for each gradient
in turn are replaced. Each change names the Megatron file and line that needs it (paths below ``megatron/core``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_installed = False


class _InOrderStream:
    """A CUDA stream and its events, on a device that always works in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def record_event(self) -> _InOrderStream:
        return self

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Prepare Megatron for this machine; call it before building anything of Megatron. A second call does nothing.

    With CUDA, it only fills in for a missing Transformer Engine; with both, it changes nothing.
    """
    global _installed
    if _installed:
        return
    _installed = True
    if not torch.cuda.is_available():
        _stand_in_for_cuda()
    _mend_missing_transformer_engine()
    _mend_missing_multi_tensor_kernels()


def _stand_in_for_cuda() -> None:
    # jit.py:21 sets jit_fuser to torch.compile, which would start a C++ compiler for each fused function.
    torch.compiler.set_stance("force_eager")
    _replace_torch_cuda()
    _replace_device_literals()
    _replace_collectives()
    _replace_megatron_functions()


def _replace_torch_cuda() -> None:
    cuda: Any = torch.cuda  # Any: the stand-ins have other types
    cuda.current_device = lambda: _CPU  # tensor_parallel/layers.py:305 and others use it as a device argument
    cuda.synchronize = lambda *args: None  # pipeline_parallel/p2p_communication.py:263
    cuda.Stream = _InOrderStream  # transformer/moe/token_dispatcher.py:469
    main_stream = _InOrderStream()
    cuda.current_stream = lambda *args: main_stream  # transformer/moe/token_dispatcher.py:922
    cuda.stream = lambda stream: contextlib.nullcontext()  # transformer/moe/token_dispatcher.py:925
    cuda.manual_seed = torch.manual_seed  # tensor_parallel/random.py:305
    cuda.get_rng_state = lambda *args: torch.get_rng_state()  # tensor_parallel/random.py:303


def _replace_device_literals() -> None:
    """``device="cuda"`` is written out in pipeline_parallel/schedules.py:749, optimizer/clip_grads.py:96 and others."""

    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapped

    for name in ("zeros", "ones", "tensor", "empty_like"):
        stand_in = on_cpu(getattr(torch, name))
        # TorchScript must still find the operator: NeMo compiles functions with it when it is imported.
        torch.jit._builtins._register_builtin(stand_in, f"aten::{name}")
        setattr(torch, name, stand_in)

    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self  # models/common/embeddings/rope_utils.py:64

    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def type_named_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original_type(self, *args, **kwargs)
        return name if args or kwargs else name.replace("torch.", "torch.cuda.", 1)

    tensor.type = type_named_as_on_cuda  # optimizer/optimizer.py:1028 compares with "torch.cuda.FloatTensor"


def _replace_collectives() -> None:
    """gloo gathers only equal shapes; tensor_parallel/mappings.py:154 has unequal ones (expert tensor parallelism)."""
    original = torch.distributed.all_gather

    @functools.wraps(original)
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        rows = [item.shape[0] if item.dim() else 1 for item in tensor_list]
        if len(set(rows)) == 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in rows]
        original(gathered, padded, group=group)
        for wanted, got in zip(tensor_list, gathered, strict=True):
            wanted.copy_(got[: wanted.shape[0]])
        return None

    torch.distributed.all_gather = all_gather


def _replace_megatron_functions() -> None:
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    # tensor_parallel/random.py:104 and :135 reach into torch.cuda's generators.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # tensor_parallel/random.py:332 warns if the CPU generator advances; here it is the only generator.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)

    def split_sizes_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # transformer/moe/moe_utils.py:1184 converts split sizes to NumPy only if they are on a CUDA device.
    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes_to_numpy

    init_data = ShardedTensor.init_data

    def init_data_on_cpu(self: ShardedTensor, device: Any, *args: Any, **kwargs: Any) -> None:
        init_data(self, _CPU if device == "cuda" else device, *args, **kwargs)

    # dist_checkpointing/exchange_utils.py:97 and :105 allocate on a CUDA device for tensors that another rank reads.
    ShardedTensor.init_data = init_data_on_cpu


def _mend_missing_transformer_engine() -> None:
    """Without Transformer Engine, multi-latent attention lacks the linear layer that is whole on every rank."""
    import megatron.core.extensions.transformer_engine as te
    import megatron.core.transformer.multi_latent_attention as mla
    from megatron.core.post_training.modelopt.layers import Linear

    if not te.HAVE_TE:
        # transformer/multi_latent_attention.py:79 leaves it unset; :528 and :575 accept only projections of this class.
        mla.Linear = Linear


def _mend_missing_multi_tensor_kernels() -> None:
    """Norm and scaling of all gradients at once, if neither Transformer Engine nor Apex has kernels for it.

    Megatron's own code for that case (utils.py:1325 and :1337) copies the norm of each gradient to the host in turn and
    scales each in two steps. This is the same arithmetic in the same order.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def norm(chunk_size: int, noop_flag: torch.Tensor, lists: list[list[torch.Tensor]], *args: Any) -> Any:
        return torch.nn.utils.get_total_norm(lists[0], foreach=True).view(1), None

    def scale(chunk_size: int, noop_flag: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
        gradients, _ = lists  # the same list twice: they are scaled in place (optimizer/clip_grads.py:191)
        if gradients:
            torch._foreach_mul_(gradients, factor)

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale
