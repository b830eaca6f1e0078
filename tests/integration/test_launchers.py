"""The launch scripts: two torchrun agents of which one is lost and replaced; what they hand to torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from megatron_most.checkpointing import read_metadata
from megatron_most.cli import STOPPED
from megatron_most.commands.launch import LAUNCHERS
from tests.distributed.harness import free_port
from tests.integration.launching import ROOT, STEPS, environment, small_run, steps_logged, undisturbed_metrics, wait_for
from tests.integration.tiny_run import metric_lines


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start_agent(name: str, config_file: Path, port: int) -> subprocess.Popen:
    """A "node": one torchrun with one rank, its processes in a session of their own."""
    settings = {
        "PET_NNODES": "2",
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_NPROC_PER_NODE": "1",
        "PET_LOG_DIR": str(config_file.parent / "logs" / name),
    }
    with open(config_file.parent / f"{name}.log", "w") as log:
        return subprocess.Popen(
            [LAUNCHERS / "multi_node.sh", "--config", config_file],
            env=environment(**settings),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill_node(agent: subprocess.Popen) -> None:
    """As a node that loses power: torchrun and its ranks, which have sessions of their own, at once."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for process in [agent.pid, *map(int, children)]:
        os.kill(process, signal.SIGKILL)
    agent.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_node_that_is_lost_and_replaced_changes_no_loss(tmp_path: Path) -> None:
    expected = undisturbed_metrics(tmp_path)
    config = small_run(tmp_path, "disturbed")
    config_file, port = tmp_path / "disturbed.yaml", free_port()
    agents = [start_agent("first", config_file, port)]
    try:
        wait_for("the meeting point", lambda: is_open(port))  # so that it is the first agent's, which lasts
        agents.append(start_agent("lost", config_file, port))
        wait_for("ten steps", lambda: steps_logged(config) >= 10)
        kill_node(agents.pop())
        assert 10 <= steps_logged(config) < STEPS
        agents.append(start_agent("replacement", config_file, port))
        for agent in agents:
            assert agent.wait(240) == 0
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_node(agent)
        print(*(path.read_text() for path in sorted(tmp_path.glob("*.log"))), sep="\n---\n")
    assert "resuming from" in "".join(path.read_text() for path in (tmp_path / "logs").rglob("stdout.log"))
    assert metric_lines(config) == expected


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_signal_saves_the_launcher_says_so_and_the_run_goes_on(tmp_path: Path) -> None:
    """The terminal is gone; the time of a job is nearly over; Ctrl-C, which comes twice; then to the end."""
    expected = undisturbed_metrics(tmp_path)
    config, log = small_run(tmp_path, "disturbed"), tmp_path / "disturbed.log"
    command = [LAUNCHERS / "single_node.sh", "--config", tmp_path / "disturbed.yaml", "checkpoint.save_interval=1000"]

    def start() -> subprocess.Popen:
        settings = environment(PET_NPROC_PER_NODE="2")
        with open(log, "a") as output:
            return subprocess.Popen(command, env=settings, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    try:
        for step, numbers in ((5, ["SIGHUP"]), (15, ["SIGUSR1"]), (25, ["SIGINT", "SIGINT"])):
            run = start()
            wait_for(f"step {step}", lambda step=step: steps_logged(config) >= step)
            for number in numbers:
                run.send_signal(signal.Signals[number])
                time.sleep(0.2)
            assert run.wait(120) == STOPPED
            saved = read_metadata(config.run_dir).step
            assert saved == steps_logged(config) and step <= saved < STEPS
            assert f"stopped by {numbers[0]} after step {saved}, saved; run again to continue" in log.read_text()
        assert start().wait(180) == 0
    finally:
        print(log.read_text())
    assert "Traceback" not in log.read_text()
    assert metric_lines(config) == expected


def handed_to_torchrun(script: str, tmp_path: Path, **settings: str) -> dict[str, str]:
    """The environment and the arguments (``ARGUMENTS``) with which a script starts torchrun."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\nenv\necho "ARGUMENTS=$*"\n')
    stand_in.chmod(0o755)
    bare = {"PATH": f"{tmp_path}:/usr/bin:/bin", **settings}
    done = subprocess.run([LAUNCHERS / script, "--config", "x.yaml", "a=b c"], env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    handed = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    start = "-m megatron_most.commands.torchrun "
    assert handed["ARGUMENTS"].startswith(start)
    return handed | {"ARGUMENTS": handed["ARGUMENTS"].removeprefix(start)}


def test_a_single_node_restarts_ranks_and_passes_arguments_on(tmp_path: Path) -> None:
    handed = handed_to_torchrun("single_node.sh", tmp_path)
    assert handed["ARGUMENTS"] == "--standalone -m megatron_most.commands.train --config x.yaml a=b c"
    assert handed["PET_MAX_RESTARTS"] == "3"
    assert handed["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert handed_to_torchrun("single_node.sh", tmp_path, CUDA_DEVICE_MAX_CONNECTIONS="8")[
        "CUDA_DEVICE_MAX_CONNECTIONS"
    ] == "8"  # fmt: skip


def test_several_nodes_need_their_number_and_a_meeting_point(tmp_path: Path) -> None:
    handed = handed_to_torchrun("multi_node.sh", tmp_path, PET_NNODES="8", PET_RDZV_ENDPOINT="n1:29400")
    assert handed["PET_RDZV_BACKEND"] == "c10d"
    assert handed["PET_NNODES"] == "8"
    missing = subprocess.run(
        [LAUNCHERS / "multi_node.sh"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert missing.returncode != 0
    assert "number of nodes" in missing.stderr


def test_every_variable_has_its_reason() -> None:
    lines = (LAUNCHERS / "environment.sh").read_text().splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        if line.startswith("export "):
            assert above.startswith(("# ", "export ")), line


def test_the_kubernetes_job_starts_the_same_script() -> None:
    job = yaml.safe_load((LAUNCHERS / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    [container] = worker["template"]["spec"]["containers"]
    script, _, config, *_ = container["command"]
    assert (ROOT / script).is_file() and (ROOT / config).is_file()
    assert container["name"] == "pytorch"
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    gpus = int(job["spec"]["nprocPerNode"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert f"Laid out for {gpus * worker['replicas']} H100s" in (ROOT / config).read_text()
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
