"""seed-tts-eval's lists: texts with and without recordings, and lines that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_most.errors import DataError
from megatron_most.evaluation.suites.meta_list import read_meta_list
from tests.unit.evaluation import published

LINES = [
    "common_voice_en_103|We asked over twenty people.|prompt-wavs/common_voice_en_103.wav|Get the trust fund.",
    "",
    "common_voice_en_104|A prompt.|prompt-wavs/common_voice_en_104.wav|It was here, too.|wavs/common_voice_en_104.wav",
]


def written(folder: Path, *lines: str) -> Path:
    path = folder / "meta.lst"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_text_to_speak_is_the_fourth_field(tmp_path: Path) -> None:
    entries = read_meta_list(written(tmp_path, *LINES))
    assert [(entry.record.id, entry.record.text) for entry in entries] == [
        ("common_voice_en_103", "Get the trust fund."),
        ("common_voice_en_104", "It was here, too."),
    ]
    assert [entry.record.audio for entry in entries] == [None, tmp_path / "wavs" / "common_voice_en_104.wav"]
    assert [entry.prompt.audio for entry in entries] == [
        tmp_path / "prompt-wavs" / f"common_voice_en_{number}.wav" for number in (103, 104)
    ]


def test_a_list_in_its_published_form_is_read(tmp_path: Path) -> None:
    path = published.meta_list(tmp_path)
    lines = [line.split("|") for line in path.read_text().splitlines()]
    assert len(read_meta_list(path)) == len(published.QUESTIONS)
    assert [line[3] for line in lines] == [text for text, _ in published.QUESTIONS]
    assert all((tmp_path / line[2]).is_file() for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a|b|c", "meta.lst, line 4: must be utterance.* got 3 fields"),
        ("a|b|c|", "line 4: must be utterance"),
        (LINES[0], "line 4: utterance 'common_voice_en_103' is already that of .*line 1"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_meta_list(written(tmp_path, *LINES, line))


def test_an_empty_list_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty list"):
        read_meta_list(written(tmp_path, ""))
    with pytest.raises(DataError, match="no such file"):
        read_meta_list(tmp_path / "other.lst")
