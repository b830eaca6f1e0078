"""What a model is, what it was trained on and for how long, and how it was measured, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most import __version__
from megatron_most.checkpointing import CheckpointMetadata
from megatron_most.config import RunConfig
from megatron_most.data.storage.sidecar import read_sidecar, with_current_keys
from megatron_most.errors import CheckpointError, DataError
from megatron_most.files import read_json
from megatron_most.moe import ExpertGroups

_CARD_HEAD = """\
---
library_name: transformers
pipeline_tag: any-to-any
tags: [speech, moe, most]
---

# MoST: speech and text with experts for each modality

Trained with megatron_most {trained_by}, exported by {exported_by}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
[codes] = model.speak(processor, ["Hello."], max_frames=200)  # [frames, codebooks]; the codec makes sound of them
[text] = model.transcribe(processor, [codes])
```
"""


def model_card(config: RunConfig, metadata: CheckpointMetadata, checkpoint: Path) -> str:
    """``README.md`` of an export."""
    trained_by = metadata.versions.get("megatron_most", __version__)
    head = _CARD_HEAD.format(trained_by=trained_by, exported_by=__version__)
    return "\n".join([head, *describe(config, metadata, checkpoint), ""])


def describe(config: RunConfig, metadata: CheckpointMetadata, checkpoint: Path) -> list[str]:
    """Lines of Markdown: tables of the model, its training with the licenses of its data, and its evaluation.

    Args:
        checkpoint: where its run's ``evaluation`` folder is looked for: a checkpoint directory.
    """
    datasets = training_data(metadata)
    totals: Counter[str] = Counter()
    for one in datasets:
        totals += one.licenses
    licenses = ", ".join(name for name, _ in totals.most_common())
    return [
        "## Model",
        "",
        *model_tables(config, metadata.codec.name if metadata.codec else None),
        "",
        "## Training",
        "",
        f"{metadata.step} steps, {metadata.consumed_tokens} tokens.",
        "",
        *(
            _table(("dataset", "task", "documents", "licenses"), [one.cells() for one in datasets])
            or ["The checkpoint names no datasets."]
        ),
        "",
        f"Licenses of the data: {licenses or 'unknown'}. Read them before you publish this model.",
        "",
        "## Evaluation",
        "",
        *(_table(("suite", "set", "WER", "utterances", "normalizer"), _evaluation(checkpoint)) or ["None recorded."]),
    ]


def model_tables(config: RunConfig, codec: str | None) -> list[str]:
    """Lines of Markdown: a table of sizes and kinds, and one of the expert groups.

    Args:
        codec: its name, if that is known.
    """
    model, vocab, moe = config.model, config.vocab, config.model.moe
    facts: list[tuple[Any, ...]] = [
        ("layers", f"{model.num_layers}, of which {model.first_k_dense_replace} dense"),
        ("width", model.hidden_size),
        ("attention", model.attention.type),
        ("positions", config.data.seq_length),
        ("text ids", vocab.text_vocab_size),
        (
            "codec",
            f"{codec or 'unknown'}, {vocab.num_codebooks} codebooks of {vocab.codebook_size}, layout `{vocab.layout}`",
        ),
        ("experts", f"{moe.num_experts} of width {moe.moe_ffn_hidden_size}"),
        ("shared experts", f"width {moe.moe_shared_expert_intermediate_size}"),
        ("router", f"{moe.moe_router_score_function} scores, score rule `{moe.score_rule}`"),
    ]
    groups: list[tuple[Any, ...]] = [
        (group.modality, len(choice), group.moe_router_topk)
        for group, choice in zip(moe.groups, ExpertGroups.from_config(moe).choices, strict=True)
    ]
    return [*_table(("", "value"), facts), "", *_table(("modality", "experts to choose from", "top-k"), groups)]


@dataclass(frozen=True)
class TrainingData:
    """A dataset that a model was trained on, as its description says; ``task`` is None where that is gone.

    licenses: number of utterances, texts or conversations under each.
    """

    name: str
    task: str | None
    documents: int | None
    licenses: Counter[str]

    def cells(self) -> tuple[Any, ...]:
        """Of its row in the table."""
        if self.task is None:
            return self.name, "?", "?", "unknown: its description is gone"
        documents = "?" if self.documents is None else self.documents
        return self.name, self.task, documents, ", ".join(sorted(self.licenses)) or "unknown"


def training_data(metadata: CheckpointMetadata) -> list[TrainingData]:
    """The training datasets of a checkpoint."""
    found: list[TrainingData] = []
    for dataset in metadata.datasets:
        name, licenses = Path(dataset.name).name, Counter[str]()
        try:
            sidecar = with_current_keys(read_sidecar(f"{dataset.name}.json", name))
        except DataError:
            found.append(TrainingData(name, None, None, licenses))
            continue
        provenance = sidecar["provenance"]
        for counts in provenance.get("licenses", {}).values():
            licenses.update(counts or {"unknown": 1})
        documents = provenance.get("counts", {}).get("documents")
        found.append(TrainingData(name, sidecar.get("task", "?"), documents, licenses))
    return found


def _evaluation(checkpoint: Path) -> list[tuple[Any, ...]]:
    """Results of ``most evaluate`` in the run's ``evaluation`` folder."""
    folders = (parent / "evaluation" for parent in list(checkpoint.resolve().parents)[:2])
    paths: Iterable[Path] = next((sorted(folder.glob("*.json")) for folder in folders if folder.is_dir()), [])
    rows: list[tuple[Any, ...]] = []
    for path in paths:
        result = read_json(path, CheckpointError)
        if {"suite", "set", "wer", "num_utterances", "normalizer"} <= result.keys():
            wer = f"{result['wer']:.2%}"
            rows.append((result["suite"], result["set"], wer, result["num_utterances"], result["normalizer"]))
    return rows


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    if not rows:
        return []
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
