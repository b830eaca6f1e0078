"""In every layout a model learns a sentence's speech by heart and then says it, code by code, when given the text.

And the two faults that no error tells of: targets that are shifted, and a part that is not trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_most import parallel
from megatron_most.config import DataConfig, RunConfig
from megatron_most.data.building.tasks import make_document, prompt
from megatron_most.data.loading.batch import make_batch
from megatron_most.data.storage.documents import Document
from megatron_most.inference.generator import Generator
from megatron_most.inference.sampling import Sampling
from megatron_most.model import MoSTModel, build_model
from megatron_most.training.loss import LossTable
from megatron_most.training.parts import named_parts
from megatron_most.vocab import CODEC_LAYOUTS, NO_CODE
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import CODEBOOK_SIZE, tiny_config
from tests.unit.data.tiny import LetterTokenizer, row_of

TEXTS = ("a fox", "the dog")
CODES = [np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, (3, 5 + seed)).T for seed in range(2)]


def config_of(layout_name: str) -> RunConfig:
    return tiny_config(vocab__layout=layout_name, vocab__num_codebooks=3, data__seq_length=64, model__num_layers=2)


def documents_of(config: RunConfig, task: str) -> list[Document]:
    return [
        make_document(task, config.vocab, LetterTokenizer(), text=text, codes=spoken)
        for text, spoken in zip(TEXTS, CODES, strict=True)
    ]


def train(
    config: RunConfig, model: MoSTModel, documents: Sequence[Document], steps: int, rate: float = 5e-3
) -> list[dict[str, float]]:
    """Train what requires a gradient; the losses of each step by their names."""
    batch = make_batch([row_of([one]) for one in documents], config.vocab, DataConfig(seq_length=64, packing=False))
    loss_table = LossTable(config.vocab, [1.0] * 3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    found = []
    for _ in range(steps):
        losses = model(
            batch.ids, batch.modality, batch.is_padding,
            codes=batch.codes, targets=batch.targets(),
        )  # fmt: skip
        loss, count, table = loss_table(batch, losses)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        means = (table[:, 0] / table[:, 1].clamp(min=1)).tolist()
        found.append(dict(zip(loss_table.names, means, strict=True)) | {"count": table[:, 1].tolist()})
    return found


@dataclass
class Learned:
    config: RunConfig
    model: MoSTModel
    documents: list[Document]
    counts: dict[str, int]


@pytest.fixture(scope="module", params=CODEC_LAYOUTS)
def learned(request: pytest.FixtureRequest) -> Iterator[Learned]:
    config = config_of(request.param)
    parallel.initialize(config.parallel, seed=1)
    (model,) = build_model(config)
    documents = documents_of(config, "tts")
    *_, last = train(config, model, documents, steps=120)
    counts = dict(zip(LossTable(config.vocab, [1.0] * 3).names, last["count"], strict=True))
    yield Learned(config, model, documents, counts)
    parallel.destroy()


def test_what_was_learned_by_heart_is_said(learned: Learned) -> None:
    vocab = learned.config.vocab
    assert [learned.counts[f"loss/codebook_{k}"] for k in range(3)] == [sum(len(spoken) for spoken in CODES)] * 3
    prompts = [prompt("tts", vocab, LetterTokenizer(), text=text) for text in TEXTS]
    for found, spoken in zip(Generator(learned.model).speech(prompts, 12, Sampling()), CODES, strict=True):
        np.testing.assert_array_equal(found, spoken)


def cross_entropy(learned: Learned, codebook: int, offset: int) -> float:
    """Mean over all codes of a codebook of what they cost where the model has read up to ``offset`` positions before.

    Generation chooses the id and the codes of position j + 1 from the logits of position j: its offset is 1.
    """
    vocab = learned.config.vocab
    layout, costs = vocab.codec_layout, []
    for document in learned.documents:
        ids = torch.from_numpy(document.ids)[None]
        side = np.full((len(document), 3), NO_CODE) if document.side_codes is None else document.side_codes
        logits, code_logits = Generator(learned.model).logits(
            ids, torch.from_numpy(side)[None], torch.zeros_like(ids, dtype=torch.bool)
        )
        if layout.uses_side_codes:
            values, of_book = side[:, codebook], code_logits[0, :, codebook]
            places = np.flatnonzero(values != NO_CODE)
        else:
            values, of_book = document.ids, logits[0]
            first = layout.leading_ids.start + codebook * vocab.codebook_size
            places = np.flatnonzero((values >= first) & (values < first + vocab.codebook_size))
        places = places[(places >= offset) & (places < len(document) + min(offset, 0))]
        read = of_book[torch.from_numpy(places - offset)].double().log_softmax(-1)
        costs.append(-read.gather(-1, torch.from_numpy(values[places])[:, None]))
    return float(torch.cat(costs).mean())


@pytest.mark.parametrize("codebook", range(3))
def test_codes_are_predicted_where_generation_asks_for_them(learned: Learned, codebook: int) -> None:
    """A loss falls for any shift of the targets, but then what is said is noise."""
    right, *wrong = (cross_entropy(learned, codebook, offset) for offset in (1, 0, 2, 1 - 3, 1 + 3))
    assert right < 0.2 < 1.0 < min(wrong)


PARTS = {
    "text": ("experts.text", "embeddings", "heads"),
    "audio": ("experts.audio", "embeddings.audio", "heads.audio"),
}


def train_only(config: RunConfig, model: MoSTModel, modality: str) -> None:
    """Freeze all but the parts of a modality; of the tables of all ids, the rows of its ids are its own."""
    rows = torch.arange(len(model.output_layer.weight)) >= config.vocab.text_vocab_size
    is_own = (rows if modality == "audio" else ~rows)[:, None]
    for name, parameter, part in named_parts(config, [model]):
        is_table = part in ("embeddings", "heads")
        parameter.requires_grad_(is_table or part in PARTS[modality])
        if is_table:
            assert len(parameter) == len(rows), name
            parameter.register_hook(lambda gradient: gradient * is_own)


@pytest.mark.parametrize("modality", PARTS)
@pytest.mark.parametrize("layout_name", CODEC_LAYOUTS)
def test_a_modality_is_learned_by_its_own_part_alone(layout_name: str, modality: str) -> None:
    """No gradient is lost on the way to a part, and none of another part makes the loss fall in its place."""
    config = config_of(layout_name)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks, std=0.1)
    train_only(config, chunks[0], modality)
    before = {name: parameter.clone() for name, parameter, _ in named_parts(config, chunks)}
    losses = train(config, chunks[0], documents_of(config, "tts") + documents_of(config, "asr"), steps=25, rate=2e-2)
    falling = [f"loss/{modality}"] + [f"loss/codebook_{k}" for k in range(3) if modality == "audio"]
    for name in falling:
        assert losses[-1][name] < 0.6 * losses[0][name], name
    changed = {part for name, parameter, part in named_parts(config, chunks) if not before[name].equal(parameter)}
    frames = config.vocab.codec_layout.uses_side_codes
    of_codes = {"embeddings.audio", "heads.audio"} if frames and modality == "audio" else set()
    assert changed == {f"experts.{modality}", "embeddings", "heads"} | of_codes
    is_audio = torch.arange(len(chunks[0].output_layer.weight)) >= config.vocab.text_vocab_size
    other = ~is_audio if modality == "audio" else is_audio
    head = chunks[0].output_layer.weight[other]
    assert head.equal(before["output_layer.weight"][other])
    parallel.destroy()
