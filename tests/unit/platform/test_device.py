"""Questions about the device that other tests do not ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_most import platform


@pytest.mark.parametrize(
    ("script", "version"),
    [
        (None, "unknown"),
        ("echo 570.86.15; echo 570.86.15", "570.86.15"),  # a line for each GPU
        ("echo NVIDIA-SMI has failed; exit 9", "unknown"),
    ],
)
def test_the_driver_is_asked_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, version: str
) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert platform.driver_version() == version
