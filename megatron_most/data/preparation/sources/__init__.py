"""Data sets in the layouts they are published in, as one stream of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_most.data.preparation.sources.base import Source, SourceOptions
from megatron_most.data.preparation.sources.common_voice import CommonVoice
from megatron_most.data.preparation.sources.lhotse import LhotseCuts, LibriHeavy
from megatron_most.data.preparation.sources.librispeech import LibriSpeech
from megatron_most.data.preparation.sources.nemo import NemoManifest
from megatron_most.data.preparation.sources.roots import Roots
from megatron_most.data.preparation.sources.tar import NemoTarred, WebDataset
from megatron_most.data.preparation.sources.text import Chat, TextCorpus
from megatron_most.data.preparation.sources.voxpopuli import VoxPopuli
from megatron_most.errors import ConfigError

__all__ = ["SOURCES", "Roots", "Source", "SourceOptions", "open_source"]

SOURCES: dict[str, type[Source]] = {
    source.name: source
    for source in (
        NemoManifest,
        LibriSpeech,
        LibriHeavy,
        CommonVoice,
        VoxPopuli,
        WebDataset,
        NemoTarred,
        LhotseCuts,
        TextCorpus,
        Chat,
    )
}
"""Every source by the name that a user gives."""


def open_source(
    name: str, root: str | Path, options: SourceOptions | None = None, further_roots: Sequence[str | Path] = ()
) -> Source:
    """The source called ``name`` at ``root``, which may read from there and from ``further_roots``.

    Raises:
        ConfigError: no source of that name.
        DataError: no such root.
    """
    if name not in SOURCES:
        raise ConfigError(f"source {name}: must be one of {', '.join(SOURCES)}")
    return SOURCES[name](root, options, further_roots)
