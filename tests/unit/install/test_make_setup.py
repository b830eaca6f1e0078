"""make setup: which interpreter it takes, the installations it starts, and what it says where it cannot."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = "awk bash cat cp cut df du grep make mkdir rm sed sleep sort tail touch"

PYTHON = """#!/bin/bash
# A Python of version {version}, as far as make setup looks.
case "$*" in
    -V) echo "Python {version}" ;;
    "-m venv --clear"*) mkdir -p "$4/bin" && cp --remove-destination "$0" "$4/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "$*" >>"$INSTALLED"; {install} ;;
    "-c import sys; sys.exit"*) exit {is_old} ;;
    -c*) {probe} ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
SHIM = """#!/bin/bash
echo "pyenv: ${0##*/}: command not found" >&2
exit 127
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with nothing but ``bin`` on PATH, an empty home and the files make setup reads; runs commands in it."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    for folder in ("bin", "home", "clone/tools"):
        (tmp_path / folder).mkdir(parents=True)
    for tool in TOOLS.split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/find_python.sh"):
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    return Machine(tmp_path)


class Machine:
    def __init__(self, root: Path) -> None:
        self.root, self.clone = root, root / "clone"
        self.environment = {
            "PATH": str(root / "bin"),
            "HOME": str(root / "home"),
            "INSTALLED": str(root / "installed"),
            "LC_ALL": "C",
        }

    def add(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def add_python(self, path: str, version: str, install: str = "true", fault: str = "") -> Path:
        minor = int(version.split(".")[1])
        probe = f"echo -n {version}"
        if minor < 12:
            fault = f"it is Python {version}, 3.12 or newer is needed"
        if fault:
            probe = f'echo "{fault}" >&2; exit 1'
        return self.add(path, PYTHON.format(version=version, install=install, probe=probe, is_old=int(minor < 12)))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.clone, env=self.environment, capture_output=True, text=True, timeout=60)

    def find(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("tools/find_python.sh", *arguments)

    def installed(self) -> list[str]:
        file = self.root / "installed"
        return file.read_text().splitlines() if file.exists() else []


def test_the_first_on_the_path_is_taken_and_named(machine):
    python = machine.add_python("bin/python3.12", "3.12.4")
    machine.add_python("bin/python3.13", "3.13.1")
    found = machine.find()
    assert (found.returncode, found.stdout.strip()) == (0, str(python))
    assert found.stderr == "setup: Python 3.12.4: python3.12\n"


def test_what_does_not_run_or_fit_is_passed_over_with_its_own_words(machine):
    machine.add("bin/python3.12", SHIM)
    machine.add_python("bin/python3.13", "3.13.1", fault="it cannot make environments (No module named 'ensurepip')")
    machine.add_python("bin/python3", "3.11.7")
    python = machine.add_python("home/.pyenv/versions/3.12.1/bin/python3.12", "3.12.1")
    found = machine.find()
    assert (found.returncode, found.stdout.strip()) == (0, str(python))
    assert found.stderr.splitlines() == [
        "setup: not python3.12: pyenv: python3.12: command not found",
        "setup: not python3.13: it cannot make environments (No module named 'ensurepip')",
        "setup: not python3: it is Python 3.11.7, 3.12 or newer is needed",
        f"setup: Python 3.12.1: {python}",
    ]


def test_a_newer_python3_will_do(machine):
    python = machine.add_python("bin/python3", "3.13.0")
    assert machine.find().stdout.strip() == str(python)


def test_the_newest_of_pyenvs_versions_is_taken_wherever_pyenv_keeps_them(machine):
    for version in ("3.11.7", "3.12.1", "3.12.10", "3.12.9", "3.13.0"):
        machine.add_python(f"elsewhere/versions/{version}/bin/python{version.rpartition('.')[0]}", version)
    machine.add("bin/pyenv", f"#!/bin/bash\necho {machine.root}/elsewhere\n")
    assert machine.find().stdout.strip() == f"{machine.root}/elsewhere/versions/3.12.10/bin/python3.12"


def test_uv_is_asked_last(machine):
    python = machine.add_python("home/uv/python3.13", "3.13.2")
    machine.add("bin/uv", f'#!/bin/bash\n[ "$1 $2" = "python find" ] && echo {python}\n')
    assert machine.find().stdout.strip() == str(python)


def test_where_there_is_none_one_message_says_how_to_get_one(machine):
    machine.add("bin/uv", "#!/bin/bash\nexit 2\n")
    found = machine.find()
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.count("error:") == 1
    for way in ("uv python install 3.12", "pyenv install 3.12", "apt install python3.12 python3.12-venv"):
        assert way in found.stderr


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("python3.12", "pyenv: python3.12: command not found"),
        ("python3", "it is Python 3.10.2, 3.12 or newer is needed"),
        ("silent", "it ends with status 3 and says nothing"),
        ("/nowhere/python3", "not found"),
    ],
)
def test_a_python_that_is_asked_for_and_does_not_fit_is_refused(machine, python, words):
    machine.add("bin/python3.12", SHIM)
    machine.add_python("bin/python3", "3.10.2")
    machine.add("bin/silent", "#!/bin/bash\nexit 3\n")
    machine.add_python("bin/python3.13", "3.13.0")  # which is not taken in its place
    found = machine.run("make", "setup", f"PYTHON={python}")
    assert found.returncode != 0
    assert f"error: PYTHON={python}: {words}" in found.stderr
    assert machine.installed() == []


def test_setup_installs_torch_first_then_the_rest_and_says_what_it_took(machine):
    machine.add_python("bin/python3.12", "3.12.4")
    done = machine.run("make", "setup")
    assert done.returncode == 0, done.stderr
    torch, rest = machine.installed()
    assert torch.split()[-1].startswith("torch==") and "--no-compile" in torch and "-index" not in torch
    assert rest.endswith("-c constraints.txt -e .[audio,quickstart,dev]") and "--no-compile" in rest
    assert "2.8 GB to download" in done.stdout and ".venv has" in done.stdout and "setup: done in" in done.stdout
    again = machine.run("make", "setup")
    assert again.returncode == 0 and len(machine.installed()) == 2


@pytest.mark.parametrize("index", ["https://download.pytorch.org/whl/cpu", "https://index.example/cpu"])
def test_torch_for_cpus_comes_from_the_index_that_is_named(machine, index):
    machine.add_python("bin/python3.12", "3.12.4")
    done = machine.run("make", "setup", "TORCH=cpu", *([] if "pytorch" in index else [f"TORCH_INDEX={index}"]))
    assert done.returncode == 0, done.stderr
    torch, rest = machine.installed()
    assert f"--index-url {index} torch==" in torch
    assert "-index" not in rest


def test_another_word_for_torch_is_refused(machine):
    done = machine.run("make", "setup", "TORCH=gpu")
    assert done.returncode != 0 and "TORCH=gpu: pypi or cpu" in done.stderr


def test_a_failed_installation_shows_the_end_of_its_log_and_is_started_again(machine):
    machine.add_python("bin/python3.12", "3.12.4", install='echo "no space left"; exit 1')
    done = machine.run("make", "setup")
    assert done.returncode != 0
    assert "error: installing torch" in done.stderr and "no space left" in done.stderr
    assert len(machine.installed()) == 1
    machine.run("make", "setup")
    assert len(machine.installed()) == 2


@pytest.mark.parametrize("state", ["interpreter gone", "too old", "another is asked for"])
def test_an_environment_that_will_not_do_is_made_anew(machine, state):
    python = machine.add_python("bin/python3.12", "3.12.4")
    old = machine.clone / ".venv" / "bin" / "python"
    machine.add_python("clone/.venv/bin/python", "3.11.7" if state == "too old" else "3.13.0")
    if state == "interpreter gone":
        old.unlink()
        old.symlink_to("/nowhere/python")
    done = machine.run("make", "setup", *([f"PYTHON={python}"] if "asked" in state else []))
    assert done.returncode == 0, done.stderr
    assert "3.12.4" in old.read_text()


def test_an_environment_that_will_do_is_kept(machine):
    machine.add_python("bin/python3.12", "3.12.4")
    kept = machine.add_python("clone/.venv/bin/python", "3.13.0")
    assert machine.run("make", "setup").returncode == 0
    assert "3.13.0" in kept.read_text()


def test_a_real_python_is_taken():
    """The one that runs the tests: what the stand-ins above are asked is what an interpreter can answer."""
    command = [ROOT / "tools" / "find_python.sh", sys.executable]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == sys.executable
    assert found.stderr.startswith(f"setup: Python {platform.python_version()}: ")
