"""What stands beside the weights of the format ``hf``: code, settings of generation and processor, and a model card."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from megatron_most.checkpointing import read_metadata
from megatron_most.config import RunConfig
from megatron_most.conversion.importing import SPECIAL_IDS
from megatron_most.conversion.model_card import model_card
from megatron_most.data.building.instructions import INSTRUCTIONS
from megatron_most.data.building.special_tokens import ROLE_MARKERS, special_tokens
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.files import read_json, write_json, write_text
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
