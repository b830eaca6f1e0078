"""What this machine can run: an examination of hardware, packages and space, and what is chosen for it.

Packages are judged by their metadata; one that is there but broken is found when it is used.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_most.platform.choices import part_choices

MEGATRON_VERSION = "0.19.2"
NEMO_VERSION = "3.0.0"
MINIMUM_TORCH = (2, 9)
_GIB = 2**30
_COMFORTABLE_MEMORY_GIB = 6
_COMFORTABLE_DISK_GIB = 5
_GPU_PARTS = "an FP8-capable NVIDIA GPU and pip install -c constraints.txt '.[gpu]'"

_REQUIRED_PACKAGES = {
    "omegaconf": "configuration",
    "pyyaml": "configuration",
    "numpy": "arrays",
    "psutil": "checkpoints: without it Megatron's writer hangs",
    "sentencepiece": "text tokenizers",
    "tokenizers": "text tokenizers",
    "soundfile": "reading and writing audio",
    "soxr": "resampling",
    "tensorboard": "logging.tensorboard, which is on by default",
    "tqdm": "progress lines",
    "jiwer": "word error rates",
    "jinja2": "the report",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        section: heading it is listed under.
        name: what it is.
        state: ``present``; ``missing``; ``unfit``: there, but not as it has to be.
        value: version, size or name; for what is not right, what is wrong with it.
        required: whether training on a CPU needs it.
        gives: what one has with it; said of what is not present.
        remedy: how to get it; said of what is not present.
    """

    section: str
    name: str
    state: Literal["present", "missing", "unfit"]
    value: str
    required: bool = False
    gives: str = ""
    remedy: str = ""


def examine(run_dir: Path) -> list[Finding]:
    """Look at everything; ``run_dir`` (it need not exist) is where space is measured."""
    return [*_foundations(), *_accelerators(), *_parts(), *_speech_and_tracking(), *_machine(run_dir)]


def can_train(findings: list[Finding]) -> bool:
    """Whether everything is there that training on a CPU needs."""
    return all(finding.state == "present" for finding in findings if finding.required)


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    return {"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings]}


def as_text(findings: list[Finding]) -> str:
    """A table for people: a line for what is there, two for what is not."""
    marks = {"present": "ok", "missing": "--", "unfit": "!!"}
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        lines.append(f"  {marks[finding.state]}  {finding.name:<{width}}  {finding.value}")
        if finding.state != "present":
            lines.append(f"      {'':<{width}}  gives: {finding.gives}; get it: {finding.remedy}")
    problems = [finding.name for finding in findings if finding.required and finding.state != "present"]
    verdict = f"cannot train: {', '.join(problems)}" if problems else "can train on this machine"
    where = "on CUDA with NCCL" if torch.cuda.is_available() else "on the CPU with gloo"
    return "\n".join([*lines[1:], "", verdict if problems else f"{verdict}, {where}"])


def _foundations() -> list[Finding]:
    section = "Needed to train"
    python = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info[:2] >= (3, 12)
    findings = [
        Finding(
            section,
            "Python",
            "present" if fits else "unfit",
            python,
            True,
            gives=f"megatron-core {MEGATRON_VERSION}, which needs 3.12",
            remedy="make setup PYTHON=/path/to/python3.11",
        ),
        _torch(section),
        _gloo(section),
        _package(section, "megatron-core", "the model, parallelism and checkpoints", True, MEGATRON_VERSION),
    ]
    findings += [_package(section, name, gives, required=True) for name, gives in _REQUIRED_PACKAGES.items()]
    return findings


def _torch(section: str) -> Finding:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding(
        section,
        "torch",
        "present" if release >= MINIMUM_TORCH else "unfit",
        f"{torch.__version__} ({build})",
        True,
        gives="everything",
        remedy="pip install -c constraints.txt torch",
    )


def _gloo(section: str) -> Finding:
    there = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return Finding(
        section,
        "gloo",
        "present" if there else "missing",
        "in this torch" if there else "not in this torch",
        True,
        gives="ranks that talk to each other on CPUs",
        remedy="a torch build with distributed support",
    )


def _accelerators() -> list[Finding]:
    section = "Acceleration"
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    names = [torch.cuda.get_device_name(index) for index in devices]
    capabilities = [torch.cuda.get_device_capability(index) for index in devices]
    lowest = min(capabilities, default=(0, 0))
    nccl = bool(names) and torch.distributed.is_available() and torch.distributed.is_nccl_available()

    def found(name: str, there: bool, value: str, gives: str, remedy: str) -> Finding:
        return Finding(section, name, "present" if there else "missing", value, gives=gives, remedy=remedy)

    shown = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    capability = f"compute capability {lowest[0]}.{lowest[1]}" if names else "no CUDA device"
    return [
        found(
            "CUDA",
            bool(names),
            shown or "no device",
            gives="training at more than toy size",
            remedy="an NVIDIA GPU, its driver and a CUDA build of torch",
        ),
        found(
            "bf16",
            lowest >= (8, 0),
            capability,
            gives="half the memory traffic, tensor cores",
            remedy="a GPU of compute capability 8.0 or higher",
        ),
        found(
            "FP8",
            lowest >= (8, 9),
            capability,
            gives="faster matrix products of large experts",
            remedy="a GPU of compute capability 8.9 or higher",
        ),
        found(
            "NCCL",
            nccl,
            "in this torch" if nccl else "no CUDA device",
            gives="ranks that talk to each other on GPUs",
            remedy="a CUDA build of torch and a GPU",
        ),
        _package(section, "transformer-engine", "fused kernels and FP8 on GPUs", extra="gpu"),
        _package(section, "apex", "Megatron's fused optimizer kernels on GPUs", remedy="build it from NVIDIA's source"),
        _package(section, "emerging-optimizers", "optimizer.optimizer=muon", extra="muon"),
    ]


def _parts() -> list[Finding]:
    """Who computes what where the configuration says ``auto``; nothing before Megatron is installed."""
    if _version("megatron-core") is None:
        return []
    section = "Chosen here (where the configuration says auto)"
    return [
        Finding(
            section,
            choice.part,
            "missing" if choice.loses else "present",
            f"{choice.chosen} ({choice.reason})",
            gives=choice.loses,
            remedy=_GPU_PARTS,
        )
        for choice in part_choices()
    ]


def _speech_and_tracking() -> list[Finding]:
    section = "Speech and tracking"
    findings = [
        _package(
            section, "nemo_toolkit", "NeMo codecs: tokenizing audio, speaking", expected=NEMO_VERSION, extra="audio"
        ),
        _package(section, "pocketsphinx", "an independent recogniser that judges speech", extra="quickstart"),
        _package(section, "espeakng-loader", "the synthetic speech of the quickstart", extra="quickstart"),
        _package(section, "wandb", "logging.wandb_project", remedy="pip install wandb"),
    ]
    if importlib.util.find_spec("torchaudio"):
        findings.append(
            Finding(
                section,
                "torchaudio",
                "unfit",
                f"{_version('torchaudio')}: nothing here uses it, and NeMo tries to",
                gives="a NeMo import that fails when its build does not match torch's",
                remedy="pip uninstall torchaudio",
            )
        )
    return findings


def _machine(run_dir: Path) -> list[Finding]:
    section = "Machine"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    parent = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    disk = shutil.disk_usage(parent).free / _GIB

    def enough(name: str, there: float, wanted: float, gives: str, remedy: str) -> Finding:
        state = "present" if there >= wanted else "unfit"
        value = f"{there:.1f} GiB" if state == "present" else f"{there:.1f} GiB, {wanted} GiB are comfortable"
        return Finding(section, name, state, value, gives=gives, remedy=remedy)

    return [
        Finding(section, "system", "present", f"{platform.system()} {platform.machine()}"),
        Finding(section, "CPU cores", "present", str(cores)),
        enough("memory", memory, _COMFORTABLE_MEMORY_GIB, "the quickstart's two ranks", "a larger machine"),
        enough(
            f"free in {run_dir}", disk, _COMFORTABLE_DISK_GIB, "checkpoints and data", "clear space or move run_dir"
        ),
    ]


def _package(
    section: str,
    name: str,
    gives: str,
    required: bool = False,
    expected: str | None = None,
    extra: str | None = None,
    remedy: str | None = None,
) -> Finding:
    """A distribution by its metadata; ``expected`` is the only version that will do."""
    wanted = f"pip install -c constraints.txt '.[{extra}]'" if extra else f"pip install -c constraints.txt {name}"
    version = _version(name)
    if version is None:
        return Finding(section, name, "missing", "not installed", required, gives, remedy or wanted)
    if expected not in (None, version):
        return Finding(section, name, "unfit", f"{version}, {expected} is needed", required, gives, remedy or wanted)
    return Finding(section, name, "present", version, required)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
