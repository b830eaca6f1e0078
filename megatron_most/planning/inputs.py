"""Whether the files exist that a run reads."""

from __future__ import annotations

from pathlib import Path

from megatron_most.checkpointing import complete_checkpoints, find_checkpoint
from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError


def check_files(config: RunConfig) -> None:
    """Look for datasets, tokenizer, codec file, text of retention and, for a new run, ``checkpoint.load``.

    Raises:
        ConfigError: a file is missing.
        CheckpointError: the checkpoint to start from is missing, torn, or of another model.
    """
    missing = [
        f"data.{field}: {entry.path}.json"
        for field in ("train", "validation")
        for entry in getattr(config.data, field)
        if not Path(f"{entry.path}.json").is_file()
    ]
    if config.tokenizer is not None and not Path(config.tokenizer).exists():
        missing.append(f"tokenizer: {config.tokenizer}")
    if config.codec is not None and config.codec.endswith(".nemo") and not Path(config.codec).is_file():
        missing.append(f"codec: {config.codec}")
    text = config.training.retention.data
    if text is not None and not Path(text).is_file():
        missing.append(f"training.retention.data: {text}")
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(f"{missing[0]}: is missing{more}; --no-check-files plans for another machine")
    if config.checkpoint.load is not None and not complete_checkpoints(config.run_dir)[0]:
        find_checkpoint(config.checkpoint.load, config)
