"""Tokenisation: the same codes from any number of workers, and nothing lost or left over by an interruption."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_most.audio import read_audio
from megatron_most.data import tokenise as module
from megatron_most.data.codes import CodesDataset
from megatron_most.data.tokenise import tokenise
from megatron_most.errors import DataError
from tests.unit.data.tiny import LoudnessCodec, write_wavs


@pytest.fixture(autouse=True)
def small_shards_and_no_nemo(monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: LoudnessCodec())
    monkeypatch.setattr(module, "SHARD_SIZES", (4, 4))


@pytest.fixture
def manifest(tmp_path) -> Path:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in write_wavs(tmp_path / "wav", 11)))
    return path


def run(manifest: Path, output: Path, workers: int = 2) -> CodesDataset:
    return tokenise(manifest, "codec", output, workers=workers)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class DyingCodec(LoudnessCodec):
    """Kills its process at the first frame of code 0."""

    def encode(self, waveform):
        os._exit(9)


class FailingCodec(LoudnessCodec):
    """Fails on waveforms of one length, so that other shards finish."""

    def encode(self, waveform):
        if len(waveform) == 1600 + 37 * 4:
            raise DataError("wav/4.wav: no such codec frame")
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
    assert dataset.seconds == pytest.approx(sum(utterance.codes.shape[1] for utterance in utterances) / 80)


def test_any_number_of_workers_writes_the_same_files_and_no_others(manifest, tmp_path):
    for workers in (1, 3):
        run(manifest, tmp_path / str(workers) / "codes", workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")
    assert set(files(tmp_path / "1")) == {"codes.json", "codes.jsonl", "codes.codes.bin", "codes.codes.idx"}


def test_a_finished_job_is_not_done_again(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "codes")
    monkeypatch.setattr(module, "_encode_all", None)
    assert len(run(manifest, tmp_path / "codes")) == 11


def test_finished_shards_survive_a_failure(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "whole" / "codes")
    monkeypatch.setattr(module, "load_codec", lambda name: FailingCodec())
    with pytest.raises(DataError, match="wav/4.wav: no such codec frame"):
        run(manifest, tmp_path / "cut" / "codes", workers=1)
    assert not (tmp_path / "cut" / "codes.json").exists()
    assert [path.name for path in (tmp_path / "cut" / "codes.parts").glob("*.jsonl")] == ["000000000.jsonl"]
    encoded = []
    monkeypatch.setattr(module, "load_codec", lambda name: LoudnessCodec())
    original = module._encode_all
    monkeypatch.setattr(module, "_encode_all", lambda shards, *rest: (encoded.extend(shards), original(shards, *rest)))
    run(manifest, tmp_path / "cut" / "codes")
    assert len(encoded) == 2  # of three
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_killed_worker_is_an_error_and_not_a_hang(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: DyingCodec())
    with pytest.raises(DataError, match="a worker process was killed"):
        run(manifest, tmp_path / "codes")


class StallingCodec(LoudnessCodec):
    """Says which process encodes, and never comes to an end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, waveform):
        (self.folder / f"worker-{os.getpid()}").touch()
        time.sleep(60)


def test_workers_end_when_their_parent_is_killed(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: StallingCodec(tmp_path))
    parent = multiprocessing.get_context("fork").Process(target=run, args=(manifest, tmp_path / "codes"))
    parent.start()
    wait_until(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
    parent.kill()
    parent.join()
    workers = [int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*")]
    wait_until(lambda: not any(is_running(worker) for worker in workers))


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_corrupt_audio_is_named(manifest, tmp_path):
    (tmp_path / "wav" / "7.wav").write_bytes(b"RIFFnonsense")
    with pytest.raises(DataError, match=r"7\.wav: not readable as audio"):
        run(manifest, tmp_path / "codes")


def test_an_output_of_another_manifest_or_codec_is_refused(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "codes")
    other = LoudnessCodec()
    other.fingerprint = "1" * 64
    monkeypatch.setattr(module, "load_codec", lambda name: other)
    with pytest.raises(DataError, match=r"codes\.json: was made with another codec, loudness"):
        run(manifest, tmp_path / "codes")
    monkeypatch.setattr(module, "load_codec", lambda name: LoudnessCodec())
    manifest.write_text(manifest.read_text().splitlines()[0])
    with pytest.raises(DataError, match=r"codes\.json: was made from .*m\.jsonl in another state"):
        run(manifest, tmp_path / "codes")


def test_progress_counts_files_and_audio(manifest, tmp_path, capsys):
    run(manifest, tmp_path / "codes")
    assert capsys.readouterr().err.splitlines()[-1].startswith("tokenise: 11/11 files, 0.00 h of audio at ")


def test_texts_that_do_not_fit_the_codes_are_refused(manifest, tmp_path):
    dataset = run(manifest, tmp_path / "codes")
    path = tmp_path / "codes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"codes\.jsonl has 10 lines for 11 utterances"):
        list(dataset)
    path.write_text(path.read_text().replace('"num_frames"', '"frames"'))
    with pytest.raises(DataError, match=r"codes\.jsonl, line 1 does not fit the codes"):
        list(dataset)
