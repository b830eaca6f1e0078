"""Lists of packages hold what pyproject.toml leads to, and nothing of torch's; the container files name what exists."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.install.requirements import ROOT, closure, listed, setup_arguments, setup_requirements
from tests.unit.install.stand_in_distributions import write_distribution

TRAINING, AUDIO = "docker/requirements-training.txt", "docker/requirements-audio.txt"
COMPILED = {"torch", "torchvision", "torchaudio", "triton", "transformer-engine", "transformer-engine-torch", "apex"}
CONTAINERS = sorted((ROOT / "docker").glob("*Dockerfile"))


@pytest.fixture(scope="module")
def of_torch() -> set[str]:
    """What torch needs, itself included: what an installed torch has brought."""
    return closure([Requirement("torch")])


def test_the_lists_are_all_that_training_and_the_extras_need_but_torch_and_what_it_needs(of_torch):
    """The first also has what builds the package, for an installation without a network."""
    training, audio = set(listed(TRAINING)), set(listed(AUDIO))
    build = [Requirement(text) for text in setup_arguments()["setup_requires"]]
    assert training == closure([*setup_requirements(), *build]) - of_torch
    assert training | audio == closure([*setup_requirements("all"), *build]) - of_torch
    assert not training & audio


@pytest.mark.parametrize("path", [TRAINING, AUDIO, "tests/gpu/wheels.txt"])
def test_a_list_has_names_alone_and_none_that_is_compiled_for_a_torch(path, of_torch):
    requirements = listed(path)
    assert [str(requirement) for requirement in requirements.values()] == [r.name for r in requirements.values()]
    assert list(requirements) == sorted(requirements)
    forbidden = COMPILED | (of_torch if path != "tests/gpu/wheels.txt" else set())
    assert not forbidden & set(requirements)
    assert not [name for name in requirements if name.startswith(("nvidia-", "cuda-"))]


def test_constraints_hold_every_package_that_setup_installs_but_torchs(of_torch):
    extras = [name for name in setup_arguments()["extras_require"] if name != "gpu"]
    constraints = listed("constraints.txt")
    assert closure(setup_requirements(*extras)) - of_torch <= set(constraints)
    assert not (COMPILED & set(constraints))
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in constraints.values())


def test_constraints_fit_what_setup_asks_for_and_are_what_the_tests_run_with():
    constraints = listed("constraints.txt")
    for requirement in setup_requirements("all"):
        if (held := constraints.get(canonicalize_name(requirement.name))) is not None:
            assert requirement.specifier.contains(str(held.specifier).removeprefix("==")), requirement
    here = {name: metadata.version(name) for name in constraints}
    assert {name: version for name, version in here.items() if not constraints[name].specifier.contains(version)} == {}


BLOCKER = """
import sys
from importlib import metadata
from importlib.machinery import PathFinder
allowed = set(sys.argv.pop(1).split(","))
normal = lambda name: name.lower().replace("_", "-").replace(".", "-")
blocked = {top for top, names in metadata.packages_distributions().items() if not allowed & set(map(normal, names))}
class Filter:  # in the place of the finder that goes through sys.path
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Filter
import tools.bench.decode, tools.bench.experts, tools.bench.gpu_layer, tools.bench.router, pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
def test_the_gpu_suite_and_the_benches_are_imported_with_the_wheels_and_torch_alone(of_torch):
    carried = {canonicalize_name(path.name) for path in (Path(setuptools.__file__).parent / "_vendor").iterdir()}
    allowed = {*listed("tests/gpu/wheels.txt"), *of_torch, *carried, "numpy", "megatron-most"}
    command = [sys.executable, "-c", BLOCKER, ",".join(allowed), "-m", "gpu", "--collect-only", "-q"]
    options = ["-p", "pytest_timeout", "-p", "tests.gpu.results", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) tests collected", done.stdout)[1]) > 40


def test_what_is_missing_is_installed_without_dependencies_and_what_is_there_stays(tmp_path):
    """pip is asked by a stand-in, in an environment that has a numpy of another version and no jiwer."""
    site = tmp_path / "site"
    write_distribution(site, "numpy", "1.0")
    (tmp_path / "list.txt").write_text("# a comment\nnumpy\njiwer  # why\nno_such-package\n")
    (site / "pip").mkdir()
    (site / "pip/__init__.py").write_text("")
    (site / "pip/__main__.py").write_text("import json, sys; print(json.dumps(sys.argv[1:])); sys.exit(7)")
    command = [sys.executable, "-S", ROOT / "tools/install_missing.py", tmp_path / "list.txt", "--find-links", "here"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(site)})
    assert done.returncode == 7, done.stderr
    said, asked = done.stdout.splitlines()
    assert said == "1 of 3 packages are installed and stay; installing 2"
    assert json.loads(asked) == [
        *("install", "--no-build-isolation", "--no-deps", "-c", str(ROOT / "constraints.txt")),
        *("--find-links", "here", "jiwer", "no_such-package"),
    ]


def test_a_list_that_is_not_there_is_said_so(tmp_path):
    command = [sys.executable, ROOT / "tools/install_missing.py", tmp_path / "absent.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "absent.txt: No such file or directory" in done.stderr


def instructions(path: Path) -> list[tuple[str, str]]:
    """Words of a container file: instruction and the rest, lines that go on joined."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_a_container_file_copies_and_runs_what_exists(path):
    """No container is built here: this is what can be checked without."""
    steps = instructions(path)
    assert {name for name, _ in steps} <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN"}
    present = set()  # below the working directory, at that line
    for name, rest in steps:
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                present |= {"*"} if source == "." else {f"{target.removeprefix('./')}{Path(source).name}"}
        if name == "RUN":
            for file in re.findall(r"[\w./-]+\.(?:py|txt|sh)\b", rest):
                assert "*" in present or file in present, f"{file} is used before it is copied"
            for target in re.findall(r"\bmake (\w[\w-]*)", rest.replace("--yes", "")):
                if "apt-get" not in rest:
                    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    assert steps[0][0] in ("ARG", "FROM")
    assert ("COPY", ". .") in steps


def test_the_gpu_container_replaces_nothing():
    runs = [rest for name, rest in instructions(ROOT / "docker/Dockerfile") if name == "RUN"]
    for command in runs:
        if "pip install" in command:
            assert "--no-deps" in command and "--no-build-isolation" in command
        assert not re.search(r"--upgrade|-U\b|--force|uninstall|PIP_CONSTRAINT", command)


def test_files_of_make_setup_are_copied_before_it_runs_in_the_cpu_container():
    steps = instructions(ROOT / "docker/cpu.Dockerfile")
    before = " ".join(rest for _, rest in steps[: next(i for i, step in enumerate(steps) if "make setup" in step[1])])
    recipe = (ROOT / "Makefile").read_text().split("$(STAMP):")[1].split("\n\n")[0]
    needed = {"Makefile", *re.findall(r"pyproject\.toml|constraints\.txt|tools/\w+\.sh", recipe)}
    assert len(needed) == 4 and not [name for name in needed if name not in before]


@pytest.mark.parametrize("wanted", ["gpu-suite", "training", "audio"])
def test_the_wheelhouse_is_collected_from_a_list_that_exists(wanted):
    script = subprocess.run(["make", "-n", "wheelhouse", f"FOR={wanted}"], cwd=ROOT, capture_output=True, text=True)
    lists = re.findall(r"-r (\S+)", script.stdout)
    assert script.returncode == 0 and lists and all((ROOT / path).exists() for path in lists)
    assert "--no-deps" in script.stdout and "-c constraints.txt" in script.stdout
