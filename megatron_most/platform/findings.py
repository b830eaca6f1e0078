"""What ``most doctor`` finds: one finding, and how a package becomes one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

State = Literal["present", "missing", "unfit"]

SUPPORTED = {"Python": ">=3.12", "torch": ">=2.10", "megatron-core": ">=0.19.2,<0.20", "nemo_toolkit": "==3.0.0"}
"""Versions that this project works with, as in pyproject.toml."""
TESTED = {"Python": ("3.12", "3.13"), "torch": ("2.11", "2.13")}
"""Minor versions that the tests ran with."""
_IMPORT_SECONDS = 180


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Args:
        section: heading that it is listed under.
        name: what was examined.
        state: ``unfit`` is installed, but of no use as it is.
        value: version, size or name; if it is unfit, the reason.
        required: whether training on a CPU needs it.
        gives: what it is good for; shown if it is not present.
        remedy: how to get it; shown if it is not present.
    """

    section: str
    name: str
    state: State
    value: str
    required: bool = False
    gives: str = ""
    remedy: str = ""


def package(
    section: str,
    name: str,
    gives: str,
    required: bool = False,
    extra: str | None = None,
    remedy: str | None = None,
) -> Finding:
    """A package, judged by its metadata."""
    wanted = f"pip install -c constraints.txt '.[{extra}]'" if extra else f"pip install -c constraints.txt {name}"
    version = version_of(name)
    if version is None:
        return Finding(section, name, "missing", "not installed", required, gives, remedy or wanted)
    return version_finding(section, name, version, gives, required, remedy or wanted)


def version_finding(
    section: str, name: str, version: str, gives: str, required: bool, remedy: str, note: str = ""
) -> Finding:
    """Present if :data:`SUPPORTED` allows ``version``; the finding says so if the tests ran with other versions."""
    shown = f"{version} ({note})" if note else version
    wanted = SUPPORTED.get(name, "")
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding(section, name, "unfit", f"{shown}, {wanted} is needed", required, gives, remedy)
    minor = ".".join(map(str, Version(version).release[:2])) if name in TESTED else ""
    if minor and minor not in TESTED[name]:
        shown += f", the tests ran with {' and '.join(TESTED[name])}"
    return Finding(section, name, "present", shown, required)


def compiled(section: str, name: str, statement: str, gives: str, remedy: str) -> Finding:
    """A package compiled for one build of torch: metadata do not say whether it works with this one, an import does.

    It runs in a process of its own, because a library built for another torch can crash it.
    """
    version = version_of(name)
    if version is None:
        return Finding(section, name, "missing", "not installed", gives=gives, remedy=remedy)
    try:
        command = [sys.executable, "-c", f"import torch; {statement}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        why = f"its import takes more than {_IMPORT_SECONDS} s"
    else:
        if done.returncode == 0:
            return Finding(section, name, "present", version)
        why = (done.stderr.strip().splitlines() or [f"its import ends with status {done.returncode}"])[-1]
    value = f"{version} does not work with torch {torch.__version__}: {why}"
    return Finding(section, name, "unfit", value, gives=gives, remedy=remedy)


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
