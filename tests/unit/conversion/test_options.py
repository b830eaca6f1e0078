"""Options that do not fit a model: one line that names the option, its value and the rule; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_most.conversion import ImportOptions
from megatron_most.conversion.import_plan import plan_import
from megatron_most.errors import CheckpointError, ConfigError
from tests.unit.conversion.models import deepseek, llama
from tests.unit.conversion.test_most import LISTS, most, published
from tests.unit.conversion.test_round_trips import options

GROUPS = "[{modality: text, size: 3, moe_router_topk: 2}, {modality: audio, size: 3, moe_router_topk: 2}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "hf"
    deepseek(folder)
    return folder


@pytest.mark.parametrize("audio_vocab, match", [
    ("frame", "--audio-vocab=frame: must be LAYOUT:CODEBOOKSxSIZE, for example frame:4x4032"),
    ("frame:4", "--audio-vocab=frame:4: must be"),
    ("frame:2x16x3", "must be LAYOUT:CODEBOOKSxSIZE"),
    ("frame:2.0x16", "must be LAYOUT:CODEBOOKSxSIZE"),
    ("", "--audio-vocab=: must be"),
    ("wave:2x16", "vocab.layout='wave': must be one of frame, frame_delay, flat, flat_delay"),
    ("frame:0x16", "vocab.num_codebooks=0: must be at least 1"),
    ("frame:2x-16", "vocab.codebook_size=-16: must be at least 1"),
    ("flat_delay:1x16", "needs at least 2 codebooks"),
    (None, "--audio-vocab: is required"),
])  # fmt: skip
def test_audio_vocab(folder, audio_vocab, match):
    with pytest.raises(ConfigError, match=match):
        plan_import(folder, ImportOptions("expand", audio_vocab))


@pytest.mark.parametrize("layout, size", [("frame", 93), ("frame_delay", 94), ("flat", 125), ("flat_delay", 125)])
def test_audio_vocab_of_every_layout(folder, layout, size):
    wanted = ImportOptions("expand", f"{layout}:2x16", overrides=["model.moe.expert_backend=sequential"])
    vocab = plan_import(folder, wanted).config.vocab
    assert (vocab.layout, vocab.num_codebooks, vocab.codebook_size, vocab.size) == (layout, 2, 16, size)


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan"), float("inf")])
def test_noise(folder, noise):
    with pytest.raises(ConfigError, match="--noise=.*: must be a fraction of the weights' size, from 0 to 1"):
        plan_import(folder, options("expand", noise=noise))


def test_noise_is_for_copies(folder):
    with pytest.raises(ConfigError, match="--noise=0.1: is only for --experts expand"):
        plan_import(folder, options("partition", noise=0.1))


COUNTS = [[1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize("usage, match", [
    ([], "must hold a JSON object"),
    ({"audio": COUNTS}, "has no counts for text"),
    ({"text": COUNTS, "speech": COUNTS}, "speech: is not a modality of the vocabulary; it has text, audio"),
    ({"text": COUNTS[:1]}, "text: must hold one list per MoE layer, 2"),
    ({"text": [COUNTS[0], [1, 2]]}, r"text\[1\]: must hold one finite number, at least 0, for each of the 6 experts"),
    ({"text": [COUNTS[0], [1, 2, 3, 4, 5, -6]]}, r"text\[1\]: must hold one finite number"),
    ({"text": [COUNTS[0], [1, 2, 3, 4, 5, float("inf")]]}, r"text\[1\]: must hold one finite number"),
    ({"text": [COUNTS[0], [1, 2, 3, 4, 5, float("nan")]]}, r"text\[1\]: must hold one finite number"),
    ({"text": [COUNTS[0], [1, 2, 3, 4, 5, "6"]]}, r"text\[1\]: must hold one finite number"),
])  # fmt: skip
def test_usage(folder, tmp_path, usage, match):
    (tmp_path / "usage.json").write_text(json.dumps(usage))
    with pytest.raises(CheckpointError, match=match):
        plan_import(folder, options("partition", usage=str(tmp_path / "usage.json")))


def test_modes_are_for_their_sources(folder, tmp_path):
    llama(tmp_path / "llama")
    most(tmp_path / "most", *LISTS["apart"])
    for source, mode, match in [
        (folder, "upcycle", "--experts=upcycle: for a deepseek-v2 model must be partition or expand"),
        (folder, None, "--experts: a deepseek-v2 model needs one of partition, expand"),
        (tmp_path / "llama", "expand", "--experts=expand: for a llama model must be upcycle"),
        (tmp_path / "most", "expand", "--experts=expand: for a most model leave it out"),
    ]:
        with pytest.raises(ConfigError, match=match):
            plan_import(source, options(mode))


def test_groups_of_a_most_model_are_its_own(tmp_path):
    most(tmp_path / "hf", *LISTS["mixed"])
    (tmp_path / "run.yaml").write_text(f"model: {{moe: {{groups: {GROUPS}}}}}")
    wanted = ImportOptions(**{**vars(published()), "config": str(tmp_path / "run.yaml")})
    with pytest.raises(ConfigError, match=r"model.moe.groups: .*hf has its own, \[\[5, 0, 3\], \[1, 4, 2\]\]"):
        plan_import(tmp_path / "hf", wanted)


@pytest.mark.parametrize("text, match", [
    ("vocab: {color: blue, num_codebooks: 2, codebook_size: 4}", "run.yaml: vocab.color: unknown key"),
    ("vocab: {num_codebooks: 2, codebook_size: 4}\nmodel: {num_layer: 3}", "model.num_layer: unknown key"),
    ("vocab: {num_codebooks: 2, codebook_size: 4}\nmodel: {num_layers: 9}", "model.num_layers=9: .* has 3"),
    ("vocab: 7", "run.yaml: vocab=7: must be a section"),
    ("vocab:", "run.yaml: vocab=None: must be a section"),
    ("vocab: {num_codebooks: two, codebook_size: 4}", "run.yaml: vocab.num_codebooks='two': must be an integer"),
    ("- a list", "must hold a mapping"),
    ("model: {}", "--audio-vocab: is required"),
])  # fmt: skip
def test_wrong_configuration_file(folder, tmp_path, text, match):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        plan_import(folder, ImportOptions("expand", config=str(tmp_path / "run.yaml")))


@pytest.mark.parametrize("overrides, match", [
    (["model.hidden_size=64"], "model.hidden_size=64: .* has 32"),
    (["model.attention.rope.rotary_base=5"], "model.attention.rope.rotary_base=5"),
    (["model.moe.moe_router_score_function=sigmoid"], "model.moe.moe_router_score_function='sigmoid'"),
    (["model.moe.groups.0.size=5"], "size=5: expand gives text all 6 experts of the base"),
    (["model.moe.groups.0.moe_router_topk=3"], r"groups\[text\].moe_router_topk=3: the base has 2"),
    (["model.moe.groups.1.size=3"], "give their counts with --usage"),
    (["model.moe.groups.1.size=9"], "size=9: the base has only 6 experts to copy"),
    (["model.moe.score_rule=all"], "would change text's scores"),
])  # fmt: skip
def test_wishes_that_do_not_fit_the_base(folder, overrides, match):
    with pytest.raises(ConfigError, match=match):
        plan_import(folder, options("expand", *overrides))
