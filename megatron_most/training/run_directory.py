"""The run directory: which run it belongs to, its lock, and its record of configuration and environment."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform as python_platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_most.checkpointing.directory import checkpoints_directory, complete_checkpoints, remove_leftovers
from megatron_most.checkpointing.metadata import TRAINING_ONLY, first_difference, read_metadata, with_new_fields
from megatron_most.config import CONFIG, RunConfig, dump_config, read_yaml, with_new_names
from megatron_most.errors import ConfigError
from megatron_most.files import set_aside, write_json, write_text
from megatron_most.locks import locked

ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ROUTING = "routing.jsonl"
_PACKAGES = ("megatron-most", "megatron-core", "torch", "transformer-engine", "nemo-toolkit", "numpy")
_IDENTITY = ("seed", "vocab", "model", "data", "precision.dtype")
_CHANGEABLE = TRAINING_ONLY | {"data.validation"}


def claim(config: RunConfig, world_size: int, device: str) -> contextlib.ExitStack:
    """Lock the run directory, remove what an interrupted run left behind, and record configuration and environment.

    Returns:
        The lock. It is released when it is closed or the process ends.

    Raises:
        ConfigError: the directory cannot be created, or another process holds it.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        held = lock.enter_context(locked(run_dir / ".lock", wait=False))
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r}: cannot be created: {error.strerror}") from None
    if held is None:
        raise ConfigError(f"run_dir={config.run_dir!r}: another process is training there")
    remove_leftovers(run_dir)
    _make_way(run_dir)
    write_text(run_dir / CONFIG, dump_config(config))
    write_json(run_dir / ENVIRONMENT, environment(world_size, device))
    return lock


def _make_way(run_dir: Path) -> None:
    """Set aside whatever is not a file where the run writes one: it must not keep the run from going on."""
    for path in (run_dir / name for name in (CONFIG, ENVIRONMENT, METRICS, ROUTING)):
        if os.path.lexists(path) and not path.is_file():
            try:
                print(f"warning: {path} is not a file: moved to {set_aside(path)}", flush=True)
            except OSError as error:
                raise ConfigError(f"{path}: is not a file, and cannot be moved: {error.strerror}") from None
    checkpoints = checkpoints_directory(run_dir)
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise ConfigError(f"{checkpoints}: is not a directory; if it is a link, mount what it points to")


def check_same_run(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if ``run_dir`` holds a run with another seed, vocabulary, model, data, or precision.

    Steps, intervals, optimizer, batch size, loss weights, validation sets, logging, and parallel layout may change. A
    directory without a logged step or checkpoint belongs to no run yet. The configuration of the newest checkpoint
    counts, which has a checksum; before the first checkpoint, ``config.yaml``.

    Raises:
        CheckpointError: the newest complete checkpoint is damaged.
    """
    run_dir = Path(config.run_dir)
    path, metrics = run_dir / CONFIG, run_dir / METRICS
    checkpoints, _ = complete_checkpoints(run_dir)
    if checkpoints:
        theirs = with_new_fields(read_metadata(checkpoints[-1]).config)
    elif metrics.is_file() and metrics.stat().st_size and path.is_file():
        theirs = with_new_fields(with_new_names(read_yaml(path)))
    else:
        return
    mine = dataclasses.asdict(config)
    for section in _IDENTITY:
        difference = first_difference(_field(theirs, section), _field(mine, section), section, ignore=_CHANGEABLE)
        if difference:
            field, there, here = difference
            raise ConfigError(
                f"run_dir={config.run_dir!r}: belongs to another run: {field} is {there!r} there, {here!r} in this"
                " config; choose another run_dir"
            )


def _field(config: Any, dotted: str) -> Any:
    """A field of a nested dict by its dotted name, or None."""
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect what a run computes."""
    found = {"python": python_platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(world_size: int, device: str) -> dict[str, Any]:
    return {
        "versions": versions(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "world_size": world_size,
        "device": device,
    }


def device_name(device: torch.device) -> str:
    """The name of the device; for a CPU, with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{python_platform.machine()} CPU, {os.cpu_count()} cores"
