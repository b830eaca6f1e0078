"""Import and export of tiny models: logits equal transformers', weights come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_most import parallel
from megatron_most.checkpointing import read_metadata
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import StateReader
from megatron_most.config import ParallelConfig, load_config, with_old_names
from megatron_most.conversion import ImportOptions, export_model, import_model
from megatron_most.conversion.export_plan import stored_config
from megatron_most.conversion.verification import whole_model
from megatron_most.errors import ConfigError
from megatron_most.vocab import NO_CODE
from tests.unit.conversion.models import DEEPSEEK_SHAPES, VOCAB, deepseek, fresh_copy, llama

TOLERANCE = 1e-5  # of the largest logit, fp32
EXPANDED_TOLERANCE = {"group_limited": TOLERANCE}
"""1e-6 for the others. With experts scaled by 16, fp32 logits of transformers differ from its fp64 ones by 2.6e-6."""
SEQUENTIAL = ["model.moe.expert_backend=sequential"]


def options(experts: str | None, *overrides: str, **others) -> ImportOptions:
    return ImportOptions(experts=experts, audio_vocab="frame:2x16", overrides=[*SEQUENTIAL, *overrides], **others)


def tokens(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def native_logits(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model in a checkpoint, built whole in this process."""
    config = stored_config(checkpoint, read_metadata(checkpoint))
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        model = whole_model(config, checkpoint / STATE).eval()
        codes = torch.full((*ids.shape, config.vocab.num_codebooks), NO_CODE)
        uses_codes = config.vocab.codec_layout.uses_side_codes
        with torch.no_grad():
            modality, is_padding = config.vocab.modality_of(ids), torch.zeros_like(ids, dtype=torch.bool)
            return model(ids, modality, is_padding, codes if uses_codes else None)[0]
    finally:
        parallel.destroy()


@torch.no_grad()
def assert_same_logits(
    found: torch.Tensor, model: torch.nn.Module, ids: torch.Tensor, tolerance: float = TOLERANCE
) -> None:
    expected = model(ids).logits
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))


def assert_same_files(first: Path, second: Path) -> None:
    """The same tensors, bit for bit; the configuration may be spelled in another way."""
    mine, theirs = ({**load_file(path / "model.safetensors")} for path in (first, second))
    assert mine.keys() == theirs.keys() and mine
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("shape", DEEPSEEK_SHAPES)
def test_expand_computes_what_deepseek_does_and_comes_back(tmp_path, shape):
    model = deepseek(tmp_path / "hf", **DEEPSEEK_SHAPES[shape])
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("expand"))
    found = native_logits(checkpoint, tokens())[..., :VOCAB]
    assert_same_logits(found, model, tokens(), EXPANDED_TOLERANCE.get(shape, 1e-6))
    export_model(checkpoint, tmp_path / "back", "deepseek-v2")
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    assert_same_logits(fresh_copy(tmp_path / "back")(tokens()).logits, model, tokens())


@pytest.mark.parametrize("shape", DEEPSEEK_SHAPES)
def test_partition_is_undone_bit_for_bit(tmp_path, shape):
    deepseek(tmp_path / "hf", torch.bfloat16, **DEEPSEEK_SHAPES[shape])
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("partition"))
    export_model(checkpoint, tmp_path / "back", "deepseek-v2", experts="all")
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    mine, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back"))
    for name in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor"):
        assert mine[name] == theirs[name], name


def test_text_part_of_a_partition_computes_what_its_text_does(tmp_path):
    deepseek(tmp_path / "hf")
    text, audio = (
        "{modality: text, experts: [5, 0, 3], moe_router_topk: 2}",
        "{modality: audio, experts: [1, 2, 4], moe_router_topk: 2}",
    )
    checkpoint = import_model(
        tmp_path / "hf", tmp_path / "native", options("partition", f"model.moe.groups=[{text}, {audio}]")
    )
    export_model(checkpoint, tmp_path / "text", "deepseek-v2")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["n_routed_experts"] == 3
    exported = fresh_copy(tmp_path / "text")
    assert_same_logits(native_logits(checkpoint, tokens())[..., :VOCAB], exported, tokens())


def test_partition_by_usage_gives_each_layer_its_own_experts_and_is_undone(tmp_path):
    deepseek(tmp_path / "hf", **DEEPSEEK_SHAPES["plain"])
    usage = {"text": [[1, 9, 1, 9, 1, 9], [9, 9, 9, 1, 1, 1]], "audio": [[5, 1, 5, 1, 5, 1], [1, 1, 1, 1, 1, 1]]}
    (tmp_path / "usage.json").write_text(json.dumps(usage))
    wanted = options("partition", usage=str(tmp_path / "usage.json"))
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    origins = json.loads((checkpoint / "conversion.json").read_text())["origins"]
    assert [[expert for expert, _ in layer] for layer in origins] == [[1, 3, 5, 0, 2, 4], [0, 1, 2, 3, 4, 5]]
    router = "decoder.layers.1.mlp.router.weight"
    reader = StateReader(checkpoint / STATE)
    rows = reader.read_whole(router)
    hf = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(rows, hf[[1, 3, 5, 0, 2, 4]])
    export_model(checkpoint, tmp_path / "back", "deepseek-v2", experts="all")
    assert_same_files(tmp_path / "hf", tmp_path / "back")


def test_a_smaller_pool_gets_copies_of_the_experts_used_most_layer_by_layer(tmp_path):
    model = deepseek(tmp_path / "hf")
    usage = {"text": [[9, 9, 9, 1, 1, 1]] * 2, "audio": [[1, 5, 2, 1, 1, 4], [7, 1, 1, 8, 9, 1]]}
    (tmp_path / "usage.json").write_text(json.dumps(usage))
    wanted = options("expand", "model.moe.groups.1.size=3", usage=str(tmp_path / "usage.json"))
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    hf, reader = load_file(tmp_path / "hf" / "model.safetensors"), StateReader(checkpoint / STATE)
    for layer, copied in ((1, [1, 2, 5]), (2, [0, 3, 4])):
        gate = hf[f"model.layers.{layer}.mlp.gate.weight"]
        rows = reader.read_whole(f"decoder.layers.{layer}.mlp.router.weight")
        assert torch.equal(rows, torch.cat([gate, gate[copied]]))
        experts = reader.read_whole(f"decoder.layers.{layer}.mlp.experts.experts.linear_fc2.weight")
        for place, expert in enumerate([*range(6), *copied]):
            assert torch.equal(experts[place], hf[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"])
    assert_same_logits(native_logits(checkpoint, tokens())[..., :VOCAB], model, tokens(), 1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [48, 0])
def test_upcycling_keeps_what_a_dense_llama_computes(tmp_path, tied, shared):
    model = llama(tmp_path / "hf", tie_word_embeddings=tied)
    wanted = options("upcycle", f"model.moe.moe_shared_expert_intermediate_size={shared}", "model.moe.groups.1.size=3")
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    assert_same_logits(native_logits(checkpoint, tokens())[..., :VOCAB], model, tokens())
    export_model(checkpoint, tmp_path / "back", "llama")
    assert_same_logits(fresh_copy(tmp_path / "back")(tokens()).logits, model, tokens())
    if not tied:
        assert_same_files(tmp_path / "hf", tmp_path / "back")


def test_upcycling_may_leave_the_first_layers_dense(tmp_path):
    model = llama(tmp_path / "hf")
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("upcycle", "model.first_k_dense_replace=1"))
    assert_same_logits(native_logits(checkpoint, tokens())[..., :VOCAB], model, tokens())
    export_model(checkpoint, tmp_path / "back", "llama")
    assert_same_files(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("router", ["shared", "per_modality"])
def test_an_extension_brings_everything_back(tmp_path, router):
    deepseek(tmp_path / "hf", torch.bfloat16)
    wanted = options("expand", f"model.moe.router_weights={router}", noise=0.05)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    export_model(checkpoint, tmp_path / "out", "deepseek-v2", max_shard_size="20KB")
    again = import_model(tmp_path / "out", tmp_path / "again", ImportOptions())
    first, second = (StateReader(path / STATE) for path in (checkpoint, again))
    assert first.forms == second.forms and first.forms
    for key in first.forms:
        assert torch.equal(first.read_whole(key), second.read_whole(key)), key
    configs = [read_metadata(path).config for path in (checkpoint, again)]
    assert configs[0]["model"] == configs[1]["model"] and configs[0]["vocab"] == configs[1]["vocab"]


def test_an_extension_of_an_earlier_version_is_read(tmp_path):
    """Its configuration has the old names of keys."""
    deepseek(tmp_path / "hf")
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("expand"))
    export_model(checkpoint, tmp_path / "out", "deepseek-v2")
    path = tmp_path / "out" / "most_extension.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "config": with_old_names(values["config"])}))
    assert "moe_aux_loss_coeff" not in path.read_text()
    again = import_model(tmp_path / "out", tmp_path / "again", ImportOptions())
    assert read_metadata(again).config["model"] == read_metadata(checkpoint).config["model"]


THREE = """
vocab:
  further_modalities: [{name: image, start: 40, stop: 60}]
  num_codebooks: 2
  codebook_size: 16
precision: {dtype: fp32}
"""


@pytest.mark.parametrize("mode", ["expand", "partition"])
def test_three_modalities(tmp_path, mode):
    model = deepseek(tmp_path / "hf")
    (tmp_path / "run.yaml").write_text(THREE)
    wanted = ImportOptions(mode, config=str(tmp_path / "run.yaml"), overrides=SEQUENTIAL)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    groups = read_metadata(checkpoint).config["model"]["moe"]["groups"]
    assert [group["modality"] for group in groups] == ["text", "audio", "image"]
    assert [group["size"] for group in groups] == ([6, 6, 6] if mode == "expand" else [2, 2, 2])
    if mode == "expand":
        # Copies: image tokens compute what text tokens do, too.
        assert_same_logits(native_logits(checkpoint, tokens())[..., :VOCAB], model, tokens())


@pytest.fixture(scope="module")
def expanded(tmp_path_factory) -> Path:
    """A checkpoint whose base stands beside it as ``hf``."""
    folder = tmp_path_factory.mktemp("expanded")
    deepseek(folder / "hf")
    return import_model(folder / "hf", folder / "native", options("expand"))


def test_every_mix_of_modalities_is_finite_and_leaves_text_before_it_alone(expanded):
    checkpoint = expanded
    vocab = read_metadata(checkpoint).vocab
    text = tokens(rows=2, length=16)
    mixed = text.clone()
    mixed[0, 8:] = vocab.frame
    mixed[1] = torch.tensor([vocab.begin_of_audio, vocab.frame, vocab.frame, vocab.end_of_audio] * 4)
    found = native_logits(checkpoint, mixed)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, :8], native_logits(checkpoint, text)[0, :8], rtol=1e-6, atol=1e-6)


def test_noise_is_on_copies_alone(tmp_path):
    deepseek(tmp_path / "hf")
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("expand", noise=0.1))
    reader = StateReader(checkpoint / STATE)
    text, audio = reader.read_whole("decoder.layers.1.mlp.experts.experts.linear_fc2.weight").split(6)
    hf = load_file(tmp_path / "hf" / "model.safetensors")
    base = torch.stack([hf[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(6)])
    assert torch.equal(text, base)
    gate = hf["model.layers.1.mlp.gate.weight"]
    text_rows, audio_rows = reader.read_whole("decoder.layers.1.mlp.router.weight").split(6)
    assert torch.equal(text_rows, gate)
    for copies, copied in ((audio, base), (audio_rows, gate)):
        share = (copies - copied).square().mean().sqrt() / copied.square().mean().sqrt()
        assert 0.09 < share < 0.11
    # Attention, the shared experts and the dense layers have no copies.
    for name, key in (("self_attn.o_proj", "self_attention.linear_proj"),
                      ("mlp.shared_experts.down_proj", "mlp.shared_experts.linear_fc2")):  # fmt: skip
        assert torch.equal(reader.read_whole(f"decoder.layers.1.{key}.weight"), hf[f"model.layers.1.{name}.weight"])


def test_new_embeddings_have_the_scale_of_the_old(expanded):
    reader = StateReader(expanded / STATE)
    embedding = reader.read_whole("embedding.word_embeddings.weight")
    old, new = embedding[:VOCAB], embedding[VOCAB:]
    frame = sum(reader.read_whole(f"codebook_embeddings.tables.{codebook}.weight") for codebook in range(2))
    for rows in (new, frame):
        assert 0.9 < rows.std() / old.std() < 1.1
    head = reader.read_whole("output_layer.weight")
    codes = [reader.read_whole(f"codebook_heads.heads.{codebook}.weight") for codebook in range(2)]
    assert not any(rows.any() for rows in codes)
    for table in (embedding, head, *codes):
        assert len(table) % 128 == 0  # any tensor-parallel size up to that fits


def test_the_configuration_beside_the_weights_starts_a_run_from_them(expanded):
    config = load_config(expanded / "config.yaml")
    assert config.checkpoint.load == str(expanded)
    assert config.model == stored_config(expanded, read_metadata(expanded)).model


def test_a_model_that_most_cannot_hold_is_refused(expanded, tmp_path):
    with pytest.raises(ConfigError, match="score_rule.*softmax over all"):
        export_model(expanded, tmp_path / "out", "most")
    assert not (tmp_path / "out").exists()
