"""Rows: each document once per epoch, weights are shares of tokens, and row k depends only on k."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_most.config import DataConfig
from megatron_most.data.loading.batch import make_batch
from megatron_most.data.loading.blend import _EPOCH, BLOCK, Rows, _blend, _stream, weights_for_audio_share
from megatron_most.data.storage.documents import TASKS
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import ConfigError, DataError
from tests.unit.data.tiny import LAYOUTS, hidden_of, parts_of, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    write_dataset(folder / "asr", "asr", 60, seed=1)
    write_dataset(folder / "tts", "tts", 37, seed=2)
    write_dataset(folder / "text", "text_lm", 80, seed=3)
    write_dataset(folder / "tts_flat", "tts", 37, layout_name="flat", seed=2)
    return folder


def open_rows(folder, names, weights, **options) -> Rows:
    seed = options.pop("seed", 5)
    data = DataConfig(**({"seq_length": 96, "packing": True} | options))
    return Rows([TokenDataset(folder / name) for name in names], weights, data, seed)


def content(row) -> list[bytes]:
    return [document.ids.tobytes() for document in parts_of(row)]


@pytest.mark.parametrize("packing", [True, False])
def test_each_document_appears_once_an_epoch(folder, packing):
    rows = open_rows(folder, ["asr"], [1.0], packing=packing)
    per_epoch = rows.rows_per_epoch[0]
    assert per_epoch == 60 if not packing else per_epoch < 40
    epochs = [[part for k in range(e * per_epoch, (e + 1) * per_epoch) for part in content(rows[k])] for e in range(3)]
    assert len(set(epochs[0])) == 60
    for epoch in epochs:
        assert sorted(epoch) == sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("multiple", [1, 8])
def test_rows_never_exceed_their_length(folder, multiple):
    rows = open_rows(folder, ["asr", "tts", "text"], [1.0, 1.0, 1.0], document_multiple=multiple)
    taken = [sum(-(-(len(document) - 1) // multiple) * multiple for document in parts_of(rows[k])) for k in range(300)]
    assert max(taken) <= 96 and min(len(rows[k].lengths) for k in range(300)) > 1


def test_each_document_appears_once_an_epoch_whatever_it_is_padded_to(folder):
    rows = open_rows(folder, ["asr"], [1.0], document_multiple=8)
    (per_epoch,) = rows.rows_per_epoch
    first, second = (
        [part for k in range(start, start + per_epoch) for part in content(rows[k])] for start in (0, per_epoch)
    )
    assert len(set(first)) == 60 and sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("names", [["asr"], ["asr", "tts"]])
def test_the_rows_of_a_dataset_go_on_where_the_order_of_datasets_repeats(folder, names):
    rows = open_rows(folder, names, [1.0] * len(names), packing=False)
    is_asr = rows._block == 0
    per_block = int(is_asr.sum())
    epoch = per_block // 60  # the epoch of the 60 documents in which the first block ends
    places = np.flatnonzero(np.concatenate([is_asr, is_asr]))[epoch * 60 : (epoch + 1) * 60]
    assert places[0] < BLOCK <= places[-1]
    assert len({part for k in places for part in content(rows[int(k)])}) == 60


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([100.9, 200.9, BLOCK - 301.8], [101, 201, BLOCK - 302]),
        ([1e-9, 1e-9, 0.3 * BLOCK, 0.7 * BLOCK], [1, 1, 19660, 45874]),
    ],
)
def test_rows_of_a_block_go_to_the_largest_remainders_and_to_every_dataset(shares, expected):
    dataset_of, rank, counts = _blend(np.array(shares), np.zeros(len(shares)), seed=0)
    assert counts.tolist() == np.bincount(dataset_of).tolist() == expected
    for index, count in enumerate(expected):
        assert rank[dataset_of == index].tolist() == list(range(count))


def test_datasets_of_equal_weight_get_their_rows_in_order():
    """Also where there are so many that a machine's quickest way of sorting would not keep the order of equal ones."""
    _, _, counts = _blend(np.ones(40), np.zeros(40), seed=0)
    assert counts.tolist() == [BLOCK // 40 + 1] * (BLOCK % 40) + [BLOCK // 40] * (40 - BLOCK % 40)


@pytest.mark.parametrize("packing", [True, False])
def test_documents_of_equal_length_are_exchanged_alike_on_every_machine(folder, packing):
    """Places of equal length are numbered in order, and take the documents of that length as they were shuffled."""
    [stream] = open_rows(folder, ["asr"], [1.0], packing=packing)._streams
    stream.row(0)
    slots = stream._slots_by_length
    shuffled = _stream(5, _EPOCH, 0, 0).permutation(60)
    place_of = np.argsort(shuffled)
    documents = stream._shuffled.document_in_slot[slots]
    lengths = stream._lengths[documents]
    assert (np.diff(lengths) >= 0).all() and len(np.unique(lengths)) < 50
    for length in np.unique(lengths):
        assert (np.diff(slots[lengths == length]) > 0).all()
        assert (np.diff(place_of[documents[lengths == length]]) > 0).all()


@pytest.mark.parametrize(("packing", "multiple"), [(True, 1), (True, 8), (False, 1)])
def test_sources_say_where_the_documents_of_a_row_are(folder, packing, multiple):
    names = ["asr", "tts", "text"]
    rows = open_rows(folder, names, [1.0, 1.0, 1.0], packing=packing, document_multiple=multiple)
    datasets = {str(folder / name): TokenDataset(folder / name) for name in names}
    data = DataConfig(seq_length=96, packing=packing, document_multiple=multiple)
    for k in (0, 3, 40, BLOCK + 1):
        row, sources = rows[k], rows.sources(k)
        dataset = datasets[sources.dataset]
        assert (sources.row, sources.task) == (k, TASKS[row.task]) == (k, dataset.task)
        assert sources.lengths == row.lengths.tolist() == [len(part) for part in parts_of(row)]
        batch = make_batch([row], dataset.vocab, data)
        assert len(sources.offsets) == len(sources.documents) == len(row.lengths)
        for document, offset in zip(sources.documents, sources.offsets, strict=True):
            ids = dataset.read(np.array([document])).ids[:-1]
            assert batch.ids[0, offset : offset + len(ids)].tolist() == ids.tolist()


def test_a_run_may_go_on_in_any_epoch(folder):
    for epoch in (1, 2):
        rows = open_rows(folder, ["asr"], [1.0], packing=False)
        first = epoch * rows.rows_per_epoch[0]
        assert len({content(rows[k])[0] for k in range(first, first + 60)}) == 60


def test_neighbors_change_between_epochs(folder):
    rows = open_rows(folder, ["text"], [1.0])
    per_epoch = rows.rows_per_epoch[0]
    first = {frozenset(content(rows[k])) for k in range(per_epoch)}
    second = {frozenset(content(rows[k])) for k in range(per_epoch, 2 * per_epoch)}
    assert not first & second


@pytest.mark.parametrize("packing", [True, False])
def test_rows_come_in_another_order_in_every_epoch(folder, packing):
    """Rows are recognized by their lengths: documents of equal length are exchanged, but a row keeps its lengths."""
    rows = open_rows(folder, ["asr"], [1.0], packing=packing)
    (per_epoch,) = rows.rows_per_epoch
    epochs = [[tuple(rows[k].lengths) for k in range(e * per_epoch, (e + 1) * per_epoch)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    for first, second in itertools.combinations(epochs, 2):
        in_place = sum(a == b for a, b in zip(first, second, strict=True))
        assert in_place < per_epoch / 2


def test_a_row_depends_on_its_number_alone(folder):
    def open_it(**options):
        return open_rows(folder, ["asr", "tts", "text"], [2.0, 1.0, 1.0], audio_frame_dropout=0.5, **options)

    in_order = open_it()
    expected = {k: in_order[k] for k in range(200)}
    shuffled = open_it()
    for k in np.random.default_rng(0).permutation(200):
        row = shuffled[int(k)]
        assert content(row) == content(expected[k]) and row.task == expected[k].task
        np.testing.assert_array_equal(row.hidden, expected[k].hidden)
    other_seed = open_it(seed=6)
    assert sum(content(other_seed[k]) == content(expected[k]) for k in range(200)) < 20


def packed_lengths(stream) -> list[tuple[int, ...]]:
    """Which lengths share a row, in no particular order."""
    return sorted(tuple(sorted(stream.dataset.lengths[stream.row(k)])) for k in range(stream.num_rows))


def test_the_seed_and_the_dataset_determine_packing_and_order(folder):
    rows, other = (open_rows(folder, ["asr", "asr", "text"], [1.0, 1.0, 1.0], seed=seed) for seed in (5, 6))
    first, second, _ = rows._streams
    assert packed_lengths(first) != packed_lengths(second)
    assert packed_lengths(first) != packed_lengths(other._streams[0])
    assert (rows._block != other._block).any()
    # Unpacked, both copies have equally many rows: generators in the same state would shuffle them equally.
    first, second = open_rows(folder, ["asr", "asr"], [1.0, 1.0], packing=False)._streams
    first.row(0), second.row(0)  # shuffles the first epoch
    assert (first._shuffled.row_order != second._shuffled.row_order).any()


def test_hidden_frames_depend_on_the_seed_and_the_row(folder):
    dataset = TokenDataset(folder / "tts")
    document = dataset.read(np.arange(20))

    def hidden(seed: int, k: int) -> bytes:
        rows = open_rows(folder, ["tts"], [1.0], seed=seed, audio_frame_dropout=0.5)
        return rows._hide_frames(document, dataset, k).tobytes()

    assert len({hidden(5, 0), hidden(5, 1), hidden(6, 0)}) == 3 and hidden(5, 0) == hidden(5, 0)


def test_a_document_may_fill_a_row(folder):
    longest = int(TokenDataset(folder / "asr").lengths.max()) - 1
    assert max(rows_taken(open_rows(folder, ["asr"], [1.0], seq_length=longest))) == longest
    with pytest.raises(DataError, match=f"the longest needs {longest}"):
        open_rows(folder, ["asr"], [1.0], seq_length=longest - 1)


def rows_taken(rows: Rows) -> list[int]:
    """Input positions of the rows of an epoch."""
    return [int((rows[k].lengths - 1).sum()) for k in range(rows.rows_per_epoch[0])]


@pytest.mark.parametrize(("packing", "multiple"), [(True, 1), (True, 8), (False, 1)])
def test_weights_are_shares_of_tokens(folder, packing, multiple):
    options = {"packing": packing, "document_multiple": multiple}
    rows = open_rows(folder, ["asr", "tts", "text"], [5.0, 3.0, 2.0], **options)
    tokens = Counter()
    for k in range(1500):
        tokens[TASKS[rows[k].task]] += sum(len(document) - 1 for document in parts_of(rows[k]))
    shares = [tokens[task] / tokens.total() for task in ("asr", "tts", "text_lm")]
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.01)


def stretches_off(of_kind: np.ndarray, length: int) -> float:
    """The largest deviation from its share, in rows, of a kind of rows among ``length`` consecutive ones."""
    counts = np.convolve(of_kind.astype(float), np.ones(length), mode="valid")
    return float(np.abs(counts - of_kind.mean() * length).max())


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [5, 1, 2, 8], [40, 40, 10, 10]])
@pytest.mark.parametrize("length", [2, 4, 8, 16, 64])
def test_any_rows_in_a_row_hold_their_share_of_each_dataset_and_of_audio(folder, weights, length):
    """The ranks of an expert-parallel group read consecutive rows in every micro-batch."""
    names = ["asr", "tts", "text", "tts"]
    rows = open_rows(folder, names, weights)
    block, audio_shares = rows._block, np.array([TokenDataset(folder / name).audio_share for name in names])
    for index in range(4):
        assert stretches_off(block == index, length) < 2.5
    is_audio = audio_shares[block] > 0
    assert stretches_off(is_audio, length) < 2.5
    shuffled = np.random.default_rng(0).permutation(is_audio)
    assert length < 8 or stretches_off(shuffled, length) > 1.5 * stretches_off(is_audio, length)
    # The same for tokens: audio per group of ranks varies less than half as much as with random draws.
    groups = audio_shares[block[: len(block) // length * length]].reshape(-1, length).mean(axis=1)
    assert length < 8 or groups.std() < 0.5 * audio_shares[block].std() / length**0.5


def test_no_data_parallel_rank_always_meets_the_same_dataset(folder):
    block = open_rows(folder, ["asr", "tts"], [1.0, 1.0], packing=False)._block
    for size in range(2, 65):
        for rank in range(size):
            assert abs(block[rank::size].mean() - block.mean()) < 0.03


def test_proportions_hold_over_ten_thousand_rows(folder):
    names, weights = ["asr", "tts", "text"], np.array([0.4, 0.35, 0.25])
    rows = open_rows(folder, names, weights)
    lengths = {name: TokenDataset(folder / name).lengths for name in names}
    tokens = np.zeros(3)
    for k in range(10_000):
        index = int(rows._block[k])
        stream = rows._streams[index]
        tokens[index] += (lengths[names[index]][stream.row(int(rows._rank_in_block[k]))] - 1).sum()
    np.testing.assert_allclose(tokens / tokens.sum(), weights, atol=0.005)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.35])
def test_the_blend_has_the_audio_share_that_is_asked_for(folder, target):
    datasets = [TokenDataset(folder / name) for name in ("asr", "tts", "text")]
    shares = [dataset.audio_share for dataset in datasets]
    weights = weights_for_audio_share([3.0, 1.0, 2.0], shares, target)
    rows = Rows(datasets, weights, DataConfig(seq_length=96, packing=True), seed=3)
    audio = total = 0
    for k in range(3000):
        for document in parts_of(rows[k]):
            audio += datasets[0].vocab.is_audio(document.ids[:-1]).sum()
            total += len(document) - 1
    assert abs(audio / total - target) < 0.005


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1)), min_size=2, max_size=6),
    st.floats(0.02, 0.98),
)
def test_weights_are_changed_as_little_as_the_share_allows(datasets, place):
    weights, shares = (np.array(values) for values in zip(*datasets, strict=True))
    assume(np.ptp(shares) > 0.01)
    target = shares.min() + place * np.ptp(shares)
    found = weights_for_audio_share(weights, shares, target)
    assert found @ shares == pytest.approx(target, abs=1e-6) and found.sum() == pytest.approx(1)
    # A target that the weights already meet changes nothing.
    base = weights / weights.sum()
    same = weights_for_audio_share(weights, shares, float(np.clip(base @ shares, shares.min(), shares.max())))
    np.testing.assert_allclose(same, base, atol=1e-6)
    logs = np.log(found / base)
    order = np.argsort(shares)
    monotonous = np.diff(logs[order]) * np.sign(target - base @ shares)
    assert (monotonous > -1e-6).all()


@pytest.mark.parametrize("target", [0.05, 0.1, 0.8, 0.9])
def test_an_audio_share_out_of_reach_is_refused(target):
    """So are the shares of the datasets themselves: no weights above zero meet them."""
    with pytest.raises(ConfigError, match=rf"data.audio_share={target}: must be between 0.100 and 0.800"):
        weights_for_audio_share([1, 1], [0.1, 0.8], target)


def test_the_order_goes_on_after_a_block(folder):
    rows = open_rows(folder, ["asr", "text"], [0.99, 0.01], packing=False)
    before, after = [rows[k] for k in (BLOCK - 1, BLOCK)]
    assert len(before.lengths) == len(after.lengths) == 1
    # The epoch of the larger dataset goes on across the border: no document is skipped or repeated.
    around = [rows[k] for k in range(BLOCK - 150, BLOCK + 150)]
    seen = Counter(content(row)[0] for row in around if row.task == 0)
    assert set(seen.values()) <= {4, 5, 6}


def test_a_dataset_of_tiny_weight_is_not_lost(folder):
    rows = open_rows(folder, ["asr", "text"], [1.0, 1e-9])
    assert (rows._block == 1).sum() == 1 and len(rows._block) == BLOCK


def test_documents_that_do_not_fit_are_counted(folder):
    with pytest.raises(
        DataError, match=r"asr: \d+ of 60 documents do not fit data.seq_length=20 \(the longest needs 2\d\)"
    ):
        open_rows(folder, ["asr"], [1.0], seq_length=20)


@pytest.mark.parametrize("name", ["tts", "tts_flat"])
def test_hidden_frames_are_whole_random_and_of_the_right_share(folder, name):
    rows = open_rows(folder, [name], [1.0], seq_length=200, audio_frame_dropout=0.4)
    per_frame = 3 if name == "tts_flat" else 1
    hidden = frames = 0
    for k in range(150):
        row = rows[k]
        for document, mask in zip(parts_of(row), hidden_of(row), strict=True):
            audio = document.ids >= 42  # from `frame` on
            assert not mask[~audio].any()
            by_frame = mask[audio].reshape(-1, per_frame)
            assert (by_frame.all(axis=1) == by_frame.any(axis=1)).all()
            hidden, frames = hidden + by_frame[:, 0].sum(), frames + len(by_frame)
    assert abs(hidden / frames - 0.4) < 0.03


def test_frames_without_loss_are_never_hidden(folder):
    rows = open_rows(folder, ["asr"], [1.0], audio_frame_dropout=0.9)
    assert not any(rows[k].hidden.any() for k in range(20))


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_an_empty_dataset_is_refused(tmp_path, layout_name, monkeypatch):
    dataset = write_dataset(tmp_path / "data", "asr", 1, layout_name=layout_name)
    dataset.lengths = dataset.lengths[:0]
    with pytest.raises(DataError, match="data: holds no documents"):
        Rows([dataset], [1.0], DataConfig(seq_length=96, packing=True), seed=0)
