"""The GPU suite runs with the CPU in the GPU's place: all of it but kernels, so that a GPU's minutes go to the GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
KERNELS = {"test_transformer_engine.py": "Transformer Engine", "test_generation.py": "CUDA graphs"}
BARE = ("-p", "pytest_timeout", "-p", "tests.gpu.results", "-p", "no:cacheprovider")  # as run_on_bare_machine.sh has it


def run_suite(name: str) -> tuple[int, dict[str, int], str]:
    """Exit status, number of tests of each outcome, and what was printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *BARE, "-p", "tests.gpu.pretend", "-m", "gpu", "-q", "-rs"]
    done = subprocess.run(
        [*command, f"tests/gpu/{name}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    return done.returncode, counts, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in SUITE if name not in KERNELS])
def test_its_side_of_the_cpu_works(name):
    status, counts, printed = run_suite(name)
    assert status == 0, printed
    assert counts.get("passed", 0) > 0 and not counts.keys() & {"failed", "error"}
    reasons = re.findall(r"^SKIPPED .*: (.*)$", printed, re.MULTILINE)
    assert all(reason.startswith("the CPU in the GPU's place has no ") for reason in reasons), reasons


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", KERNELS)
def test_what_needs_a_gpu_for_everything_is_skipped_with_the_reason(name):
    status, counts, printed = run_suite(name)
    assert status == 0 and set(counts) == {"skipped"}, printed
    assert f"has no {KERNELS[name]}" in printed
