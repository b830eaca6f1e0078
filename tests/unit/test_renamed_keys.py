"""Keys that had another name: a user is told the new one, and what was written with the old ones is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_most.config import RunConfig, dump_config, load_config, with_new_names, with_old_names
from megatron_most.config.renamed import RENAMED
from megatron_most.errors import ConfigError
from megatron_most.keys import keys_of

YAML = """
vocab: {text_vocab_size: 100, num_codebooks: 4, codebook_size: 1000}
model:
  num_layers: 4
  moe:
    groups:
      - {modality: text, size: 4, %s: 2}
      - {modality: audio, size: 4, moe_router_topk: 2}
"""


def load(path: Path, *overrides: str, top_k: str = "moe_router_topk") -> RunConfig:
    path.write_text(YAML % top_k)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.balance_coeff=0.1", "model.moe.balance_coeff: is now model.moe.moe_aux_loss_coeff"),
        ("training.steps=10", "training.steps: is now training.train_iters"),
        ("model.moe.groups.0.top_k=1", "model.moe.groups[0].top_k: is now model.moe.groups[0].moe_router_topk"),
        ("model.moe={dispatcher: alltoall}", "model.moe.dispatcher: is now model.moe.moe_token_dispatcher_type"),
        ("model.attention.rope.type=yarn", "model.attention.rope.type: is now model.attention.rope.rope_type"),
    ],
)
def test_an_old_key_is_answered_with_its_new_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "run.yaml", override)
    assert str(caught.value) == f"override {override!r}: {message}"


def test_an_old_key_of_a_file_is_answered_with_its_new_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "run.yaml", top_k="top_k")
    assert str(caught.value) == (
        f"{tmp_path / 'run.yaml'}: model.moe.groups[0].top_k: is now model.moe.groups[0].moe_router_topk"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.num_layers=${training.steps}",
            "model.num_layers='${training.steps}': training.steps is now training.train_iters",
        ),
        (
            "training.eval_interval=${.steps}",
            "training.eval_interval='${.steps}': training.steps is now training.train_iters",
        ),
        (
            "run_dir='runs/${training.steps}'",
            "run_dir='runs/${training.steps}': training.steps is now training.train_iters",
        ),
        (
            "model.moe.groups.1.size=${model.moe.groups[0].top_k}",
            "model.moe.groups[1].size='${model.moe.groups[0].top_k}': model.moe.groups[0].top_k is now"
            " model.moe.groups[0].moe_router_topk",
        ),
        (
            "model.moe.groups.1.size=${..0.top_k}",
            "model.moe.groups[1].size='${..0.top_k}': model.moe.groups[0].top_k is now"
            " model.moe.groups[0].moe_router_topk",
        ),
    ],
)
def test_an_old_key_in_an_interpolation_is_answered_with_its_new_name(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "run.yaml", override)
    assert str(caught.value) == f"override {override!r}: {message}"


def test_an_interpolation_that_names_a_key_of_today_is_resolved(tmp_path: Path) -> None:
    config = load(
        tmp_path / "run.yaml", "model.moe.groups.1.size=${..0.size}", "model.num_layers=${training.eval_iters}"
    )
    assert (config.model.moe.groups[1].size, config.model.num_layers) == (4, config.training.eval_iters)


def test_a_user_s_config_yaml_is_answered_as_any_other_file(tmp_path: Path) -> None:
    """Only what a run, an import or a sweep has recorded is read with old names."""
    with pytest.raises(ConfigError, match=r"config.yaml: model.moe.groups\[0\].top_k: is now"):
        load(tmp_path / "config.yaml", top_k="top_k")


def test_every_old_name_is_gone_and_every_new_one_is_a_key() -> None:
    known = {found.path for found in keys_of(RunConfig)}
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known
    assert all(old.rpartition(".")[0] == new.rpartition(".")[0] for old, new in RENAMED.items())
    assert len(set(RENAMED.values())) == len(RENAMED)


def test_the_file_of_an_earlier_version_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load(tmp_path / "run.yaml", "optimizer.lr=3e-4", "model.moe.groups.0.moe_aux_loss_coeff=0.5")
    values = yaml.safe_load(dump_config(config))
    old = with_old_names(values)
    assert "balance_coeff" in old["model"]["moe"]["groups"][0] and "steps" in old["training"]
    assert with_new_names(old) == with_new_names(values) == values
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert load_config(tmp_path / "config.yaml", ["training.train_iters=1000"]) == config
