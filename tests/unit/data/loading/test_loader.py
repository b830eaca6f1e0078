"""The loader: one stream of samples at any data-parallel size and after any resume; mismatched datasets are refused."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_most.audio import file_fingerprint
from megatron_most.data.loading import loader as module
from megatron_most.data.loading.blend import Rows
from megatron_most.data.loading.loader import open_datasets, train_batches, validation_batches
from megatron_most.data.storage.documents import TASKS
from megatron_most.errors import ConfigError, DataError
from tests.unit.data.tiny import LetterTokenizer, layout, run_config, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    write_dataset(folder / "asr", "asr", 40, seed=1)
    write_dataset(folder / "tts", "tts", 30, seed=2)
    write_dataset(folder / "held", "tts", 11, seed=3)
    return folder


def config_of(folder, **overrides):
    train = [(folder / "asr", 1.0), (folder / "tts", 2.0)]
    return run_config(train, [folder / "held"], audio_frame_dropout=0.3, **overrides)


def step_rows(config, dp_size: int, consumed: int, steps: int) -> list[list[tuple]]:
    """The rows of each step, in the order of their numbers, from all ranks and micro-batches."""
    size = config.training.micro_batch_size
    num_microbatches = config.num_microbatches(dp_size)
    streams = [train_batches(config, dp_rank=r, dp_size=dp_size, consumed_samples=consumed) for r in range(dp_size)]
    result = []
    for _ in range(steps):
        parts = [[next(stream) for _ in range(num_microbatches)] for stream in streams]
        rows = []
        for microbatch, rank, row in itertools.product(range(num_microbatches), range(dp_size), range(size)):
            rows.append(_row(parts[rank][microbatch], row))
        result.append(rows)
    return result


def epochs_read(config, steps: int) -> list[float]:
    """Epochs of each dataset after ``steps``."""
    data = config.data
    rows = Rows(open_datasets(config, data.train), [entry.weight for entry in data.train], data, config.seed)
    read = np.bincount(rows._block[: steps * config.training.global_batch_size], minlength=len(data.train))
    return (read / np.array(rows.rows_per_epoch)).tolist()


def _row(batch, row: int) -> tuple:
    return tuple(value[row].numpy().tobytes() for _, value in batch._by_position())


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dp_size=st.sampled_from([1, 2, 4]), resumed_at=st.integers(0, 6), packing=st.booleans(), seed=st.integers(0, 99))
def test_the_stream_is_the_same_at_any_data_parallel_size_and_after_any_resume(
    folder, dp_size, resumed_at, packing, seed
):
    config = config_of(folder, packing=packing, micro_batch_size=1 if packing else 2, seed=seed)
    undisturbed = step_rows(config, 1, 0, 8)
    assert max(epochs_read(config, 8)) > 1  # an epoch ends among these steps
    resumed = step_rows(config, dp_size, resumed_at * 8, 8 - resumed_at)
    assert resumed == undisturbed[resumed_at:]
    assert undisturbed[0] != undisturbed[1]


def test_micro_batches_follow_the_written_order(folder):
    config = config_of(folder, packing=False, micro_batch_size=2)
    rows = [_row(batch, r) for batch in itertools.islice(_stream(config, 0, 1), 4) for r in range(2)]
    second_rank = [_row(batch, r) for batch in itertools.islice(_stream(config, 1, 2), 2) for r in range(2)]
    assert second_rank == [rows[2], rows[3], rows[6], rows[7]]  # (m * 2 + 1) * 2 for m in 0, 1


def _stream(config, rank, size):
    return train_batches(config, dp_rank=rank, dp_size=size, consumed_samples=0)


def test_the_audio_share_of_the_config_is_that_of_the_batches(folder):
    def share(**overrides) -> float:
        batches = list(itertools.islice(_stream(config_of(folder, **overrides), 0, 1), 400))
        audio = sum(int((batch.modality == 1).sum()) for batch in batches)
        return audio / sum(int((~batch.is_padding).sum()) for batch in batches)

    assert abs(share(audio_share=0.3) - 0.3) < 0.01 < abs(share() - 0.3)
    with pytest.raises(ConfigError, match=r"data\.audio_share=0.9: must be between 0.* the datasets' audio shares"):
        share(audio_share=0.9)


def test_the_global_batch_size_may_change_between_runs(folder):
    before, after = config_of(folder, global_batch_size=8), config_of(folder, global_batch_size=4)
    stream = [row for step in step_rows(before, 1, 0, 3) for row in step]
    assert [row for step in step_rows(after, 2, 8, 4) for row in step] == stream[8:]


@pytest.mark.parametrize("documents", ["training", "validation"])
def test_packed_documents_start_at_multiples_and_rows_know_nothing_of_context_parallelism(folder, documents):
    def batches(**overrides):
        config = config_of(folder, document_multiple=8, **overrides)
        if documents == "training":
            return list(itertools.islice(_stream(config, 0, 1), 8))
        return validation_batches(config, dp_rank=0, dp_size=1)["held"]

    alone, shared = batches(), batches(parallel={"context_parallel_size": 4})
    assert [_row(batch, 0) for batch in alone] == [_row(batch, 0) for batch in shared]
    for batch in alone:
        assert (batch.cu_seqlens % 8 == 0).all() and len(batch.cu_seqlens) > 2


@pytest.mark.parametrize("packing", [True, False])
def test_validation_covers_the_dataset_once_with_equally_many_batches_on_every_rank(folder, packing):
    config = config_of(folder, packing=packing, micro_batch_size=1 if packing else 2)
    whole = validation_batches(config, dp_rank=0, dp_size=1)["held"]
    documents = sum(int(((batch.ids == LetterTokenizer.bos_id) & ~batch.is_padding).sum()) for batch in whole)
    assert documents == 11
    ranks = [validation_batches(config, dp_rank=rank, dp_size=4)["held"] for rank in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    targets = sum(batch.loss_mask.sum() for batches in ranks for batch in batches)
    assert targets == sum(batch.loss_mask.sum() for batch in whole)
    assert all((batch.task == TASKS.index("tts")).all() for batches in ranks for batch in batches)
    rows = {row for b in whole for row in _filled_rows(b)}
    assert {row for batches in ranks for b in batches for row in _filled_rows(b)} == rows


def _filled_rows(batch) -> list[tuple]:
    return [_row(batch, row) for row in range(len(batch.ids)) if not batch.is_padding[row].all()]


def test_validation_is_the_same_for_every_seed_and_hides_nothing(folder):
    first = validation_batches(config_of(folder, seed=1), dp_rank=0, dp_size=1)["held"]
    second = validation_batches(config_of(folder, seed=2), dp_rank=0, dp_size=1)["held"]
    assert [_row(batch, 0) for batch in first] == [_row(batch, 0) for batch in second]
    frames = torch.cat([batch.ids[0] for batch in first]) == layout().frame
    assert (torch.cat([batch.codes[0] for batch in first])[frames] >= 0).all()


def test_validation_is_limited_by_eval_batches(folder):
    config = config_of(folder, packing=False, micro_batch_size=2, global_batch_size=4, eval_iters=2)
    assert len(validation_batches(config, dp_rank=0, dp_size=1)["held"]) == 4
    assert len(validation_batches(config, dp_rank=0, dp_size=2)["held"]) == 2


def test_validation_names_must_differ(folder):
    config = run_config([], [folder / "held", folder / "held"])
    with pytest.raises(ConfigError, match="2 datasets are named 'held'"):
        validation_batches(config, dp_rank=0, dp_size=1)


def test_training_needs_data_and_a_batch_size_that_divides(folder):
    with pytest.raises(ConfigError, match=r"data\.train=\[\]"):
        train_batches(run_config([]), dp_rank=0, dp_size=1, consumed_samples=0)
    with pytest.raises(ConfigError, match=r"training\.global_batch_size=8"):
        train_batches(config_of(folder), dp_rank=0, dp_size=3, consumed_samples=0)


def refusal(*paths, **overrides) -> str:
    with pytest.raises(DataError) as caught:
        train_batches(
            run_config([(path, 1.0) for path in paths], **overrides), dp_rank=0, dp_size=1, consumed_samples=0
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_layout_is_refused_naming_both(folder, tmp_path):
    write_dataset(tmp_path / "flat", "tts", 2, layout_name="flat")
    assert "flat: its vocabulary differs from the configuration's: layout: flat != frame" in refusal(tmp_path / "flat")


def provenance(tokenizer="letters", codec="0" * 64, template="1") -> dict:
    return {
        "tokenizer": {"name": "t.model", "fingerprint": tokenizer},
        "codec": {"name": "tiny", "fingerprint": codec} if codec else None,
        "template_version": template,
    }


def test_another_tokenizer_is_refused_naming_both(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_tokenizer", lambda path: LetterTokenizer())
    write_dataset(tmp_path / "good", "tts", 2, provenance=provenance())
    write_dataset(tmp_path / "bad", "tts", 2, provenance=provenance(tokenizer="digits"))
    message = refusal(tmp_path / "good", tmp_path / "bad", tokenizer="mine.model")
    assert "bad: was built with tokenizer t.model (digits), the configuration has mine.model (letters)" in message


def test_another_codec_is_refused_naming_both(tmp_path):
    (tmp_path / "codec.nemo").write_bytes(b"weights")
    write_dataset(tmp_path / "bad", "tts", 2, provenance=provenance())
    message = refusal(tmp_path / "bad", codec=str(tmp_path / "codec.nemo"))
    assert "bad: was built with codec tiny (000000000000), the configuration has" in message
    assert f"codec.nemo ({file_fingerprint(tmp_path / 'codec.nemo')[:12]})" in message
    message = refusal(tmp_path / "bad", codec="nvidia/other")
    assert "was built with codec tiny, the configuration has nvidia/other" in message


def test_a_codec_of_another_name_but_the_same_weights_is_accepted(tmp_path):
    path = tmp_path / "codec.nemo"
    path.write_bytes(b"weights")
    write_dataset(tmp_path / "data", "tts", 2, provenance=provenance(codec=file_fingerprint(path)))
    config = run_config([(tmp_path / "data", 1.0)], codec=str(path))
    assert len(open_datasets(config, config.data.train)) == 1


def test_the_seed_of_the_config_determines_the_rows(folder):
    first, second = (next(_stream(config_of(folder, seed=seed), 0, 1)) for seed in (1, 2))
    assert _row(first, 0) != _row(second, 0)


def test_a_codec_file_that_is_gone_is_named(tmp_path):
    write_dataset(tmp_path / "data", "tts", 2, provenance=provenance())
    with pytest.raises(ConfigError, match="codec gone.nemo: no such file"):
        train_batches(
            run_config([(tmp_path / "data", 1.0)], codec="gone.nemo"), dp_rank=0, dp_size=1, consumed_samples=0
        )


@pytest.mark.parametrize(
    ("difference", "what"),
    [
        ({"tokenizer": "digits"}, "tokenizers"),
        ({"codec": "1" * 64}, "codecs"),
        ({"template": "2"}, "template versions"),
    ],
)
def test_datasets_that_differ_from_each_other_are_refused(tmp_path, difference, what):
    write_dataset(tmp_path / "one", "tts", 2, provenance=provenance())
    write_dataset(tmp_path / "two", "asr", 2, provenance=provenance(**difference))
    message = refusal(tmp_path / "one", tmp_path / "two")
    assert f"one and {tmp_path}/two were built with different {what}" in message


def test_text_without_a_codec_goes_with_any(tmp_path):
    write_dataset(tmp_path / "speech", "tts", 2, provenance=provenance())
    write_dataset(tmp_path / "text", "text_lm", 2, provenance=provenance(codec=None))
    config = run_config([(tmp_path / "speech", 1.0), (tmp_path / "text", 1.0)], codec="tiny")
    assert next(train_batches(config, dp_rank=0, dp_size=1, consumed_samples=0)).ids.shape == (1, 64)


def test_a_broken_document_is_named_when_it_is_met(tmp_path):
    write_dataset(tmp_path / "data", "tts", 1)
    path = tmp_path / "data.ids.bin"
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    stream = train_batches(run_config([(tmp_path / "data", 1.0)]), dp_rank=0, dp_size=1, consumed_samples=0)
    with pytest.raises(DataError, match="data, document 0, offset 0: id 255 is outside the layout"):
        next(stream)
