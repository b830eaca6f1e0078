"""The benchmark of generation in small, on the CPU."""

from __future__ import annotations

from megatron_most.config.load import build_config
from tools.bench import decode, launches


def test_every_row_is_there_and_speech_goes_on() -> None:
    config = build_config("bench", launches.CONFIG, ["model.num_layers=2"])
    report = decode.measure(config, [*decode.ARMS], prompts=[(1, 8), (2, 9)], tokens=3, calls=2)
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")][1:]
    assert [row[:4] for row in rows] == [
        [what, batch, position, arm]
        for batch, position in ("18", "29")
        for what in ("text", "speech")
        for arm in decode.ARMS
    ]
    operators = {(row[0], row[1]): int(row[6]) for row in rows}
    assert 0 < operators["text", "1"] == operators["text", "2"] < operators["speech", "1"] == operators["speech", "2"]
    assert all(row[7:] == ["0", "yes"] for row in rows)
