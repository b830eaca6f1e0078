"""A step of training: its gradients, what it counts, its learning rate, and which steps are skipped or refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.errors import MostError
from megatron_most.moe import collect_routing
from megatron_most.training.microbatches import forward_step
from megatron_most.training.train_step import (
    NonFiniteStep,
    TrainState,
    build_train_state,
    compute_gradients,
    train_step,
)
from tests.distributed.tiny import FP8, tiny_batch, tiny_config


@pytest.fixture(autouse=True)
def process_groups() -> Iterator[None]:
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


def built(config: RunConfig) -> TrainState:
    """Every time the same weights."""
    parallel.initialize(config.parallel, seed=1)
    return build_train_state(config)


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model_chunks[0].parameters()])


def test_gradients_are_summed_over_targets_and_divided_once_by_their_number() -> None:
    """By torch alone, on micro-batches with different numbers of targets; routers add no loss here."""
    config = tiny_config(
        model__moe__moe_router_load_balancing_type="none",
        model__moe__moe_z_loss_coeff=0.0,
        model__text_loss_weight=3.0,
    )
    state = built(config)
    batches = [tiny_batch(config, seed=0), tiny_batch(config, seed=4, audio_share=0.8)]
    compute_gradients(state, batches)
    found = {name: parameter.main_grad.clone() for name, parameter in state.model_chunks[0].named_parameters()}

    model = built(config).model_chunks[0]
    losses, counts = [], []
    for batch in batches:
        output, reduce = forward_step(state.loss_table, iter([batch]), model)
        loss_sum, count, _ = reduce(output)
        losses.append(loss_sum)
        counts.append(int(count))
    assert counts[0] != counts[1]
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(sum(losses) / sum(counts), parameters)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_step_counts_what_it_consumed_and_sums_the_votes() -> None:
    config = tiny_config()
    state = built(config)
    batches = [tiny_batch(config, seed=0), tiny_batch(config, seed=1)]
    result = train_step(state, batches, votes=(2.0, 0.0, 0.5))
    num_tokens = sum(int((~batch.is_padding).sum()) for batch in batches)
    num_rows = sum(len(batch.ids) for batch in batches)
    assert (result.num_samples, result.num_tokens) == (state.consumed_samples, state.consumed_tokens)
    assert (result.num_samples, result.num_tokens) == (num_rows, num_tokens)
    assert result.votes == [2.0, 0.0, 0.5]
    assert (state.step, state.skipped_steps) == (1, 0)


def test_what_was_consumed_adds_up_over_steps() -> None:
    state = built(tiny_config())
    results = [train_step(state, [tiny_batch(state.config, seed=seed)]) for seed in (0, 4)]
    assert state.consumed_samples == sum(result.num_samples for result in results) > 0
    assert state.consumed_tokens == sum(result.num_tokens for result in results) > 0
    assert state.step == 2


def test_a_step_says_the_loss_of_each_micro_batch_of_this_rank() -> None:
    state = built(tiny_config())
    batches = [tiny_batch(state.config, seed=0), tiny_batch(state.config, seed=4, audio_share=0.8)]
    result = train_step(state, batches)
    assert result.own_losses[:, 1].tolist() == [batch.loss_mask.sum().item() for batch in batches]
    assert result.own_losses.sum(dim=0).tolist() == pytest.approx(result.sums[result.names.index("loss")])


def test_the_parts_of_a_gradient_are_measured_only_where_they_are_wanted() -> None:
    state = built(tiny_config())
    batches = [tiny_batch(state.config, seed=0)]
    assert train_step(state, batches).part_grad_norms == {}
    result = train_step(state, batches, wants_part_grad_norms=True)
    assert set(result.part_grad_norms) == set(state.config.part_names)
    assert sum(norm**2 for norm in result.part_grad_norms.values()) == pytest.approx(result.grad_norm**2, rel=1e-4)


def test_a_state_is_built_from_its_configuration() -> None:
    weights_of_codebooks = {"model__codebook_loss_weights": "[0.5,0.25]"}
    state = built(tiny_config(model__text_loss_weight=3.0, **weights_of_codebooks))
    assert (state.loss_table.text_weight, state.loss_table.weights) == (3.0, [0.5, 0.25])
    assert (state.step, state.scheduler.num_steps) == (0, 0)


def test_weights_are_loaded_before_the_optimizer_copies_them() -> None:
    config = tiny_config(precision__dtype="bf16", optimizer__lr=1e-9)
    loaded = []

    def load(chunks: list) -> None:
        loaded.append(chunks)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(0.25)

    state = build_train_state(config, load)
    assert loaded == [state.model_chunks]
    train_step(state, [tiny_batch(config, seed=0)])
    assert weights(state).unique().tolist() == [0.25]


def test_only_a_norm_above_the_threshold_skips_the_update() -> None:
    config = tiny_config(optimizer__lr=0.1)
    batches = [tiny_batch(config, seed=0)]
    norm = train_step(built(config), batches).grad_norm
    for threshold, is_skipped in ((0.99 * norm, True), (norm, False), (1.01 * norm, False)):
        state = built(tiny_config(optimizer__lr=0.1, optimizer__grad_norm_skip_threshold=repr(threshold)))
        before = weights(state)
        result = train_step(state, batches)
        assert (result.is_skipped, state.skipped_steps, state.step) == (is_skipped, int(is_skipped), 1)
        assert torch.equal(before, weights(state)) == is_skipped


def test_skipped_steps_are_counted() -> None:
    state = built(tiny_config(optimizer__grad_norm_skip_threshold=1e-9))
    for _ in range(2):
        result = train_step(state, [tiny_batch(state.config, seed=0)])
        assert result.skip_reason.endswith("exceeds optimizer.grad_norm_skip_threshold, 1e-09")
    assert (state.step, state.skipped_steps, state.nonfinite_steps) == (2, 2, 0)


def test_a_skipped_step_does_not_advance_the_learning_rate() -> None:
    config = tiny_config(optimizer__lr=0.4, optimizer__lr_warmup_iters=4, optimizer__lr_decay_style="constant")
    state = built(config)
    state.step, state.skipped_steps = 3, 2
    state.scheduler.step(1)
    train_step(state, [tiny_batch(config, seed=0)])
    [rate] = {group["lr"] for group in state.optimizer.param_groups}
    assert rate == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_is_refused_before_the_update() -> None:
    state = built(tiny_config())
    with torch.no_grad():
        state.model_chunks[0].decoder.final_layernorm.weight.fill_(float("nan"))
    batch = tiny_batch(state.config, seed=0)
    with pytest.raises(NonFiniteStep, match="step 1: the loss is nan; nothing of this step was saved") as refused:
        train_step(state, [batch])
    assert state.step == 0 and refused.value.reason == "the loss is nan"
    [[_, count]] = refused.value.own_losses.tolist()
    assert count == batch.loss_mask.sum()


def test_a_gradient_norm_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = built(tiny_config())
    monkeypatch.setattr(state.optimizer, "step", lambda: (True, float("inf"), None))
    with pytest.raises(MostError, match="step 1: the gradient norm is inf; nothing of this step was saved") as refused:
        train_step(state, [tiny_batch(state.config, seed=0)])
    assert state.step == 0
    # Only ranks whose gradients were damaged may see it: the losses of this rank prove nothing.
    assert (refused.value.reason, refused.value.own_losses) == ("the gradient norm is inf", None)


def test_a_gradient_norm_that_is_not_finite_is_skipped_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    state = built(tiny_config(training__skip_nonfinite_steps=2))
    monkeypatch.setattr(state.optimizer, "get_grad_norm", lambda: float("inf"))
    batch, before = tiny_batch(state.config, seed=0), weights(state)
    for step in (1, 2):
        result = train_step(state, [batch], wants_part_grad_norms=True)
        assert result.skip_reason == "the gradient norm is inf"
        assert result.grad_norm == float("inf") and not result.is_finite and result.part_grad_norms == {}
        assert (state.step, state.skipped_steps, state.nonfinite_steps) == (step, step, step)
    assert torch.equal(before, weights(state))
    with pytest.raises(NonFiniteStep, match="step 3: the gradient norm is inf, after 2 such steps in a row") as refused:
        train_step(state, [batch])
    assert refused.value.own_losses[0, 1] == batch.loss_mask.sum()


HISTORIES = {**FP8, "precision__fp8_recipe": "delayed", "model__moe__moe_router_bias_update_rate": 1e-3}


def set_final_norm(state: TrainState, value: float) -> None:
    with torch.no_grad():
        state.model_chunks[0].decoder.final_layernorm.weight.fill_(value)


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    """Neither weights nor expert biases, FP8 histories and statistics."""
    state = built(tiny_config(**HISTORIES, training__skip_nonfinite_steps=1))
    set_final_norm(state, float("inf"))
    before = weights(state)
    result = train_step(state, [tiny_batch(state.config, seed=0)], wants_part_grad_norms=True)
    assert result.skip_reason == "the loss is nan" and not result.is_finite and result.part_grad_norms == {}
    assert torch.equal(before, weights(state))
    layer = state.model_chunks[0].decoder.layers[1]
    assert not layer.mlp.router.expert_bias.values.any() and not layer.mlp.router.expert_bias.step_pairs.any()
    history = layer.self_attention.linear_proj.fp8.history
    assert not history.past.any() and not history.current.any()
    assert collect_routing(state.model_chunks, state.config.model) == []
    assert (state.step, state.skipped_steps, state.consumed_samples) == (1, 1, 2)


def test_a_finite_step_between_two_that_are_not_starts_the_count_again() -> None:
    state = built(tiny_config(training__skip_nonfinite_steps=1))
    batches = [tiny_batch(state.config, seed=0)]
    for value in (float("inf"), 1.0, float("inf")):
        set_final_norm(state, value)
        train_step(state, batches)
    assert (state.step, state.skipped_steps, state.nonfinite_steps) == (3, 2, 1)
    with pytest.raises(NonFiniteStep, match="step 4: the loss is nan, after 1 such steps in a row were") as refused:
        train_step(state, batches)
    assert refused.value.own_losses[0, 1] == batches[0].loss_mask.sum()


def test_a_step_moves_expert_biases_and_fp8_histories() -> None:
    state = built(tiny_config(**HISTORIES))
    train_step(state, [tiny_batch(state.config, seed=0)])
    layer = state.model_chunks[0].decoder.layers[1]
    assert layer.mlp.router.expert_bias.values.abs().amax().item() == pytest.approx(1e-3)
    history = layer.self_attention.linear_proj.fp8.history
    assert history.past.any() and not history.current.any()


@pytest.mark.parametrize("updates_before", [0, 2])
def test_update_n_uses_the_rate_at_n(updates_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from 1: the first update of a warm-up over four is a quarter of the way up, and changes the weights."""
    config = tiny_config(optimizer__lr=0.4, optimizer__lr_warmup_iters=4, optimizer__lr_decay_style="constant")
    state = build_train_state(config, num_updates=updates_before)
    state.step = updates_before
    used = []
    update = state.optimizer.step

    def recorded() -> object:
        used.extend({group["lr"] for group in state.optimizer.param_groups})
        return update()

    monkeypatch.setattr(state.optimizer, "step", recorded)
    for _ in range(2):
        train_step(state, [tiny_batch(config, seed=0)])
    assert used == pytest.approx([0.1 * (updates_before + 1), 0.1 * (updates_before + 2)])


def test_a_state_that_is_no_longer_used_is_freed() -> None:
    """Several models can follow each other in one process, also after they have made a step.

    In bf16: with fp32 weights, Megatron's optimizer holds views of them that lead through the graph to its own hooks.
    """
    config = tiny_config(precision__dtype="bf16")
    state = built(config)
    train_step(state, [tiny_batch(config, seed=0)])
    model = weakref.ref(state.model_chunks[0])
    del state
    gc.collect()
    assert model() is None
