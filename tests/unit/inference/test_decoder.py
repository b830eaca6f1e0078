"""The step of generation as a CUDA graph would repeat it: recorded once, with nothing asked of the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_most import parallel, platform
from megatron_most.inference import Generator, Sampling, decoder
from megatron_most.model import build_model
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config
from tests.unit.inference.test_generator import MODELS, asr_prompt, tts_prompt


class Recorded:
    """What stands for a CUDA graph on a CPU: operators on tensors, called again in the same order.

    Recording fails where a value is brought to the host, and numbers of the host stay what they were.
    """

    recordings = 0

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.graph, self.calls = call, None, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.graph is not None:
            self.graph()
        elif self.calls < 3:
            self.call()
        else:
            # Recording runs the call. What a GPU compiles is recorded operator by operator.
            with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
                self.graph = make_fx(lambda: (self.call(), torch.zeros(1))[1])()
            Recorded.recordings += 1


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[torch.nn.Module]:
    config = tiny_config(**request.param, model__num_layers=2, data__seq_length=96)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks, std=0.3)
    yield chunks[0]
    parallel.destroy()


@pytest.fixture
def recording(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> Generator:
    monkeypatch.setattr(decoder, "_GraphedCall", Recorded)
    monkeypatch.setattr(Recorded, "recordings", 0)
    generator = Generator(model)
    generator._uses_graphs = True
    return generator


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_k=12, top_p=0.9, seed=3)], ids=str)
def test_a_recorded_step_repeats_what_was_generated_without(
    model: torch.nn.Module, recording: Generator, sampling: Sampling
) -> None:
    """Batches of other lengths and lengths of prompts follow in what the first has left behind."""
    plain = Generator(model)
    for seed in range(3):
        prompts = [asr_prompt(plain, 4 * seed + row, frames) for row, frames in enumerate([7 - seed, 2, 4 + seed])]
        expected = plain.text(prompts, end=2, max_new=20, sampling=sampling)
        assert recording.text(prompts, end=2, max_new=20, sampling=sampling) == expected
    assert Recorded.recordings == 1
    for seed in range(3):
        prompts = [tts_prompt(plain, 4 * seed + row, length) for row, length in enumerate([3, 9 - seed, 5])]
        frames = zip(plain.speech(prompts, 9, sampling), recording.speech(prompts, 9, sampling), strict=True)
        assert all(torch.equal(*map(torch.from_numpy, pair)) for pair in frames)
    assert Recorded.recordings == 2


def test_another_batch_size_or_sampling_is_recorded_anew(recording: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []
    monkeypatch.setattr(decoder, "_GraphedCall", lambda call: recorded.append(call) or call)
    prompts = [asr_prompt(recording, seed, 5) for seed in range(3)]
    last = Sampling(temperature=1.0, seed=4)
    for rows, sampling in ((3, Sampling()), (2, Sampling()), (2, Sampling(temperature=1.0)), (2, last)):
        recording.text(prompts[:rows], end=-1, max_new=3, sampling=sampling)
    assert len(recorded) == 3
    recording.text(prompts[:2], end=-1, max_new=70, sampling=last)
    assert len(recorded) == 4  # the cache was too short
    recording.speech([tts_prompt(recording, 0, 5)] * 2, 3, last)
    assert len(recorded) == 5


def test_the_question_for_the_end_changes_nothing(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(model)
    prompts = [tts_prompt(generator, seed, 4 + seed) for seed in range(3)]
    spoken = []
    for every in (1, 16, 1000):
        monkeypatch.setattr("megatron_most.inference.generator._END_TESTED_EVERY", every)
        spoken.append(generator.speech(prompts, 20, Sampling(temperature=1.0)))
    for rows in zip(*spoken, strict=True):
        assert all(torch.equal(torch.from_numpy(rows[0]), torch.from_numpy(row)) for row in rows)


def test_a_row_that_has_ended_is_routed_to_no_expert(model: torch.nn.Module) -> None:
    """What it goes on with is thrown away: it must not cost an expert's time."""
    generator = Generator(model)
    prompts = [asr_prompt(generator, seed, 3) for seed in range(8)]
    firsts = [row[0] for row in generator.text(prompts, end=-1, max_new=1, sampling=Sampling())]
    goes_on = [first != firsts[0] for first in firsts]
    assert any(goes_on)
    maps: list[torch.Tensor] = []
    router = model.decoder.layers[1].mlp.router
    handle = router.register_forward_hook(lambda module, arguments, output: maps.append(output[1]))
    generator.text(prompts, end=firsts[0], max_new=3, sampling=Sampling())
    handle.remove()
    assert [bool(row.any()) for row in maps[1]] == goes_on


def test_nothing_is_generated_where_nothing_is_wanted(model: torch.nn.Module) -> None:
    generator = Generator(model)
    assert generator.text([asr_prompt(generator, 0, 3)] * 2, end=2, max_new=0, sampling=Sampling()) == [[], []]


class PretendGraph:
    """A CUDA graph that counts how often it is repeated, and can refuse to be recorded."""

    replays = 0
    refusal = ""

    def replay(self) -> None:
        PretendGraph.replays += 1

    @staticmethod
    @contextlib.contextmanager
    def record(graph: PretendGraph, **options: object) -> Iterator[None]:
        yield
        if PretendGraph.refusal:
            raise RuntimeError(PretendGraph.refusal)


@pytest.mark.parametrize("refusal", ["", "operation not permitted\nwhen stream is capturing"])
def test_what_cannot_be_recorded_is_called_as_it_is(
    refusal: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platform.install()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendGraph)
    monkeypatch.setattr(torch.cuda, "graph", PretendGraph.record)
    monkeypatch.setattr(PretendGraph, "replays", 0)
    monkeypatch.setattr(PretendGraph, "refusal", refusal)
    calls: list[int] = []
    call = decoder._GraphedCall(lambda: calls.append(1))
    for _ in range(10):
        call()
    recordings = 1  # which run nothing on a GPU
    assert len(calls) - recordings == (10 if refusal else call.WARM_UP)
    assert PretendGraph.replays == (0 if refusal else 10 - call.WARM_UP)
    assert call.is_recorded == (not refusal)
    expected = ["generating without a CUDA graph, several times slower: operation not permitted"] if refusal else []
    assert [record.getMessage() for record in caplog.records if record.name.startswith("megatron_most")] == expected
