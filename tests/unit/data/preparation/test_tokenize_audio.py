"""Tokenization: the same codes from any number of workers, and nothing lost or left over by an interruption."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import pytest

from megatron_most.audio import read_audio
from megatron_most.data.preparation import tokenize_audio as module
from megatron_most.data.preparation.collect import SourceSpec
from megatron_most.data.preparation.shards import Execution, Limits
from megatron_most.data.preparation.sources import SourceOptions
from megatron_most.data.preparation.tokenize_audio import tokenize_audio
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.errors import ConfigError, DataError
from tests.unit.data.preparation import published
from tests.unit.data.tiny import LoudnessCodec, write_wavs

FILES = {"codes.json", "codes.jsonl", "codes.quarantine.jsonl", "codes.codes.bin", "codes.codes.idx"}


@pytest.fixture(autouse=True)
def small_shards_and_no_nemo(monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: LoudnessCodec())
    monkeypatch.setattr(module, "SHARD_SIZES", (4, 4))


@pytest.fixture
def manifest(tmp_path) -> Path:
    return write_manifest(tmp_path, 11)


def write_manifest(folder: Path, num_files: int, seconds: float = 0.2) -> Path:
    path = folder / "m.jsonl"
    entries = write_wavs(folder / "wav", num_files, seconds)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def run(source: Path | SourceSpec, output: Path, workers: int = 2, **options) -> CodesDataset | None:
    execution = Execution(workers, **{name: options.pop(name) for name in ("task", "device") if name in options})
    return tokenize_audio(source, "codec", output, execution=execution, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_process(function: Callable, *arguments) -> multiprocessing.Process:
    """Start a function in a process of a group of its own, which can be killed as a whole."""

    def call() -> None:
        os.setpgid(0, 0)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class DyingCodec(LoudnessCodec):
    """Kills its process at the first waveform."""

    def encode(self, waveform):
        os._exit(9)


class FailingCodec(LoudnessCodec):
    """Fails on waveforms of one length, so that other shards finish."""

    def encode(self, waveform):
        if len(waveform) == 1600 + 37 * 4:
            raise DataError("wav/4.wav: no such codec frame")
        return super().encode(waveform)


class StallingCodec(LoudnessCodec):
    """Says which process encodes, and never comes to an end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, waveform):
        (self.folder / f"worker-{os.getpid()}").touch()
        time.sleep(60)


class LoggingCodec(LoudnessCodec):
    """Takes its time, and writes a line to a file for each waveform that it encodes."""

    def __init__(self, log: Path, seconds: float = 0.005) -> None:
        self.log, self.seconds = log, seconds

    def encode(self, waveform):
        time.sleep(self.seconds)
        with open(self.log, "a") as file:
            file.write(f"{waveform[0]:.6f}\n")
        return super().encode(waveform)


def test_utterances_keep_their_order_text_and_codes(manifest, tmp_path):
    dataset = run(manifest, tmp_path / "out" / "codes")
    utterances = list(dataset)
    assert [utterance.id for utterance in utterances] == [f"m:{line}" for line in range(1, 12)]
    assert [utterance.text for utterance in utterances] == [f"w{index}" for index in range(11)]
    for index, utterance in enumerate(utterances):
        expected = LoudnessCodec().encode(read_audio(tmp_path / "wav" / f"{index}.wav", 8000))
        np.testing.assert_array_equal(utterance.codes, expected)
    assert (dataset.codec.name, dataset.codec.frame_rate) == ("loudness", 80.0)
    assert dataset.seconds == pytest.approx(sum(len(utterance.codes) for utterance in utterances) / 80)


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_every_source_becomes_codes(tmp_path, name):
    expected = {item.id: item for item in published.PUBLISHED[name](tmp_path / "data")}
    options = SourceOptions(**published.ALL_SPLITS.get(name, {}))
    dataset = run(SourceSpec(name, str(tmp_path / "data"), options=options), tmp_path / "codes", workers=1)
    found = {utterance.id: utterance for utterance in dataset}
    assert found.keys() == expected.keys()
    for identity, item in expected.items():
        assert found[identity].text == item.text
        np.testing.assert_array_equal(found[identity].codes, LoudnessCodec().encode(item.waveform))
    source = dataset.provenance["source"]
    assert (source["name"], source["root"]) == (name, str(tmp_path / "data"))
    assert sum(source["licenses"].values()) == len(expected)


def test_any_number_of_workers_and_tasks_writes_the_same_files_and_no_others(manifest, tmp_path):
    for workers in (1, 3):
        run(manifest, tmp_path / str(workers) / "codes", workers)
    results = [run(manifest, tmp_path / "tasks" / "codes", 1, task=(index, 3)) for index in (2, 0, 1)]
    assert [result is None for result in results] == [True, True, False]
    assert files(tmp_path / "1") == files(tmp_path / "3") == files(tmp_path / "tasks")
    assert set(files(tmp_path / "1")) == FILES


def test_a_task_does_its_own_shards_only(manifest, tmp_path):
    assert run(manifest, tmp_path / "codes", task=(1, 3)) is None
    committed = {path.name for path in (tmp_path / "codes.parts").glob("0*.jsonl")}
    assert committed == {"000000004.jsonl", "000000004.rejected.jsonl"}
    with pytest.raises(ConfigError, match="shard 3/3: must be i/n with i in 0..n-1"):
        run(manifest, tmp_path / "codes", task=(3, 3))


@pytest.mark.parametrize(
    ("keep", "rule"),
    [(0, r"'tokenized': 7.* do not add up"), (1, r"000000000\.codes: holds \d+ codes, its lines tell of 0")],
)
def test_every_record_is_accounted_for(manifest, tmp_path, keep, rule):
    """A shard that lost its utterances, with their codes or without, is not put together with the others."""
    run(manifest, tmp_path / "codes", task=(0, 2))
    shard = tmp_path / "codes.parts" / "000000000"
    Path(f"{shard}.jsonl").write_text("")
    Path(f"{shard}.codes").write_bytes(Path(f"{shard}.codes").read_bytes() * keep)
    with pytest.raises(DataError, match=rule):
        run(manifest, tmp_path / "codes", task=(1, 2))
    assert not (tmp_path / "codes.json").exists()


def test_a_finished_job_is_not_done_again(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "codes")
    before = files_beside(tmp_path)
    monkeypatch.setattr(module, "encode_all", None)
    assert len(run(manifest, tmp_path / "codes")) == 11
    assert files_beside(tmp_path) == before


def files_beside(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("codes*") if path.is_file()}


def test_finished_shards_survive_a_failure(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "whole" / "codes")
    monkeypatch.setattr(module, "load_codec", lambda name: FailingCodec())
    with pytest.raises(DataError, match="wav/4.wav: no such codec frame"):
        run(manifest, tmp_path / "cut" / "codes", workers=1)
    assert not (tmp_path / "cut" / "codes.json").exists()
    assert (tmp_path / "cut" / "codes.parts" / "000000000.jsonl").exists()
    assert not (tmp_path / "cut" / "codes.parts" / "000000004.jsonl").exists()
    log = tmp_path / "log"
    monkeypatch.setattr(module, "load_codec", lambda name: LoggingCodec(log, 0))
    run(manifest, tmp_path / "cut" / "codes")
    assert len(log.read_text().splitlines()) == 7  # of eleven
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_killed_worker_is_an_error_and_not_a_hang(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: DyingCodec())
    with pytest.raises(DataError, match="a worker process was killed"):
        run(manifest, tmp_path / "codes")


def test_workers_end_when_their_parent_is_killed(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: StallingCodec(tmp_path))
    parent = in_a_process(run, manifest, tmp_path / "codes")
    wait_until(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
    parent.kill()
    parent.join()
    workers = [int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*")]
    wait_until(lambda: not any(is_running(worker) for worker in workers))


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_killed_anywhere_and_run_again_it_writes_the_same(tmp_path, monkeypatch, kills):
    """The whole group of processes is killed without warning after a random time, again and again."""
    manifest = write_manifest(tmp_path, 60)
    monkeypatch.setattr(module, "load_codec", lambda name: LoggingCodec(tmp_path / "log"))
    started = time.monotonic()
    run(manifest, tmp_path / "whole" / "codes")
    undisturbed = time.monotonic() - started
    moment, killed = random.Random(0), tmp_path / "killed"
    for _ in range(kills):
        process = in_a_process(run, manifest, killed / "codes")
        process.join(moment.uniform(0, undisturbed))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        if (killed / "codes.json").exists():  # killed at the very end: see that nothing is missing, and begin anew
            run(manifest, killed / "codes")
            assert files(killed) == files(tmp_path / "whole")
            shutil.rmtree(killed)
    log = (tmp_path / "log").read_text().splitlines()
    assert len(log) > 60  # something was indeed begun and begun again
    assert len(run(manifest, killed / "codes")) == 60
    assert files(killed) == files(tmp_path / "whole")


def test_killed_at_any_write_and_run_again_it_writes_the_same(tmp_path):
    """Each step of committing is tried in turn: a file half written, or whole and not yet in its place."""
    manifest = write_manifest(tmp_path, 5)
    run(manifest, tmp_path / "whole" / "codes", workers=1)
    expected, killed = files(tmp_path / "whole"), tmp_path / "killed"
    for step in range(100):
        steps = multiprocessing.get_context("fork").Value("i", step)
        process = in_a_process(run_and_die, steps, manifest, killed / "codes")
        process.join()
        left = files(killed) if not (killed / "codes.parts").is_dir() else None
        run(manifest, killed / "codes", workers=1)
        assert files(killed) == expected, f"step {step}"
        shutil.rmtree(killed)
        if process.exitcode == 0:
            assert left == expected
            break
    assert step > 15  # that many steps there are at least


def run_and_die(steps: Synchronized, manifest: Path, output: Path) -> None:
    """Run the job in a process group that kills itself at the write or renaming before which ``steps`` comes to 0."""

    def is_time_to_die() -> bool:
        with steps.get_lock():
            steps.value -= 1
            return steps.value == -1

    def die() -> None:
        os.killpg(0, signal.SIGKILL)
        time.sleep(60)

    def dying_write(write: Callable) -> Callable:
        def written(path: Path, content, **options):
            if is_time_to_die():
                write(path, content[: len(content) // 2], **options)
                die()
            return write(path, content, **options)

        return written

    def replace(source, target, original=os.replace) -> None:
        if is_time_to_die():
            die()
        original(source, target)

    os.replace, Path.write_text, Path.write_bytes = replace, dying_write(Path.write_text), dying_write(Path.write_bytes)
    run(manifest, output, workers=1)


def test_two_runs_of_one_job_at_once_do_nothing_twice(tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path, 40)
    run(manifest, tmp_path / "alone" / "codes")
    log = tmp_path / "log"
    monkeypatch.setattr(module, "load_codec", lambda name: LoggingCodec(log, 0.01))
    racers = [in_a_process(run, manifest, tmp_path / "race" / "codes") for _ in range(3)]
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 40
    assert files(tmp_path / "race") == files(tmp_path / "alone")


@pytest.mark.parametrize(
    ("limit", "seconds", "where"),
    [(1000, 0.2, "records.jsonl"), (5000, 12.0, "codes.parts/0000000"), (6000, 3.0, "codes")],
    ids=["manifest", "shard", "merge"],
)
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path, limit, seconds, where):
    """A limit on the size of files stands for the disk: writing fails in the same way, at a chosen place."""
    manifest = write_manifest(tmp_path, 11, seconds)
    run(manifest, tmp_path / "whole" / "codes")

    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run(manifest, tmp_path / "full" / "codes")
        except (ConfigError, DataError) as error:
            (tmp_path / "error").write_text(str(error))

    in_a_process(on_a_full_disk).join()
    error = (tmp_path / "error").read_text()
    assert where in error and "cannot be written: File too large" in error and "\n" not in error
    assert not (tmp_path / "full" / "codes.json").exists()
    run(manifest, tmp_path / "full" / "codes")
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_an_output_of_another_manifest_codec_or_limit_is_refused(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "codes")
    with pytest.raises(DataError, match=r"codes\.json: was made with limits .*60.0.*, not .*10.0.*; remove it"):
        run(manifest, tmp_path / "codes", limits=Limits(10.0))
    other = LoudnessCodec()
    other.fingerprint = "1" * 64
    monkeypatch.setattr(module, "load_codec", lambda name: other)
    with pytest.raises(DataError, match=r"codes\.json: was made with another codec, loudness"):
        run(manifest, tmp_path / "codes")
    monkeypatch.setattr(module, "load_codec", lambda name: LoudnessCodec())
    manifest.write_text(manifest.read_text().splitlines()[0])
    with pytest.raises(DataError, match=r"codes\.json: was made from .*m\.jsonl in another state"):
        run(manifest, tmp_path / "codes")
    assert set(files_beside(tmp_path)) == FILES and not (tmp_path / "codes.parts").exists()


def test_a_begun_job_is_not_gone_on_with_another_codec(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "codes", task=(0, 2))
    other = LoudnessCodec()
    other.fingerprint = "1" * 64
    monkeypatch.setattr(module, "load_codec", lambda name: other)
    with pytest.raises(DataError, match=r"codes\.parts/job\.json: was made with another codec, loudness"):
        run(manifest, tmp_path / "codes", task=(1, 2))


def test_a_job_that_version_0_1_began_goes_on(manifest, tmp_path):
    """It wrote ``licence``, and knew a source by the SHA-256 of lines that said so."""
    manifest.write_text(manifest.read_text().replace('{"audio', '{"license": "MIT", "audio'))
    run(manifest, tmp_path / "whole" / "codes")
    run(manifest, tmp_path / "begun" / "codes", task=(0, 2))
    parts = tmp_path / "begun" / "codes.parts"
    for path in (parts / "job.json", parts / "records.jsonl"):
        path.write_text(path.read_text().replace("license", "licence"))
    job = json.loads((parts / "job.json").read_text())
    assert job["records_sha256"] == hashlib.sha256((parts / "records.jsonl").read_bytes()).hexdigest()
    assert job["source"]["licences"] == {"MIT": 11}
    assert len(run(manifest, tmp_path / "begun" / "codes", task=(1, 2))) == 11
    assert files(tmp_path / "begun") == files(tmp_path / "whole")


def test_text_without_audio_cannot_be_tokenized(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="source text: is text without audio"):
        run(SourceSpec("text", str(tmp_path)), tmp_path / "codes")


def test_a_device_that_is_not_there(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device cuda: this machine has none"):
        run(manifest, tmp_path / "codes", device="cuda")
    with pytest.raises(ConfigError, match="device tpu: must be auto, cpu or cuda"):
        run(manifest, tmp_path / "codes", device="tpu")


def test_progress_counts_files_and_audio(manifest, tmp_path, capsys):
    (tmp_path / "wav" / "0.wav").write_bytes(b"")
    run(manifest, tmp_path / "codes", max_quarantine=0.1)
    last = capsys.readouterr().err.splitlines()[-1]
    said = r"tokenize: 11/11 files, 0\.00 h of audio at \d+ h/h, 1 rejected, \d+\.\d+ files/s in 00:\d\d"
    assert re.fullmatch(said, last)


def test_texts_that_do_not_fit_the_codes_are_refused(manifest, tmp_path):
    dataset = run(manifest, tmp_path / "codes")
    path = tmp_path / "codes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"codes\.jsonl has 10 lines for 11 utterances"):
        list(dataset)
    path.write_text(path.read_text().replace('"num_frames"', '"frames"'))
    with pytest.raises(DataError, match=r"codes\.jsonl, line 1 does not fit the codes"):
        list(dataset)


def test_audio_without_text_is_taken_when_asked_for(tmp_path):
    path = write_manifest(tmp_path, 2)
    path.write_text(path.read_text().replace('"text": "w0"', '"speaker": 5'))
    with pytest.raises(DataError, match="1 of 2 records are in quarantine"):
        run(path, tmp_path / "codes")
    spec = SourceSpec("nemo", str(path), options=SourceOptions(needs_text=False))
    first = next(iter(run(spec, tmp_path / "audio")))
    assert (first.text, first.speaker) == ("", "5")
