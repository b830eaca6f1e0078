"""Three modalities with unequal groups and common experts, from data to a report: trained, logged, resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_most.config import RunConfig
from megatron_most.data.loading.loader import open_datasets
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import DataError
from megatron_most.moe import ExpertGroups
from megatron_most.report import write_report
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import assert_same_weights, metric_lines, run_config, train

THREE = {
    "vocab__further_modalities": "[{name: image, start: 25, stop: 40}]",
    "model__moe__groups": "[{modality: text, size: 5, moe_router_topk: 2},"
    " {modality: audio, size: 3, moe_router_topk: 3},"
    " {modality: image, size: 2, moe_router_topk: 1}]",
    "model__moe__common": "{size: 2, modalities: [text, image]}",
    "parallel__expert_model_parallel_size": 2,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("three")
    config = run_config(directory, "undisturbed", **THREE)
    return directory, config, run_ranks(2, train, config)


def positions_by_modality(config: RunConfig) -> dict[str, int]:
    """Input positions of the documents of one epoch."""
    counts = dict.fromkeys(config.vocab.modality_names, 0)
    for entry in config.data.train:
        for document in TokenDataset(entry.path):
            for index in config.vocab.modality_of(document.ids[:-1]):
                counts[config.vocab.modality_names[index]] += 1
    return counts


def test_losses_are_logged_for_each_modality(trained: tuple) -> None:
    _, config, _ = trained
    lines = metric_lines(config)
    training = [line for line in lines if "loss" in line]
    assert training[-1]["step"] == config.training.train_iters
    for line in training:
        assert line["loss"] > 0
        assert {"loss/text", "loss/audio", "loss/image"} <= set(line)
    validation = [line for line in lines if "validation/heldout/loss" in line]
    # What is held out is recognition: its targets are text and image ids.
    assert {"validation/heldout/loss/text", "validation/heldout/loss/image"} <= set(validation[-1])
    assert "validation/heldout/loss/audio" not in validation[-1]


def test_every_token_is_sent_to_as_many_experts_of_its_choice_as_its_modality_takes(trained: tuple) -> None:
    _, config, _ = trained
    moe = config.model.moe
    choices = ExpertGroups.from_config(moe).choices
    assert choices == ((0, 1, 2, 3, 4, 10, 11), (5, 6, 7), (8, 9, 10, 11))
    lines = metric_lines(config, "routing.jsonl")
    for line in lines:
        assert [layer["layer"] for layer in line["layers"]] == [2, 3, 4]
        for layer in line["layers"]:
            for group, choice in zip(moe.groups, choices, strict=True):
                pairs, tokens = layer["pairs"][group.modality], layer["tokens"][group.modality]
                assert tokens > 0
                assert sum(pairs) == group.moe_router_topk * tokens == sum(pairs[expert] for expert in choice)
                assert layer["outside_mass"][group.modality] == 0
                assert sum(layer["mean_score"][group.modality]) == pytest.approx(1, abs=1e-3)
            assert layer["outside_group"] == 0
    # Shares of the modalities are those of the data, roughly: every row is its own draw.
    seen = {name: sum(line["layers"][0]["tokens"][name] for line in lines) for name in config.vocab.modality_names}
    expected = positions_by_modality(config)
    for name, count in seen.items():
        assert count / sum(seen.values()) == pytest.approx(expected[name] / sum(expected.values()), abs=0.1)
    scalars = {key for key in metric_lines(config)[0] if key.startswith("routing/")}
    assert {key.split("/")[1] for key in scalars} == {"text", "audio", "image", "ep_max_over_mean"}


def test_the_imbalance_of_ranks_is_that_of_their_experts_pairs(tmp_path: Path) -> None:
    """One micro-batch for each rank between two lines: nothing is averaged, and the pairs of the line tell it."""
    once = {"training__global_batch_size": 2, "training__train_iters": 3, "logging__log_interval": 1}
    config = run_config(tmp_path, **THREE, **once)
    run_ranks(2, train, config)
    in_ranks = np.array(ExpertGroups.from_config(config.model.moe, 2).physical_to_logical).reshape(2, -1)
    lines = metric_lines(config, "routing.jsonl")
    assert len(lines) == 3
    for line in lines:
        for layer in line["layers"]:
            pairs = np.array(list(layer["pairs"].values())).sum(axis=0)
            of_ranks = pairs[in_ranks].sum(axis=1)
            assert layer["ep_max_over_mean"] == pytest.approx(of_ranks.max() / of_ranks.mean(), rel=1e-4)


def test_resumed_run_equals_undisturbed_run(trained: tuple) -> None:
    directory, config, weights = trained
    resumed = run_config(directory, "resumed", **THREE)
    shutil.copytree(config.run_dir, resumed.run_dir)
    shutil.rmtree(Path(resumed.run_dir) / "checkpoints" / "step_00000006")
    assert_same_weights(weights, run_ranks(2, train, resumed))
    assert metric_lines(config) == metric_lines(resumed)
    assert metric_lines(config, "routing.jsonl") == metric_lines(resumed, "routing.jsonl")


def test_the_statistics_of_an_interval_outlive_a_stop_inside_it(trained: tuple) -> None:
    """Step 3 is saved between the lines of steps 2 and 4; its statistics wait in the checkpoint."""
    _, config, _ = trained
    checkpoint = Path(config.run_dir) / "checkpoints" / "step_00000003" / "checkpoint.json"
    (layer, *_) = json.loads(checkpoint.read_text())["pending"]["routing"]
    # Step 3 alone: one global batch of rows.
    assert 0 < sum(layer["tokens"].values()) <= config.training.global_batch_size * config.data.seq_length
    assert layer["rank_imbalance"][1] > 0


def test_the_report_draws_every_modality(trained: tuple) -> None:
    _, config, _ = trained
    page = write_report(config.run_dir).read_text(encoding="utf-8")
    for wanted in ("Text tokens", "Audio tokens", "Image tokens", "expert 10 (common)", "Expert-parallel ranks"):
        assert wanted in page, wanted
    assert "sizes of the expert groups are unknown" not in page


def test_data_of_other_modalities_is_refused(trained: tuple) -> None:
    directory, config, _ = trained
    two = run_config(directory, "two")
    with pytest.raises(DataError, match="further_modalities: image 25..40 != none"):
        open_datasets(two, config.data.train)
