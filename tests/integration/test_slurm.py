"""The SLURM batch files, on a real cluster of two nodes where one can be started; the node check anywhere."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_most.cli import STOPPED
from megatron_most.commands.launch import LAUNCHERS
from tests.integration.launching import ROOT, STEPS, environment, small_run, steps_logged, undisturbed_metrics, wait_for
from tests.integration.slurm_cluster import Cluster
from tests.integration.tiny_run import metric_lines

QUERIES = ("index", "index,ecc.errors.uncorrected.volatile.total", "index,remapped_rows.pending")


def stand_in_for_nvidia_smi(directory: Path, *answers: str) -> str:
    """A folder with an ``nvidia-smi`` that gives these answers to the queries of the node check."""
    cases = "\n".join(
        f"*--query-gpu={query}\\ *) printf '%s\\n' {answer} ;;" for query, answer in zip(QUERIES, answers, strict=True)
    )
    directory.mkdir()
    script = directory / "nvidia-smi"
    script.write_text(f'#!/usr/bin/env bash\ncase "$* " in\n{cases}\nesac\n')
    script.chmod(0o755)
    return str(directory)


ONE_GPU = ("0", "'0, 0'", "'0, No'")


def check_node(folder: str, **settings: str) -> tuple[int, str]:
    known = environment(SLURMD_NODENAME="node7", **settings)
    known["PATH"] = f"{folder}:{known['PATH']}"
    done = subprocess.run([LAUNCHERS / "check_node.sh"], env=known, capture_output=True, text=True)
    return done.returncode, done.stdout.strip()


def test_a_fit_node_says_so(tmp_path: Path) -> None:
    folder = stand_in_for_nvidia_smi(tmp_path / "bin", *ONE_GPU)
    assert check_node(folder, MOST_GPUS_PER_NODE="1") == (0, "node7: fit, 1 GPUs")


def test_everything_unfit_is_named(tmp_path: Path) -> None:
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("1: DOWN\n")
    folder = stand_in_for_nvidia_smi(tmp_path / "bin", "0 1", "'0, 0' '1, 3'", "'0, Yes' '1, No'")
    status, line = check_node(folder, MOST_GPUS_PER_NODE="8", MOST_INFINIBAND=str(tmp_path / "infiniband"))
    assert status == 1
    assert line == (
        "node7: unfit: 2 of 8 GPUs;GPU 1: 3 uncorrected memory errors;GPU 0: memory rows wait for a reset;"
        "InfiniBand port mlx5_0/ports/1/state: 1: DOWN"
    )


SRUN = """#!/usr/bin/env bash
[[ "$*" == *check_node.sh ]] && exit 0
sleep 60 &
trap 'kill $!; %s' TERM
echo started
while :; do wait; done
"""
SAVES, FAILS = 'touch "$MOST_STOPPED_FILE"; exit 143', "exit 1"


@pytest.mark.parametrize(
    ("number", "at_the_signal", "status", "is_requeued"),
    [
        (signal.SIGUSR1, SAVES, STOPPED, True),
        (signal.SIGUSR1, FAILS, 1, False),
        (signal.SIGTERM, SAVES, STOPPED, False),
    ],
    ids=["time is over and all is saved", "time is over and saving fails", "cancelled and saved"],
)
def test_a_job_is_requeued_only_if_its_time_is_over_and_the_run_has_saved(
    number: int, at_the_signal: str, status: int, is_requeued: bool, tmp_path: Path
) -> None:
    """With stand-ins for SLURM's commands. srun's own status is that of a node that was killed after all had saved."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN % at_the_signal), ("scontrol", '#!/bin/sh\necho "scontrol $*"\n')):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    known = environment(
        SLURM_JOB_ID="7", SLURM_JOB_NAME="most", SLURM_JOB_NODELIST="n1", SLURM_JOB_NUM_NODES="1",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )  # fmt: skip
    known["PATH"] = f"{commands}:{known['PATH']}"
    output = tmp_path / "job.out"
    with open(output, "w") as file:
        job = subprocess.Popen(
            ["bash", LAUNCHERS / "pretrain.sbatch", "--config", "x.yaml"], env=known, stdout=file, stderr=file
        )
    wait_for("srun", lambda: "started" in output.read_text())
    job.send_signal(number)
    assert job.wait(20) == status
    text = output.read_text()
    assert ("scontrol requeue 7" in text) == is_requeued
    assert ("error: the run ended with status 1 instead of saving; the job is not requeued" in text) == (status == 1)


def submit(cluster: Cluster, tmp_path: Path, config_file: Path, *answers: str) -> tuple[str, Path]:
    """Number and output of a job of two nodes with one rank each."""
    folder = stand_in_for_nvidia_smi(tmp_path / "bin", *answers)
    output = tmp_path / "job.out"
    job = cluster.run(
        *("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={output}"),
        *(LAUNCHERS / "pretrain.sbatch", "--config", config_file),
        PATH=f"{folder}:{cluster.environment['PATH']}",
        PET_NPROC_PER_NODE="1",
    )
    return job, output


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("event", ["the end of its time", "preemption"])
def test_a_job_that_is_interrupted_goes_back_to_the_queue_and_changes_no_loss(
    event: str, cluster: Cluster, tmp_path: Path
) -> None:
    expected = undisturbed_metrics(tmp_path)
    config = small_run(tmp_path, "disturbed")
    job, output = submit(cluster, tmp_path, tmp_path / "disturbed.yaml", *ONE_GPU)
    try:
        wait_for("ten steps", lambda: steps_logged(config) >= 10)
        if event == "preemption":
            cluster.run("scontrol", "requeue", job)
        else:
            cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_for("the queue", lambda: cluster.state(job) == "PENDING")
        assert 10 <= steps_logged(config) < STEPS
        # SLURM lets a job wait two minutes before it starts it again.
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait_for("the end", lambda: cluster.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 240)
        assert cluster.state(job) == "COMPLETED"
    finally:
        subprocess.run(["scancel", job], env=cluster.environment)
        print(output.read_text())
    text = output.read_text()
    assert "node1: fit, 1 GPUs" in text and "node2: fit, 1 GPUs" in text
    assert "attempt 0" in text and "attempt 1" in text and "resuming from" in text
    assert ("time is nearly over: saving" in text) == (event != "preemption")
    assert metric_lines(config) == expected
    logs = ROOT / "logs" / f"most-{job}"
    ranks = {path.relative_to(logs).parts[:2] for path in logs.rglob("stdout.log")}
    assert ranks == {(f"attempt-{attempt}", node) for attempt in (0, 1) for node in ("node1", "node2")}
    subprocess.run(["rm", "-r", logs], check=True)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_unfit_node_is_named_before_anything_starts(cluster: Cluster, tmp_path: Path) -> None:
    config = small_run(tmp_path, "never")
    job, output = submit(cluster, tmp_path, tmp_path / "never.yaml", "no driver is running", *ONE_GPU[1:])
    wait_for("the end", lambda: cluster.state(job) in ("FAILED", "COMPLETED"), 60)
    assert cluster.state(job) == "FAILED"
    text = output.read_text()
    assert "node1: unfit: 0 of 1 GPUs" in text or "node2: unfit: 0 of 1 GPUs" in text
    assert "submit again with --exclude=NODE" in text
    assert not os.path.exists(config.run_dir)
