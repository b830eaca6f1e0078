"""A model over tensor- and expert-parallel ranks is judged as one in one process is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_most import parallel
from megatron_most.config import ParallelConfig
from megatron_most.data.building.tasks import continuation_prompt, prompt
from megatron_most.evaluation.interface import EvaluatedModel, scored
from megatron_most.evaluation.running import run_suite
from megatron_most.inference import Decoding, Generator, Sampling, answer, stream
from megatron_most.inference.loading import LoadedModel, config_for_generation
from megatron_most.model import build_model
from tests.distributed.harness import run_ranks
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.unit.evaluation.test_interface import Codec, Letters
from tests.unit.evaluation.test_running import Coins, coins

pytestmark = pytest.mark.invariance

TP2, EP2 = {"tensor_model_parallel_size": 2}, {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "tp2": (2, TP2),
    "ep2": (2, EP2),
    "dp2": (2, {}),
    "tp2-ep2": (4, {**TP2, **EP2}),
}


def judged(overrides: dict[str, Any], layout: dict[str, int]) -> list[Any]:
    """Likelihoods and answers of a tiny model with weights that depend on their names alone."""
    trained = tiny_config(**overrides, data__seq_length=96)
    config = config_for_generation("tiny", dataclasses.asdict(trained), ParallelConfig(**layout))
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config, for_inference=True)
    fill_weights(chunks, std=0.3)
    model = EvaluatedModel(LoadedModel(Generator(chunks[0]), Letters(), Codec(), config, None), {"name": "tiny"})
    vocab, random = config.vocab, np.random.default_rng(0)
    codes = [random.integers(0, vocab.codebook_size, (frames, vocab.num_codebooks)) for frames in (3, 7, 5)]
    documents = [scored(vocab, Letters(), ["hear"], [one]) for one in codes]
    likelihoods = [one.own for one in model.loglikelihood(documents)] + [
        one.whole for one in model.loglikelihood(documents)
    ]
    asr = [prompt("asr", vocab, Letters(), codes=one) for one in codes]
    tts = [prompt("tts", vocab, Letters(), text=text) for text in ("hello", "a")]
    texts = [one.text for one in model.generate(asr, Decoding(max_new=10))]
    spoken = [one.codes for one in model.generate(tts, Decoding(max_seconds=0.6), speech=True)]
    # Few words, and drawn, so that it speaks; and as they come, because ranks must stop together.
    few = Letters()
    few.vocab_size = 6
    loaded = LoadedModel(model.loaded.generator, few, Codec(), config, None)
    mixed = []
    for seed in range(6):
        start = continuation_prompt(vocab, few, [codes[seed % 3]], spoken=False)
        decoding = Decoding(3, 0.4, Sampling(temperature=1.0, seed=seed))
        [whole] = answer(loaded, [start], "either", decoding, alternates=True)
        mixed += [one if isinstance(one, str) else one.tolist() for one in whole.segments]
    pieces = list(stream(loaded, start, "written", Decoding(max_new=9)))
    return [likelihoods, texts, spoken, mixed, pieces]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_likelihoods_and_answers_are_those_of_one_process(layout):
    world_size, sizes = LAYOUTS[layout]
    for overrides in ({}, {"vocab__layout": "flat_delay"}):
        [(likelihoods, texts, spoken, mixed, pieces)] = run_ranks(1, judged, overrides, {})
        assert {type(one) for one in mixed} == {str, list} and pieces
        for rank in run_ranks(world_size, judged, overrides, sizes):
            for found, expected in zip(rank[0], likelihoods, strict=True):
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            assert rank[1] == texts and rank[3] == mixed and rank[4] == pieces
            assert all(np.array_equal(a, b) for a, b in zip(rank[2], spoken, strict=True))


def shared(layout: dict[str, int], output: Path) -> tuple[list[str], dict[str, Any]]:
    parallel.initialize(ParallelConfig(**layout), seed=1)
    suite = Coins(coins(11), bad={"4"})
    return suite.judged, run_suite(suite, None, output)


@pytest.mark.parametrize("layout", ["tp2", "dp2", "tp2-ep2", "ep2"])
def test_groups_of_ranks_share_the_samples(layout, tmp_path):
    world_size, sizes = LAYOUTS[layout]
    ranks = run_ranks(world_size, shared, sizes, tmp_path / "coins.json")
    everyone = [str(place) for place in range(11)]
    for place, (judged_here, result) in enumerate(ranks):
        assert judged_here == (everyone[place::2] if layout == "dp2" else everyone)
        assert result["score"] == 5 / 11 and result["num_failed"] == 1
        assert result["failed"] == ranks[0][1]["failed"]
