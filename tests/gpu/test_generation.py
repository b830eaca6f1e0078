"""Generation on a GPU: a step that is recorded as a CUDA graph gives, id for id, what it gives step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_most.inference import Generator, Sampling
from megatron_most.model import build_model
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import WIDE, tiny_config
from tests.gpu import hardware
from tests.unit.inference.test_generator import MODELS, asr_prompt, tts_prompt

pytestmark = hardware.needs(hardware.GRAPHS)

SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.0, top_k=8, top_p=0.9, seed=1)}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_repeats_the_step(name: str, sampling: Sampling) -> None:
    """In bf16, whose grouped products know no wait. Later batches are repeated from the first recording."""
    config = tiny_config(**WIDE, **MODELS[name], precision__dtype="bf16", data__seq_length=96)
    chunks = build_model(config)
    fill_weights(chunks, std=0.3)
    graphed, plain = Generator(chunks[0]), Generator(chunks[0], cuda_graph=False)
    for seed in range(3):
        prompts = [asr_prompt(plain, 4 * seed + row, frames) for row, frames in enumerate([7 - seed, 2, 4 + seed])]
        expected = plain.text(prompts, end=2, max_new=30, sampling=sampling)
        assert graphed.text(prompts, end=2, max_new=30, sampling=sampling) == expected
        assert graphed._decoder is not None and graphed._decoder.is_recorded
    for seed in range(3):
        prompts = [tts_prompt(plain, 4 * seed + row, length) for row, length in enumerate([3, 9 - seed, 5])]
        for expected, found in zip(
            plain.speech(prompts, 9, sampling), graphed.speech(prompts, 9, sampling), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_a_step_never_waits_for_the_device() -> None:
    chunks = build_model(tiny_config(**WIDE, precision__dtype="bf16", data__seq_length=96))
    generator = Generator(chunks[0], cuda_graph=False)
    prompts = [asr_prompt(generator, row, 5) for row in range(3)]
    decoders = []
    make = generator._decoder_for
    generator._decoder_for = lambda *arguments: decoders.append(make(*arguments)) or decoders[-1]
    generator.text(prompts, end=-1, max_new=4, sampling=Sampling())
    [decoder] = decoders
    random = torch.Generator(generator.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            decoder.advance(random)
    finally:
        torch.cuda.set_sync_debug_mode("default")
