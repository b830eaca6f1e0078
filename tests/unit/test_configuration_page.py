"""docs/configuration.md says what the dataclasses say, and names flags that Megatron has."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from megatron_most.config import RunConfig
from megatron_most.keys import key, keys_of, training_only

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("configuration", DOCS / "configuration.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == script.page(), "run: python docs/configuration.py"


def test_every_key_says_what_it_means() -> None:
    assert [found.path for found in keys_of(RunConfig) if not found.field.metadata.get("meaning")] == []


def test_a_key_has_its_default_and_lists_are_not_shared() -> None:
    assert (key(3, "three").default, key(list, "some").default_factory) == (3, list)


def test_only_keys_of_the_model_are_marked_as_training_only() -> None:
    found = training_only(RunConfig)
    assert {"model.transformer_impl", "model.moe.groups[].moe_aux_loss_coeff", "model.moe.balance_scope"} <= found
    assert all(path.startswith("model.") for path in found)
    assert "model.hidden_size" not in found


@pytest.mark.slow
def test_megatron_has_the_flags() -> None:
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = set(parser._option_string_actions)
    flags = {found.field.metadata["flag"] for found in keys_of(RunConfig)} - {""}
    assert len(flags) > 70
    assert flags <= known, flags - known
