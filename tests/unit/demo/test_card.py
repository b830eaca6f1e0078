"""What the panel says of a checkpoint and of an export."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from megatron_most.demo.card import card_of, harmless
from megatron_most.inference.loading import no_codec
from tests.distributed.tiny import tiny_config


def test_an_export_shows_its_card_without_front_matter_and_without_tags_or_pictures(tmp_path: Path) -> None:
    model = SimpleNamespace(metadata=None, config=tiny_config(), codec=SimpleNamespace(name="tiny"))
    without = card_of(tmp_path, model)  # type: ignore[arg-type]
    assert "tiny, 2 codebooks of 16, layout `frame`" in without and "its data is unknown" in without
    silent = SimpleNamespace(metadata=None, config=tiny_config(), codec=no_codec("text-only"))
    assert "unknown, 2 codebooks" in card_of(tmp_path, silent)  # type: ignore[arg-type]
    (tmp_path / "README.md").write_text("---\nlicense: x\n---\n# Mine\n![a](http://b/c.png)<img src=x>")
    card = card_of(tmp_path, model)  # type: ignore[arg-type]
    assert "license: x" not in card and "# Mine" in card
    assert "\\![a]" in card and "<img" not in card and "&lt;img" in card


def test_harmless_leaves_the_rest() -> None:
    assert harmless("| a | 3 |\n**b** > c") == "| a | 3 |\n**b** > c"
