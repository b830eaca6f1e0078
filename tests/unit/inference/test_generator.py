"""Generation on a tiny random model: the cache, the padding and the grammar."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_most import parallel
from megatron_most.errors import ConfigError
from megatron_most.inference.generator import Generator
from megatron_most.inference.grammar import Grammar, speech_grammar, text_grammar
from megatron_most.inference.sampling import Sampling
from megatron_most.model import build_model
from megatron_most.vocab import CODEC_LAYOUTS, NO_CODE, ModalityRange, VocabLayout
from tests.distributed.shards import fill_weights
from tests.distributed.tiny import tiny_config

MODELS = {name: {"vocab__layout": name} for name in CODEC_LAYOUTS} | {
    "grouped-query": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 8,
    }
}


@dataclass
class Prompt:
    ids: np.ndarray
    side_codes: np.ndarray | None


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def generator(request):
    config = tiny_config(**request.param, data__seq_length=64)
    parallel.initialize(config.parallel, seed=1)
    chunks = build_model(config)
    fill_weights(chunks, std=0.3)
    yield Generator(chunks[0])
    parallel.destroy()


def asr_prompt(generator: Generator, seed: int, frames: int) -> Prompt:
    vocab, random = generator.vocab, np.random.default_rng(seed)
    codes = random.integers(0, vocab.codebook_size, (vocab.num_codebooks, frames)).T
    ids, side = vocab.codec_layout.encode(codes)
    nothing = np.full((1, vocab.num_codebooks), NO_CODE)
    return Prompt(
        np.concatenate([[1, vocab.begin_of_audio], ids, [vocab.end_of_audio]]),
        np.concatenate([nothing, nothing, side, nothing]) if vocab.codec_layout.uses_side_codes else None,
    )


def tts_prompt(generator: Generator, seed: int, length: int) -> Prompt:
    vocab, random = generator.vocab, np.random.default_rng(seed)
    ids = np.concatenate([[1], random.integers(3, vocab.text_vocab_size, length), [vocab.begin_of_audio]])
    return Prompt(ids, None)


def without_cache(generator: Generator, prompt: Prompt, max_new: int) -> list[int]:
    """Greedy text by running the whole past again for every token."""
    vocab = generator.vocab
    ids = torch.from_numpy(prompt.ids)[None]
    codes = torch.full((1, ids.shape[1], vocab.num_codebooks), NO_CODE)
    if prompt.side_codes is not None:
        codes = torch.from_numpy(prompt.side_codes)[None]
    new = []
    for _ in range(max_new):
        with torch.no_grad():
            logits, _ = generator.model(
                ids, vocab.is_audio(ids).long(), torch.zeros_like(ids, dtype=torch.bool), codes=codes
            )
        token = logits[0, -1, : vocab.text_vocab_size].argmax()
        if token == 2:
            break
        new.append(int(token))
        ids = torch.cat([ids, token[None, None]], dim=1)
        codes = torch.cat([codes, torch.full((1, 1, vocab.num_codebooks), NO_CODE)], dim=1)
    return new


def test_cache_and_left_padding_change_nothing(generator):
    prompts = [asr_prompt(generator, seed, frames) for seed, frames in enumerate([3, 7, 5])]
    together = generator.text(prompts, end=2, max_new=12, sampling=Sampling())
    assert together == [without_cache(generator, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in together}) > 1


def test_speech_is_whole_frames_inside_the_codebooks(generator):
    prompts = [tts_prompt(generator, seed, 4 + seed) for seed in range(3)]
    for sampling in (Sampling(), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=3)):
        for codes in generator.speech(prompts, max_frames=9, sampling=sampling):
            assert 1 <= len(codes) <= 9
            generator.vocab.check_codes(codes, "generated")


def test_positions_hold_the_codes_that_training_shows_there(generator):
    """Also where a delayed codebook has not begun or has ended."""
    layout = generator.vocab.codec_layout
    grammar = speech_grammar(generator.vocab, max_frames=6)
    prompts = [tts_prompt(generator, seed, 5) for seed in range(4)]
    sampling = Sampling(temperature=3.0, seed=2)
    rows = generator.rows(prompts, grammar, [layout.num_positions(6)] * 4, sampling)
    for row in rows:
        expected_ids, expected_codes = layout.encode(layout.decode(row.ids, row.codes))
        np.testing.assert_array_equal(row.ids, expected_ids)
        np.testing.assert_array_equal(row.codes, expected_codes)


def test_sampling_repeats_with_its_seed_and_differs_with_another(generator):
    prompts = [tts_prompt(generator, seed, 5) for seed in range(2)]

    def speak(seed):
        return generator.speech(prompts, 9, Sampling(temperature=2.0, seed=seed))

    first, again, other = speak(1), speak(1), speak(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, other, strict=True))


def allowed_after(grammar: Grammar, ids: list[int]) -> set[int]:
    """By the tables, moved on one id after the other."""
    state = grammar.start(1)
    for chosen in ids:
        grammar.advance(state, torch.tensor([grammar.ids.index(chosen)]))
    (forbidden,) = grammar.forbidden_after(state).tolist()
    return {id_ for id_, is_forbidden in zip(grammar.ids, forbidden, strict=True) if not is_forbidden}


def test_audio_may_end_only_between_frames(generator):
    vocab, grammar = generator.vocab, speech_grammar(generator.vocab, max_frames=3)
    layout = vocab.codec_layout
    ids, _ = layout.encode(np.zeros((3, vocab.num_codebooks), dtype=np.int64))
    for position in range(len(ids) + 1):
        allowed = allowed_after(grammar, ids[:position].tolist())
        frames = int(layout.is_leading(ids[:position]).sum())
        assert (vocab.end_of_audio in allowed) == (position > 0 and layout.num_positions(frames) == position)
        assert min(allowed) >= vocab.text_vocab_size
        assert position == len(ids) or ids[position] in allowed
    assert allowed == {vocab.end_of_audio}


@pytest.mark.parametrize("name", CODEC_LAYOUTS)
def test_tables_of_speech_say_what_the_layout_says(name):
    """Along random audio of every length, of 3 codebooks, and after its end."""
    vocab, max_frames, random = VocabLayout(10, 3, 4, layout=name), 5, np.random.default_rng(0)
    layout, grammar = vocab.codec_layout, speech_grammar(vocab, max_frames)
    lengths = set()
    for _ in range(60):
        ids: list[int] = []
        while True:
            num_frames = sum(id_ in layout.leading_ids for id_ in ids)
            expected, may_end = layout.allowed_next(len(ids), num_frames)
            allowed = set(expected) - (set(layout.leading_ids) if num_frames == max_frames else set())
            allowed |= {vocab.end_of_audio} if may_end else set()
            assert allowed_after(grammar, ids) == allowed
            chosen = int(random.choice(sorted(allowed)))
            if chosen == vocab.end_of_audio:
                break
            ids.append(chosen)
        assert allowed_after(grammar, [*ids, chosen]) == allowed_after(grammar, [*ids, chosen, chosen]) == {chosen}
        lengths.add(num_frames)
    assert lengths == set(range(1, max_frames + 1))


def test_text_is_text_and_no_other_modality():
    vocab = VocabLayout(10, 2, 4, further_modalities=[ModalityRange("image", 6, 8)])
    grammar = text_grammar(vocab, num_text_ids=9, ends=(2,), forbidden=(0, 2))
    assert allowed_after(grammar, []) == allowed_after(grammar, [1, 8]) == {1, 2, 3, 4, 5, 8}
    assert allowed_after(grammar, [1, 2]) == {2}


def test_a_request_longer_than_the_model_is_refused(generator):
    prompt = asr_prompt(generator, 0, 3)
    room = 64 - len(prompt.ids)
    [row] = generator.text([prompt], end=-1, max_new=room, sampling=Sampling())
    assert len(row) == room
    with pytest.raises(ConfigError, match="exceed the model's 64"):
        generator.text([prompt], end=2, max_new=room + 1, sampling=Sampling())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_choices_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(temperature):
    logits, num_draws = torch.tensor([0.0, 1.0, 3.0]), 20_000
    noise = torch.empty(num_draws, 3).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = Sampling(temperature=temperature).choose(logits.expand(num_draws, 3), noise).bincount(minlength=3)
    torch.testing.assert_close(drawn / num_draws, torch.softmax(logits / temperature, -1), rtol=0, atol=0.015)


def test_top_p_keeps_the_best_choice_and_greedy_is_the_limit():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    noise = torch.tensor([[1e-9, 1e9, 1.0]])  # prefers the first, and the last to the second
    assert Sampling(temperature=1.0).choose(logits, noise).tolist() == [0]
    assert Sampling(temperature=1.0, top_p=1e-6).choose(logits, noise).tolist() == [1]
    assert Sampling(temperature=1.0, top_k=1).choose(logits, noise).tolist() == [1]
    assert Sampling(temperature=1.0, top_k=2).choose(logits, noise).tolist() == [2]
    assert Sampling().choose(logits, None).tolist() == [1]


def kept_by(sampling: Sampling, logits: list[float]) -> set[int]:
    """The choices that some noise leads to."""
    noise = torch.full((len(logits), len(logits)), 1e9).fill_diagonal_(1e-9)
    return set(sampling.choose(torch.tensor(logits).expand(len(logits), -1), noise).tolist())


PROBS = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 10}, {0, 1, 2, 3}),  # more than there are
        ({"top_p": 0.35}, {3}),
        ({"top_p": 0.5}, {2, 3}),  # the one that reaches top_p is kept
        ({"top_p": 0.8}, {1, 2, 3}),
        ({"top_p": 0.8, "temperature": 0.5}, {2, 3}),  # of the probabilities at that temperature: 1, 4, 9, 16 of 30
        ({"top_p": 0.75, "top_k": 3}, {2, 3}),  # of the probabilities that top-k leaves: 2, 3, 4 of 9
    ],
)
def test_top_k_and_top_p_keep_the_best_choices(options: dict, kept: set[int]) -> None:
    assert kept_by(Sampling(**{"temperature": 1.0, **options}), torch.tensor(PROBS).log().tolist()) == kept


def test_a_choice_that_brings_the_sum_to_exactly_top_p_is_the_last() -> None:
    assert len(kept_by(Sampling(temperature=1.0, top_p=0.5), [0.0, 0.0])) == 1


def test_choices_are_as_frequent_as_they_are_probable():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    noise = torch.empty(20_000, 3).exponential_(generator=torch.Generator().manual_seed(0))
    counts = Sampling(temperature=1.0).choose(logits, noise).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.01, rtol=0)


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}], ids=str)
def test_choices_take_any_batch_dimensions(options: dict) -> None:
    """Each row for itself, and greedy choices, too."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=random)
    noise = torch.empty(3, 4, 5).exponential_(generator=random)
    sampling = Sampling(temperature=0.8, **options)
    expected = [[sampling.choose(logits[i, j], noise[i, j]).item() for j in range(4)] for i in range(3)]
    assert sampling.choose(logits, noise).tolist() == expected
    assert Sampling().choose(logits, None).tolist() == [[row.argmax().item() for row in rows] for rows in logits]


def test_another_seed_changes_nothing_but_the_stream() -> None:
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.9, seed=1)
    other = sampling.with_seed(2)
    assert other == Sampling(temperature=0.7, top_k=3, top_p=0.9, seed=2)
    streams = [(sampling, b"a"), (other, b"a"), (sampling, b"b")]
    drawn = [torch.rand(4, generator=one.generator(torch.device("cpu"), prompt)).tolist() for one, prompt in streams]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert torch.rand(4, generator=sampling.generator(torch.device("cpu"), b"a")).tolist() == drawn[0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_wrong_sampling_options_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_any_of_several_ids_ends_a_text(generator):
    prompts = [asr_prompt(generator, seed, frames) for seed, frames in enumerate([3, 7, 5])]
    free = generator.text(prompts, end=-1, max_new=12, sampling=Sampling())
    ends = [free[0][4], free[1][7]]
    stopped = generator.text(prompts, end=ends, max_new=12, sampling=Sampling())
    for row, whole in zip(stopped, free, strict=True):
        first = next((place for place, token in enumerate(whole) if token in ends), len(whole))
        assert row == whole[:first]
    assert len(stopped[0]) <= 4 and len(stopped[1]) <= 7
