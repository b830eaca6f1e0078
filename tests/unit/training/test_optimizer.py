"""AdamW in one kernel computes torch's AdamW and its state goes through checkpoints; norms of all gradients at once."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from megatron_most import parallel
from megatron_most.checkpointing import load_checkpoint, save_checkpoint
from megatron_most.checkpointing.optimizer_state import _set_step
from megatron_most.config import RunConfig
from megatron_most.training import optimizer as optimizers
from megatron_most.training.train_step import TrainState, build_train_state, train_step
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_batch, tiny_config
from tests.unit.checkpointing.test_metadata import metadata_of


@pytest.fixture(autouse=True, scope="module")
def process_groups() -> Iterator[None]:
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def config_of(**overrides: object) -> RunConfig:
    return tiny_config(model__num_layers=2, training__micro_batch_size=1, training__global_batch_size=1, **overrides)


def built(config: RunConfig, is_fused: bool) -> TrainState:
    state = build_train_state(config, fill_weights)
    if is_fused:
        optimizers.fuse_adam(state.optimizer)
    return state


def train(state: TrainState, steps: range) -> None:
    for step in steps:
        train_step(state, [tiny_batch(state.config, step)])


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.model_chunks[0].named_parameters()}


def groups_of(state: TrainState) -> list[dict]:
    return [group for member in state.optimizer.chained_optimizers for group in member.optimizer.param_groups]


@pytest.mark.parametrize("is_distributed", [True, False])
def test_the_fused_kernel_computes_the_same_update(is_distributed: bool) -> None:
    config = config_of(optimizer__use_distributed_optimizer=is_distributed)
    plain, fused = built(config, False), built(config, True)
    before = weights(plain)
    train(plain, range(3)), train(fused, range(3))
    moved = weights(plain)
    for name, value in weights(fused).items():
        torch.testing.assert_close(value, moved[name], rtol=1e-5, atol=1e-7, msg=name)
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("is_distributed", [True, False])
def test_its_state_goes_through_a_checkpoint(tmp_path: Path, is_distributed: bool) -> None:
    config = config_of(optimizer__use_distributed_optimizer=is_distributed)
    straight = built(config, True)
    train(straight, range(2))
    save_checkpoint(tmp_path, metadata_of(config, step=2), straight.model_chunks, straight.optimizer, keep_last=1)
    resumed = built(config, True)
    load_checkpoint(tmp_path, config, resumed.model_chunks, resumed.optimizer)
    resumed.step = 2
    train(straight, range(2, 4)), train(resumed, range(2, 4))
    expected = weights(straight)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_of_the_plain_kernel_goes_on_fused(tmp_path: Path) -> None:
    config = config_of()
    plain, fused = built(config, False), built(config, True)
    train(plain, range(2))
    save_checkpoint(tmp_path, metadata_of(config, step=2), plain.model_chunks, plain.optimizer, keep_last=1)
    load_checkpoint(tmp_path, config, fused.model_chunks, fused.optimizer)
    fused.step = 2
    train(plain, range(2, 4)), train(fused, range(2, 4))
    expected = weights(plain)
    for name, value in weights(fused).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("is_fused, device", [(True, "meta"), (False, "cpu")])
def test_steps_are_counted_where_the_kernel_reads_them(is_fused: bool, device: str) -> None:
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))  # in the place of a GPU
    adam = torch.optim.AdamW([parameter])
    adam.param_groups[0]["fused"] = is_fused
    _set_step(adam, 7)
    assert adam.state[parameter]["step"].device.type == device


@pytest.mark.parametrize("device, is_fused", [("cuda", True), ("cpu", None)])
def test_a_gpu_takes_the_fused_kernel_and_a_cpu_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, device: str, is_fused: bool | None
) -> None:
    monkeypatch.setattr(optimizers, "platform", types.SimpleNamespace(device=lambda: torch.device(device)))
    assert {group["fused"] for group in groups_of(build_train_state(config_of()))} == {is_fused}


def test_norm_and_scaling_of_all_gradients_are_megatrons_bit_for_bit() -> None:
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=random) for shape in ((5,), (33, 7), (1,), (2, 3, 4), (4097,))]
    flag = torch.zeros(1, dtype=torch.int)
    found, _ = clip_grads.l2_norm_impl(65536, flag, [grads], False)
    wanted, _ = utils.local_multi_tensor_l2_norm(65536, flag, [grads], False)
    assert torch.equal(found, wanted) and found.shape == (1,)
    mine, theirs = [grad.clone() for grad in grads], [grad.clone() for grad in grads]
    clip_grads.multi_tensor_scale_impl(65536, flag, [mine, mine], 0.3)
    utils.local_multi_tensor_scale(65536, flag, [theirs, theirs], 0.3)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    clip_grads.multi_tensor_scale_impl(65536, flag, [[], []], 0.3)  # of a rank where nothing learns


class FusingProduct(torch.autograd.Function):
    """Transformer Engine's product as far as Megatron's buffers are concerned."""

    @staticmethod
    def forward(ctx, x, weight, is_fused):
        ctx.save_for_backward(x, weight)
        ctx.is_fused = is_fused
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.is_fused:
            weight.main_grad += of_weight
            weight.grad_added_to_main_grad = True
            of_weight = torch.full_like(of_weight, torch.nan)  # nobody is to read it
        return gradient @ weight, of_weight, None


class FusingLinear(torch.nn.Module):
    fuse_wgrad_accumulation = False

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return FusingProduct.apply(x, self.weight, self.fuse_wgrad_accumulation), None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_engines_layers_add_to_the_gradient_buffers_themselves(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, overlap: bool
) -> None:
    scales = {"optimizer__lr_scales": "[{part: shared_experts, scale: 0}]"} if frozen else {}
    config = config_of(optimizer__overlap_grad_reduce=overlap, **scales)

    def with_fusing_layers(chunks: list[torch.nn.Module]) -> None:
        fill_weights(chunks)
        for layer in chunks[0].decoder.layers:
            layer.self_attention.linear_proj = FusingLinear(layer.self_attention.linear_proj.weight)
            mlp = getattr(layer.mlp, "shared_experts", None)
            if mlp is not None:
                mlp.linear_fc1 = FusingLinear(mlp.linear_fc1.weight)

    plain, fused = built(config, False), build_train_state(config, with_fusing_layers)
    layers = [module for module in fused.model_chunks[0].modules() if isinstance(module, FusingLinear)]
    assert [layer.fuse_wgrad_accumulation for layer in layers] == [True, True, not frozen]
    train(plain, range(2)), train(fused, range(2))
    expected = weights(plain)
    for name, value in weights(fused).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
