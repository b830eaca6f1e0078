"""Whose run directory it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError
from megatron_most.training.run_directory import METRICS, ROUTING, check_same_run, claim
from tests.distributed.tiny import tiny_config
from tests.unit.checkpointing.test_metadata import described


def config_of(directory: Path, **overrides: object) -> RunConfig:
    return tiny_config(run_dir=directory / "run", **overrides)


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """The parent of a run directory in which a step was logged."""
    claim(config_of(tmp_path), 1, "a CPU").close()
    (tmp_path / "run" / METRICS).write_text('{"step": 1}\n')
    return tmp_path


def test_claim_records_config_and_environment(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    claim(config, 4, "a CPU").close()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == config.seed
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == 4
    assert environment["device"] == "a CPU"
    assert environment["versions"]["megatron-core"]
    assert environment["command"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"seed": 7}, "seed is 1234 there, 7"),
        ({"model__hidden_size": 48}, "model.hidden_size is 32 there, 48"),
        ({"vocab__num_codebooks": 3}, "vocab.num_codebooks is 2 there, 3"),
        ({"data__seq_length": 64}, "data.seq_length is 32 there, 64"),
        ({"data__train": "[{path: elsewhere}]"}, "data.train"),
        ({"precision__dtype": "bf16"}, "precision.dtype is 'fp32' there, 'bf16'"),
        ({"model__moe__score_rule": "all"}, "model.moe.score_rule is 'group' there, 'all'"),
    ],
)
def test_another_run_is_refused_by_its_first_difference(used: Path, overrides: dict, field: str) -> None:
    with pytest.raises(ConfigError, match="belongs to another run") as caught:
        check_same_run(config_of(used, **overrides))
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"training__train_iters": 5000},
        {"logging__log_interval": 3},
        {"checkpoint__keep_last": 7},
        {"optimizer__lr": 0.5},
        {"model__moe__moe_aux_loss_coeff": 0.5},
        {"model__moe__balance_scope": "pooled"},
        {"data__validation": "[{path: more}]"},
        {"parallel__expert_model_parallel_size": 2},
    ],
)
def test_what_may_change(used: Path, overrides: dict) -> None:
    check_same_run(config_of(used, **overrides))


def test_directory_without_a_logged_step_belongs_to_no_run(tmp_path: Path) -> None:
    claim(config_of(tmp_path), 1, "a CPU").close()
    check_same_run(config_of(tmp_path, seed=7))


def test_a_directory_in_use_is_refused_until_it_is_free(tmp_path: Path) -> None:
    lock = claim(config_of(tmp_path), 1, "a CPU")
    with pytest.raises(ConfigError, match="another process is training there"):
        claim(config_of(tmp_path), 1, "a CPU")
    lock.close()
    claim(config_of(tmp_path), 1, "a CPU").close()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="cannot be created"):
        claim(config_of(tmp_path), 1, "a CPU")


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "run" / "checkpoints" / ".tmp-step_00000005"
    leftover.mkdir(parents=True)
    claim(config_of(tmp_path), 1, "a CPU").close()
    assert not leftover.exists()


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", METRICS, ROUTING])
def test_what_is_no_file_is_set_aside(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    for number in ("", "2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "kept").write_text("")
        claim(config_of(tmp_path), 1, "a CPU").close()
        assert (tmp_path / "run" / f"{name}.damaged{number}" / "kept").is_file()
        assert f"{name} is not a file: moved to " in capsys.readouterr().out
        (tmp_path / "run" / name).unlink(missing_ok=True)


def test_a_dangling_link_to_the_checkpoints_does_not_start_the_run_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(ConfigError, match="checkpoints: is not a directory; if it is a link, mount"):
        claim(config_of(tmp_path), 1, "a CPU")


@pytest.mark.parametrize("content", [None, b"seed: 7\n", b"\xff"])
def test_the_configuration_of_the_checkpoint_counts(tmp_path: Path, content: bytes | None) -> None:
    """It has a checksum; config.yaml may be lost, edited or damaged."""
    config = config_of(tmp_path)
    claim(config, 1, "a CPU").close()
    described(tmp_path / "run", 3, config)
    if content is None:
        (tmp_path / "run" / "config.yaml").unlink()
    else:
        (tmp_path / "run" / "config.yaml").write_bytes(content)
    check_same_run(config)
    with pytest.raises(ConfigError, match="belongs to another run: seed is 1234 there, 7 in this config"):
        check_same_run(config_of(tmp_path, seed=7))
