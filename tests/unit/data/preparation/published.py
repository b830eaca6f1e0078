"""Data sets in the layouts they are published in, tiny and with real audio, for the tests of sources.

Each maker returns the ids, texts and waveforms (what its audio files hold, mono, 8 kHz) that a reader has to find.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import soundfile
from pyarrow import parquet

RATE = 8000


@dataclass(frozen=True)
class Expected:
    id: str
    text: str
    waveform: np.ndarray


def sound(seed: int, seconds: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(RATE * seconds)).astype(np.float32)


def write_audio(path: Path, waveform: np.ndarray, **options) -> np.ndarray:
    """Writes a file and returns what it holds: lossy formats change the sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, RATE, **options)
    return soundfile.read(path, dtype="float32")[0]


def librispeech(root: Path) -> list[Expected]:
    found = []
    for split, speaker, chapter in (("dev-clean", "84", "121123"), ("train-clean-100", "103", "1240")):
        folder = root / split / speaker / chapter
        lines = []
        for number in range(2):
            name = f"{speaker}-{chapter}-{number:04d}"
            waveform = write_audio(folder / f"{name}.flac", sound(int(speaker) + number))
            found.append(Expected(name, f"CHAPTER {chapter} SENTENCE {number}", waveform))
            lines.append(f"{name} {found[-1].text}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return found


def libriheavy(root: Path) -> list[Expected]:
    """Cuts of one long recording, as in ``libriheavy_cuts_small.jsonl.gz``."""
    book = "small/100/sea_fairies_0812_librivox_64kb_mp3/01_baum_sea_fairies_64kb"
    whole = write_audio(root / "download" / "librilight" / f"{book}.flac", sound(1, 3.0))
    found, lines = [], []
    for number, (start, duration) in enumerate(((0.25, 0.5), (1.0, 0.75))):
        text = f'"Why," she asked, "number {number}?"'
        begin = round(start * RATE)
        found.append(Expected(f"{book}_{number}", text, whole[begin : begin + round(duration * RATE)]))
        supervision = {
            "id": f"{book}_{number}", "recording_id": book, "start": 0, "duration": duration, "channel": 0,
            "language": "English", "speaker": "100",
            "custom": {
                "texts": [text, f"WHY SHE ASKED NUMBER {number}"], "pre_texts": ["...us", "US"],
                "begin_byte": 4993, "end_byte": 5120,
            },
        }  # fmt: skip
        cut = {
            "id": f"{book}_{number}", "start": start, "duration": duration, "channel": 0,
            "supervisions": [supervision],
            "recording": {
                "id": book, "sampling_rate": RATE, "num_samples": len(whole), "duration": len(whole) / RATE,
                "sources": [{"type": "file", "channels": [0], "source": f"download/librilight/{book}.flac"}],
                "channel_ids": [0],
            },
            "custom": {"text_path": "download/librilight_text/output_text_small_cleaned/Sea Fairies/text.txt"},
            "type": "MonoCut",
        }  # fmt: skip
        lines.append(json.dumps(cut) + "\n")
    with gzip.open(root / "libriheavy_cuts_small.jsonl.gz", "wt") as file:
        file.writelines(lines)
    return found


def common_voice(root: Path) -> list[Expected]:
    header = ["client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes"]
    header += ["age", "gender", "accents", "variant", "locale", "segment"]
    found, rows, durations = [], [header], [["clip", "duration[ms]"]]
    for number in range(3):
        clip = f"common_voice_cy_{17301}{number}.mp3"
        waveform = write_audio(root / "clips" / clip, sound(number, 1.0), format="MP3", subtype="MPEG_LAYER_III")
        found.append(Expected(clip.removesuffix(".mp3"), f'Dywedodd "helo" {number}.', waveform))
        rows.append([f"f00d{number}", clip, "a1", found[-1].text, "", "2", "0", "", "", "", "", "cy", ""])
        durations.append([clip, str(round(len(waveform) / RATE * 1000))])
    for name, table in (("train.tsv", rows), ("validated.tsv", rows), ("clip_durations.tsv", durations)):
        (root / name).write_text("".join("\t".join(row) + "\n" for row in table))
    return found


def voxpopuli(root: Path, *, from_hub: bool = False) -> list[Expected]:
    header = ["id", "raw_text", "normalized_text", "speaker_id", "split", "gender", "is_gold_transcript", "accent"]
    found, rows = [], [header]
    for number in range(2):
        name = f"20140{number}15-0900-PLENARY-11-en_20140115-12:00:05_{number}"
        path = root / "train" / "train_part_0" / f"{name}.wav" if from_hub else root / "2014" / f"{name}.ogg"
        waveform = write_audio(path, sound(number, 0.5), **({} if from_hub else {"subtype": "VORBIS"}))
        found.append(Expected(name, f"mister president number {number}", waveform))
        rows.append([name, f"Mr President, {number}!", found[-1].text, "28150", "train", "male", "True", "None"])
    (root / "asr_train.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return found


def nemo(root: Path) -> list[Expected]:
    found, lines = [], []
    for number in range(3):
        waveform = write_audio(root / "wav" / f"{number}.wav", sound(number), subtype="FLOAT")
        found.append(Expected(f"train:{number + 1}", f"sentence {number}", waveform))
        entry = {"audio_filepath": f"wav/{number}.wav", "duration": len(waveform) / RATE, "text": found[-1].text}
        lines.append(json.dumps(entry) + "\n")
    (root / "train.jsonl").write_text("".join(lines))
    return found


def webdataset(root: Path) -> list[Expected]:
    found = []
    for shard in range(2):
        members = {}
        for number in range(2):
            key = f"speech/{shard}{number}"
            content, waveform = encoded(sound(10 * shard + number))
            text = f"shard {shard} number {number}"
            found.append(Expected(f"{shard:06d}/{key}", text, waveform))
            members[f"{key}.flac"] = content
            members |= (
                {f"{key}.json": json.dumps({"text": text, "speaker": 7}).encode()}
                if shard
                else {f"{key}.txt": (text + "\n").encode()}
            )
        write_tar(root / f"{shard:06d}.tar", members)
    return found


def nemo_tarred(root: Path) -> list[Expected]:
    found, lines = [], []
    for shard in range(2):
        members = {}
        for number in range(2):
            name = f"book_{shard}_{number}.flac"
            members[name], waveform = encoded(sound(10 * shard + number))
            entry = {"audio_filepath": name, "duration": len(waveform) / RATE, "text": name, "shard_id": shard}
            lines.append(json.dumps({**entry, "id": name}))
            found.append(Expected(name, name, waveform))
        # A second segment of the last member; and one that no line names.
        half = len(waveform) // 2
        segment = {
            "audio_filepath": name.replace(".flac", "-sub1.flac"),
            "offset": half / RATE,
            "duration": half / RATE,
        }
        lines.append(json.dumps({**segment, "text": "half", "shard_id": shard, "id": f"half {shard}"}))
        found.append(Expected(f"half {shard}", "half", waveform[half : 2 * half]))
        members["unnamed.flac"], _ = encoded(sound(99))
        write_tar(root / f"audio_{shard}.tar", members)
    (root / "tarred_audio_manifest.json").write_text("\n".join(lines) + "\n")
    return found


def chat_parquet(path: Path) -> list[list[dict]]:
    """Conversations as SmolTalk has them."""
    talks = [
        [
            {"content": "You are kind.", "role": "system"},
            {"content": "Hi", "role": "user"},
            {"content": "Hello!", "role": "assistant"},
        ],
        [{"content": "2+2?", "role": "user"}, {"content": " Four. ", "role": "assistant"}],
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"messages": talks, "source": ["a", "b"]}), path)
    return talks


def encoded(waveform: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A FLAC file, and what it holds."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, RATE, format="FLAC")
    buffer.seek(0)
    return buffer.getvalue(), soundfile.read(buffer, dtype="float32")[0]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


PUBLISHED = {
    "librispeech": librispeech,
    "libriheavy": libriheavy,
    "common_voice": common_voice,
    "voxpopuli": voxpopuli,
    "nemo": nemo,
    "webdataset": webdataset,
    "nemo_tarred": nemo_tarred,
}
"""Sources of audio that are made here; a Lhotse set is made by Lhotse itself."""

ALL_SPLITS: dict[str, dict] = {"librispeech": {"splits": ("dev-clean", "train-clean-100")}}
"""Options that take everything of a source made here, where some of it is held out from training."""
