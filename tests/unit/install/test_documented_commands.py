"""The commands of docs/install.md replace no torch, Transformer Engine or Apex that is there: pip's dry runs say so."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.pages import ROOT, code_blocks
from tests.unit.install.stand_in_distributions import write_distribution

DOCUMENT = ROOT / "docs" / "install.md"
THERE = {
    "torch": "2.11.0a0+a6c236b9fd.nv26.3.46836102",  # as NVIDIA's container 26.03 has it
    "triton": "3.6.0+git5d72932fc5.nv26.3",
    "transformer_engine": "2.4.0+4220403e",  # and not the version that would be installed
    "apex": "0.1",
    "numpy": "2.1.0",
}
COMPILED = re.compile(r"torch|torchvision|torchaudio|triton|transformer-engine.*|apex|nvidia-.*")
NO_INDEX = " --no-index --find-links wheelhouse"


def documented_commands() -> list[str]:
    """Every line of a code block that installs something, but what compiles Apex from its own repository."""
    lines = [line for block in code_blocks(DOCUMENT) if not block.language for line in block.text.splitlines()]
    return [line for line in lines if re.search(r"\bpip install\b|install_missing\.py", line) and "apex" not in line]


def test_the_document_has_the_commands():
    commands = documented_commands()
    assert len(commands) >= 6
    assert sum("install_missing.py" in command for command in commands) == 2
    assert not [command for command in commands if re.search(r"--upgrade|-U\b|--force-reinstall|torch==", command)]
    named = re.findall(r"docker/[\w.-]+\.txt|tools/\w+\.py|constraints\.txt", " ".join(commands))
    assert named and all((ROOT / name).exists() for name in named)


@pytest.fixture(scope="module")
def container(tmp_path_factory) -> dict[str, str]:
    """The environment variables of a Python that has what :data:`THERE` names, pip and setuptools, and nothing else."""
    root = tmp_path_factory.mktemp("container")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "python"], check=True)
    site = next((root / "python").glob("lib/python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if re.match(r"(pip|setuptools)(-|$)|_distutils_hack", path.name):
            (site / path.name).symlink_to(path)
    for name, version in THERE.items():
        write_distribution(site, name, version)
    pip = root / "python/bin/pip"
    pip.write_text('#!/bin/bash\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "constraints.txt",
        "megatron_most/__init__.py",
        "tools/install_missing.py",
    ):
        (root / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / "clone" / name)
    shutil.copytree(ROOT / "docker", root / "clone" / "docker")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**environment, "PATH": f"{root}/python/bin:{environment['PATH']}", "CLONE": str(root / "clone")}


@pytest.fixture(scope="module")
def index(container) -> None:
    """Skips where pip reaches no package index."""
    probe = "pip --retries 0 --timeout 15 install --dry-run --no-deps --quiet iniconfig"
    done = subprocess.run(["bash", "-c", probe], env=container, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_replaces_nothing_that_is_compiled(command, container, index, tmp_path):
    report = tmp_path / "report.json"
    dry = f"{command.partition(' #')[0].replace(NO_INDEX, '')} --dry-run --report {report}"
    done = subprocess.run(["bash", "-c", dry], cwd=container["CLONE"], env=container, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    chosen = {canonicalize_name(found["metadata"]["name"]) for found in json.loads(report.read_text())["install"]}
    assert not {name for name in chosen if COMPILED.fullmatch(name)}
    if "install_missing" in command:
        assert "megatron-core" in chosen and "numpy" not in chosen
    elif "-e" in command.split():
        assert "megatron-most" in chosen
