"""NeMo manifests, and the manifests that ``most prepare manifest`` writes."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_most.data.preparation.manifest import Record, Rejection, iterate_manifest
from megatron_most.data.preparation.sources.base import Source


class NemoManifest(Source):
    name = "nemo"
    layout = "a JSON-lines manifest, or a folder of *.jsonl and *.json manifests; paths are relative to their folder"

    def records(self) -> Iterator[Record | Rejection]:
        for path in self.files("*.jsonl", "*.json"):
            yield from iterate_manifest(path, self.lines(path), needs_text=self.options.needs_text)
