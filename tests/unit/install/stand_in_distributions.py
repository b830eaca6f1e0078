"""Distributions that are there as far as pip, the doctor and import can tell, made in a folder by a test."""

from __future__ import annotations

from pathlib import Path


def write_distribution(folder: Path, name: str, version: str, modules: dict[str, str] | None = None) -> None:
    """Make distribution ``name`` of ``version`` in ``folder``, with ``modules``: text by path below ``folder``."""
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (information / "INSTALLER").write_text("pip\n")
    (information / "RECORD").write_text("")
    for path, text in (modules or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
