"""FLOP/s and MFU of a run against figures computed here."""

import pytest

from megatron_most.config.load import build_config
from megatron_most.planning import train_flops_per_token
from megatron_most.report.run_files import RunFiles, read_run
from megatron_most.report.utilization import FLOPS, MFU, with_utilization
from tests.unit.report.fake_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run", steps=40))


def test_a_cpu_has_flops_and_no_utilization(run):
    flops = train_flops_per_token(build_config("c", run.config))
    found = with_utilization(run)
    lines = [line for line in found.metrics if "tokens_per_second" in line]
    assert [line[FLOPS] for line in lines] == [line["tokens_per_second"] * flops for line in lines]
    assert not any(MFU in line for line in found.metrics)


def test_utilization_is_over_the_peak_of_all_ranks(run):
    """Two ranks (fake_run) on H100s, whose data sheet says 989 TFLOP/s dense in bf16."""
    flops = train_flops_per_token(build_config("c", run.config))
    on_gpus = RunFiles(run.directory, run.metrics, config=run.config, environment={**run.environment, "device": "H100"})
    [first, *_] = with_utilization(on_gpus).metrics
    assert first[MFU] == pytest.approx(100 * first["tokens_per_second"] * flops / (2 * 989e12))
    assert FLOPS not in first


def test_an_incomplete_configuration_is_noted(tmp_path):
    metrics = [{"step": 1, "tokens_per_second": 5.0}]
    run = RunFiles(tmp_path, metrics, config={"model": {"num_layers": 2, "colour": 1}})
    assert with_utilization(run).metrics == metrics
    assert run.notes == ["config.yaml is not a complete configuration, so the model's FLOP/s are unknown."]


def test_tokens_stand_in_place_of_steps():
    metrics = [
        {"step": 10, "consumed_tokens": 1000, "loss": 3.0},
        {"step": 15, "validation/a/loss": 2.0},
        {"step": 20, "consumed_tokens": 3000, "loss": 1.0},
        {"step": 20, "validation/a/loss": 1.5},
    ]
    moved = RunFiles(None, metrics, routing=[{"step": 5}]).by_tokens()
    assert [line["step"] for line in moved.metrics] == [1000, 2000, 3000, 3000]
    assert [line["step"] for line in moved.routing] == [500]
    assert RunFiles(None, [{"step": 1, "loss": 2.0}]).by_tokens() is None
