"""What stands beside the weights of the format ``hf``: code, settings of generation and processor, and a model card."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_most import __version__
from megatron_most.checkpointing import CheckpointMetadata, read_metadata
from megatron_most.config import RunConfig
from megatron_most.conversion.importing import SPECIAL_IDS
from megatron_most.data.building.instructions import INSTRUCTIONS
from megatron_most.data.building.special_tokens import ROLE_MARKERS, special_tokens
from megatron_most.data.storage.sidecar import read_sidecar, with_current_keys
from megatron_most.errors import CheckpointError, ConfigError, DataError
from megatron_most.files import read_json, write_json, write_text
from megatron_most.moe import ExpertGroups
from megatron_most.text import TextTokenizer, load_tokenizer
from megatron_most.text.stop_ids import GENERATION_CONFIG, stop_ids
from megatron_most.text.tokenizer import SentencePieceTokenizer

_CODE = Path(__file__).parents[1] / "huggingface"
_AUTO_MAP = {
    "AutoConfig": "configuration_most.MoSTConfig",
    "AutoModel": "modeling_most.MoSTModel",
    "AutoModelForCausalLM": "modeling_most.MoSTForConditionalGeneration",
    "AutoProcessor": "processing_most.MoSTProcessor",
}
_CARD_HEAD = """\
---
library_name: transformers
pipeline_tag: any-to-any
tags: [speech, moe, most]
---

# MoST: speech and text with experts for each modality

Trained with megatron_most {trained_by}, exported by {exported_by}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
[codes] = model.speak(processor, ["Hello."], max_frames=200)  # [frames, codebooks]; the codec makes sound of them
[text] = model.transcribe(processor, [codes])
```

## Model
"""
_PROBES = ("Transcribe:", "Say: one two  three", "naïve 12,5 € ¿qué? 漢字\nnew line", "</s> <|user|> spelled out")
"""Texts on which the tokenizer of transformers must agree with this project's."""


def write_companions(config: RunConfig, values: dict[str, Any], checkpoint: Path, made: Path) -> dict[str, Any]:
    """Write the files into ``made``, where the tokenizer's are already, and return the complete ``config.json``.

    Raises:
        CheckpointError: transformers' reading of the tokenizer gives other ids.
    """
    metadata = read_metadata(checkpoint)
    for path in sorted(_CODE.glob("*_most.py")):
        shutil.copyfile(path, made / path.name)
    codec = None if metadata.codec is None else {"name": metadata.codec.name, "fingerprint": metadata.codec.fingerprint}
    values = {**values, "auto_map": _AUTO_MAP, "codec": codec}
    if any((made / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        tokenizer = load_tokenizer(made)
        generation = _complete_generation_config(tokenizer, made)
        values |= {"num_text_ids": tokenizer.vocab_size, **{name: generation[name] for name in SPECIAL_IDS}}
        _write_tokenizer_settings(tokenizer, made)
        _write_processor(config, tokenizer, made)
        print(f"checked tokenizer: {_check_tokenizer(tokenizer, made)}", flush=True)
    write_text(made / "README.md", model_card(config, metadata, checkpoint), CheckpointError)
    return values


def _write_tokenizer_settings(tokenizer: TextTokenizer, made: Path) -> None:
    """What transformers has to know of a SentencePiece model that stands alone."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    path = made / "tokenizer_config.json"
    given = read_json(path, CheckpointError) if path.is_file() else {}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **{role: tokenizer.piece(id_) for role, id_ in roles.items()},
    }
    write_json(path, {**settings, **given}, CheckpointError)


def _write_processor(config: RunConfig, tokenizer: TextTokenizer, made: Path) -> None:
    vocab = config.vocab
    try:
        table = special_tokens(vocab, tokenizer, roles=True)
        role_ids = {role: table[role] for role in ROLE_MARKERS}
    except ConfigError:  # the vocabulary has no room for them: the model was not trained to chat
        role_ids = None
    settings = {
        "processor_class": "MoSTProcessor",
        "auto_map": {"AutoProcessor": _AUTO_MAP["AutoProcessor"]},
        "codec_layout": vocab.layout,
        "text_vocab_size": vocab.text_vocab_size,
        "num_codebooks": vocab.num_codebooks,
        "codebook_size": vocab.codebook_size,
        "instructions": {purpose: wordings[0] for purpose, wordings in INSTRUCTIONS.items()},
        "role_ids": role_ids,
    }
    write_json(made / "processor_config.json", settings, CheckpointError)


def _complete_generation_config(tokenizer: TextTokenizer, made: Path) -> dict[str, Any]:
    """Add to ``generation_config.json``, if the checkpoint has one, what generation of this package does by itself.

    It stops at every id of :func:`stop_ids`, and never generates the beginning of sequence or padding.
    """
    path = made / GENERATION_CONFIG
    given = read_json(path, CheckpointError) if path.is_file() else {}
    ends = [tokenizer.eos_id, *stop_ids(made, tokenizer)]
    settings = {
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": sorted({tokenizer.bos_id, tokenizer.pad_id} - set(ends)) or None,
        **given,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }
    write_json(path, settings, CheckpointError)
    return settings


def _check_tokenizer(tokenizer: TextTokenizer, made: Path) -> str:
    if importlib.util.find_spec("transformers") is None:
        return "not compared, transformers is not installed"
    from transformers import AutoTokenizer

    from megatron_most.huggingface import MoSTConfig

    theirs = AutoTokenizer.from_pretrained(made, config=MoSTConfig(), local_files_only=True)  # nosec B615
    for text in _PROBES:
        found = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if found != tokenizer.encode(text):
            raise CheckpointError(
                f"{made}: the tokenizer gives {text!r} the ids {tokenizer.encode(text)}, in transformers {found}"
            )
    return f"transformers gives {len(_PROBES)} texts the same ids"


def model_card(config: RunConfig, metadata: CheckpointMetadata, checkpoint: Path) -> str:
    """``README.md``: what the model is, what it was trained on and for how long, and how it was measured."""
    licenses, datasets = _data(metadata)
    trained_by = metadata.versions.get("megatron_most", __version__)
    return "\n".join(
        [
            _CARD_HEAD.format(trained_by=trained_by, exported_by=__version__),
            *_model_tables(config, metadata),
            "",
            "## Training",
            "",
            f"{metadata.step} steps, {metadata.consumed_tokens} tokens.",
            "",
            *(_table(("dataset", "task", "documents", "licenses"), datasets) or ["The checkpoint names no datasets."]),
            "",
            f"Licenses of the data: {', '.join(licenses) or 'unknown'}. Read them before you publish this model.",
            "",
            "## Evaluation",
            "",
            *(
                _table(("suite", "set", "WER", "utterances", "normalizer"), _evaluation(checkpoint))
                or ["None recorded."]
            ),
            "",
        ]
    )


def _model_tables(config: RunConfig, metadata: CheckpointMetadata) -> list[str]:
    model, vocab, moe = config.model, config.vocab, config.model.moe
    codec = metadata.codec.name if metadata.codec else "unknown"
    facts: list[tuple[Any, ...]] = [
        ("layers", f"{model.num_layers}, of which {model.first_k_dense_replace} dense"),
        ("width", model.hidden_size),
        ("attention", model.attention.type),
        ("positions", config.data.seq_length),
        ("text ids", vocab.text_vocab_size),
        ("codec", f"{codec}, {vocab.num_codebooks} codebooks of {vocab.codebook_size}, layout `{vocab.layout}`"),
        ("experts", f"{moe.num_experts} of width {moe.moe_ffn_hidden_size}"),
        ("shared experts", f"width {moe.moe_shared_expert_intermediate_size}"),
        ("router", f"{moe.moe_router_score_function} scores, score rule `{moe.score_rule}`"),
    ]
    groups: list[tuple[Any, ...]] = [
        (group.modality, len(choice), group.moe_router_topk)
        for group, choice in zip(moe.groups, ExpertGroups.from_config(moe).choices, strict=True)
    ]
    return [*_table(("", "value"), facts), "", *_table(("modality", "experts to choose from", "top-k"), groups)]


def _data(metadata: CheckpointMetadata) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Licenses, the most frequent first, and a row for each training dataset."""
    totals: Counter[str] = Counter()
    rows: list[tuple[Any, ...]] = []
    for dataset in metadata.datasets:
        name = Path(dataset.name).name
        try:
            sidecar = with_current_keys(read_sidecar(f"{dataset.name}.json", name))
        except DataError:
            rows.append((name, "?", "?", "unknown: its description is gone"))
            continue
        provenance = sidecar["provenance"]
        found: Counter[str] = Counter()
        for counts in provenance.get("licenses", {}).values():
            found.update(counts or {"unknown": 1})
        totals += found
        documents = provenance.get("counts", {}).get("documents", "?")
        rows.append((name, sidecar.get("task", "?"), documents, ", ".join(sorted(found)) or "unknown"))
    return [name for name, _ in totals.most_common()], rows


def _evaluation(checkpoint: Path) -> list[tuple[Any, ...]]:
    """Results of ``most evaluate`` in the run's ``evaluation`` folder."""
    folders = (parent / "evaluation" for parent in list(checkpoint.resolve().parents)[:2])
    paths: Iterable[Path] = next((sorted(folder.glob("*.json")) for folder in folders if folder.is_dir()), [])
    rows: list[tuple[Any, ...]] = []
    for path in paths:
        result = read_json(path, CheckpointError)
        if {"suite", "set", "wer", "num_utterances", "normalizer"} <= result.keys():
            wer = f"{result['wer']:.2%}"
            rows.append((result["suite"], result["set"], wer, result["num_utterances"], result["normalizer"]))
    return rows


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    if not rows:
        return []
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
