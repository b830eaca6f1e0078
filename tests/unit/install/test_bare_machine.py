"""tests/gpu/run_on_bare_machine.sh: whatever a step does, it ends in time and leaves a report, results and logs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from tests.unit.install.requirements import ROOT
from tests.unit.install.stand_in_distributions import write_distribution

FILES = ("tests/gpu/run_on_bare_machine.sh", "tests/gpu/results.py", "pyproject.toml")
SUITES = {
    "test_fine.py": """
        import pytest, carried

        def test_passes(): assert carried.ANSWER == 42
        def test_fails(): assert carried.ANSWER == 41, "not forty-one"
        @pytest.mark.skip(reason="no such hardware")
        def test_is_skipped(): pass
        """,
    "test_hangs.py": """
        import signal, time

        def test_passes(): pass
        def test_hangs():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})  # as a call into a driver can
            time.sleep(600)
        def test_comes_after(): pass
        """,
    "test_dies.py": """
        import os, signal

        def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)
        """,
    "test_transformer_engine.py": """
        def test_of_the_engine():
            import carried_engine
        """,
}
BENCHES = {
    "gpu_layer": "print('| layer |')",
    "experts": "import time; time.sleep(600)",
    "router": "raise SystemExit(3)",
    "decode": "print('| token |')",
}
MARK = """
import pytest
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.gpu)
"""


def make_wheel(folder: Path, name: str, module: str, text: str) -> None:
    content = folder / f"content-{name}"
    write_distribution(content, name, "1.0", {f"{module}.py": text})
    information = content / f"{name}-1.0.dist-info"
    (information / "INSTALLER").unlink()
    (information / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path in sorted(content.rglob("*")):
            if path.is_file():
                wheel.write(path, path.relative_to(content))
    shutil.rmtree(content)


@pytest.fixture
def clone(tmp_path):
    """The script in a clone whose suite and benches are short, hang or die; and wheels that they need."""
    clone = tmp_path / "clone"
    for name in FILES:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    (clone / "tests/gpu/conftest.py").write_text(MARK)
    for name, text in SUITES.items():
        lines = [line.removeprefix("        ") for line in text.splitlines()]
        (clone / "tests/gpu" / name).write_text("\n".join(lines))
    (clone / "tools/bench").mkdir(parents=True)
    (clone / "tools/doctor.py").write_text("raise SystemExit('jiwer: not installed')")
    for name, text in BENCHES.items():
        (clone / f"tools/bench/{name}.py").write_text(text)
    (tmp_path / "wheels/te").mkdir(parents=True)
    make_wheel(tmp_path / "wheels", "carried", "carried", "ANSWER = 42")
    no_gpu = "class cuda:\n    is_available = staticmethod(lambda: False)\nclass version:\n    cuda = None\n"
    make_wheel(tmp_path / "wheels", "torch", "torch", f"__version__ = '2.11'\n{no_gpu}")
    make_wheel(tmp_path / "wheels/te", "carried_engine", "carried_engine", "")
    return clone


def start(clone: Path, budget: int, *, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [clone / "tests/gpu/run_on_bare_machine.sh", clone.parent / "wheels", clone.parent / "out"]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    settings = {"PYTHON": sys.executable, "BUDGET": str(budget), "TMPDIR": str(clone.parent), **(environment or {})}
    return subprocess.Popen(
        command, env={**kept, **settings}, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcomes(out: Path) -> tuple[dict[str, str], dict[str, int]]:
    results = json.loads((out / "results.json").read_text())
    tests = {f"{test['suite']}::{test['test'].split('::')[-1]}": test["outcome"] for test in results["tests"]}
    return tests, {step["step"]: step["status"] for step in results["steps"]}


def test_steps_that_fail_or_die_cost_their_own_results_alone(clone):
    (clone / "tests/gpu/test_hangs.py").unlink()
    (clone / "tools/bench/experts.py").write_text("print('--experts 8' in ' '.join(__import__('sys').argv))")
    process = start(clone, budget=400, environment={"EXPERTS_ARGS": "--experts 8 --calls 2"})
    output, errors = process.communicate(timeout=110)
    assert process.returncode == 1, errors
    out = clone.parent / "out"
    tests, steps = outcomes(out)
    assert tests == {
        "test_dies::test_dies": "stopped",
        "test_fine::test_passes": "passed",
        "test_fine::test_fails": "failed",
        "test_fine::test_is_skipped": "skipped",
        "test_transformer_engine::test_of_the_engine": "passed",
    }
    assert steps == {
        **dict.fromkeys(
            ("install", "machine", "engine", "test_transformer_engine", "gpu_layer", "experts", "decode"), 0
        ),
        **{"gpu_layer_engine": 0, "test_fine": 1, "test_dies": 139, "doctor": 1, "router": 3},
    }
    results = json.loads((out / "results.json").read_text())
    why = {test["test"].split("::")[-1]: test.get("why") for test in results["tests"]}
    assert why["test_fails"].startswith("AssertionError: not forty-one")
    assert why["test_is_skipped"] == "no such hardware"
    report = (out / "report.txt").read_text()
    assert "    | layer |" in report and "    True" in report and "jiwer: not installed" in report
    assert report.splitlines()[-1].endswith("some steps did not end well; see results.json")
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {"./test_fine.log", "./router.log", "./steps.tsv"} <= set(logs.getnames())
    assert not [path for path in clone.parent.glob("tmp.*")], "its folder of temporary files is gone"


@pytest.mark.slow
def test_steps_that_hang_are_stopped_and_the_run_ends_within_its_budget(clone):
    began = time.monotonic()
    process = start(clone, budget=60)
    process.communicate(timeout=100)
    assert time.monotonic() - began < 60 + 10, "past the budget, and the 5 s that a killed step may take"
    assert process.returncode == 1
    tests, steps = outcomes(clone.parent / "out")
    assert {name: outcome for name, outcome in tests.items() if name.startswith("test_hangs")} == {
        "test_hangs::test_passes": "passed",
        "test_hangs::test_hangs": "stopped",
        "test_hangs::test_comes_after": "not run",
    }
    assert tests["test_fine::test_passes"] == "passed"
    assert steps["test_hangs"] in (124, 137) and steps["experts"] == 124
    assert "experts: stopped after" in (clone.parent / "out/report.txt").read_text()


def test_a_step_for_which_no_time_is_left_is_not_begun(clone):
    process = start(clone, budget=0)
    process.communicate(timeout=60)
    assert process.returncode == 2
    assert "install: not begun, no time is left" in (clone.parent / "out/report.txt").read_text()


@pytest.mark.slow
def test_an_interrupted_run_leaves_what_it_knows_and_no_process(clone):
    process = start(clone, budget=300)
    out = clone.parent / "out"
    deadline = time.monotonic() + 40
    while (
        not list(clone.parent.glob("tmp.*/logs/test_hangs.jsonl"))
        or "test_dies: status" not in (out / "report.txt").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 1
    tests, _ = outcomes(out)
    assert tests["test_dies::test_dies"] == "stopped"
    assert "interrupted" in (out / "report.txt").read_text()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(clone.parent).encode() in command]


@pytest.mark.parametrize(
    ("wheels", "words"), [("absent", "absent: no such folder of wheels"), ("clone", "holds no wheels; make wheelhouse")]
)
def test_a_run_without_wheels_is_refused(clone, wheels, words):
    script = clone / "tests/gpu/run_on_bare_machine.sh"
    done = subprocess.run([script, clone.parent / wheels, clone.parent / "out"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_budget_is_a_number(clone):
    process = start(clone, budget=60, environment={"BUDGET": "9m"})
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (2, "error: BUDGET=9m: must be a number of seconds\n")


def test_wheels_that_cannot_be_installed_end_the_run_with_pips_words(clone):
    (clone.parent / "wheels/broken-1.0-py3-none-any.whl").write_text("no archive")
    process = start(clone, budget=60)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "broken-1.0-py3-none-any.whl" in errors
    assert outcomes(clone.parent / "out")[1].keys() == {"install"}
