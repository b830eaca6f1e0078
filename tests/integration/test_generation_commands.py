"""From recordings to a trained checkpoint, a transcript, spoken words and their error rates: every command for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_most.config import DatasetConfig
from megatron_most.data.building.tasks import prompt
from megatron_most.text import load_tokenizer
from megatron_most.vocab import VocabLayout
from tests.distributed.harness import run_ranks
from tests.integration.test_commands import ROOT, run
from tests.integration.tiny_run import run_config, train
from tests.unit.data.tiny import write_wavs

CODEC = ROOT / "examples" / "quickstart" / "codec" / "tiny_codec.nemo"
VOCAB = VocabLayout(text_vocab_size=300, num_codebooks=4, codebook_size=1000)
SEQ_LENGTH = 64
SENTENCES = ("the red fox", "the black dog", "the little king")


def call(tool: str, *arguments: object) -> str:
    """Standard output of a tool that succeeds."""
    status, out, err = run(ROOT / "tools" / f"{tool}.py", *map(str, arguments))
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """``m.jsonl`` and its recordings, ``t.model``, and the checkpoint of three steps in ``run``."""
    pytest.importorskip("nemo.collections.tts.models")
    folder = tmp_path_factory.mktemp("workplace")
    entries = write_wavs(folder / "wav", len(SENTENCES), seconds=0.5)
    lines = [json.dumps({**entry, "text": text}) for entry, text in zip(entries, SENTENCES, strict=True)]
    (folder / "m.jsonl").write_text("\n".join(lines))
    manifest, tokenizer, codes = folder / "m.jsonl", folder / "t.model", folder / "codes"
    call("prepare_data", "tokenizer", "--manifest", manifest, "--vocab-size", 290, "--output", tokenizer)
    call("prepare_data", "tokenize", "--manifest", manifest, "--codec", CODEC, "--output", codes, "--workers", 1)
    for task in ("asr", "tts"):
        build = ("--task", task, "--codes", codes, "--tokenizer", tokenizer, "--output", folder / task)
        call("prepare_data", "build", *build, "--text-vocab-size", VOCAB.text_vocab_size)
    config = run_config(
        folder,
        vocab__text_vocab_size=VOCAB.text_vocab_size,
        vocab__num_codebooks=VOCAB.num_codebooks,
        vocab__codebook_size=VOCAB.codebook_size,
        data__seq_length=SEQ_LENGTH,
        tokenizer=tokenizer,
        codec=CODEC,
        training__train_iters=3,
    )
    config.data.train = [DatasetConfig(str(folder / task)) for task in ("asr", "tts")]
    config.data.validation = []
    run_ranks(1, train, config)
    return folder


def test_a_recording_becomes_the_same_text_by_generation_and_by_evaluation(workplace):
    tokenizer = load_tokenizer(workplace / "t.model")
    num_frames = -(-soundfile.info(workplace / "wav" / "0.wav").frames * 2 // 640)  # from 8 to 16 kHz
    codes = np.zeros((num_frames, VOCAB.num_codebooks), dtype=np.int64)
    room = SEQ_LENGTH - len(prompt("asr", VOCAB, tokenizer, codes=codes).ids)
    checkpoint, output = ("--checkpoint", workplace / "run"), workplace / "new" / "transcript.txt"
    asr = ("--task", "asr", "--input", workplace / "wav" / "0.wav", "--max-new-tokens", room)
    assert call("generate", *checkpoint, *asr, "--output", output) == f"{output}: 1 transcript\n"
    transcript = output.read_text(encoding="utf-8")
    printed = call("generate", *checkpoint, *asr)
    assert printed == transcript

    result = workplace / "new" / "asr.json"
    data = ("--suite", "asr", "--data", workplace / "m.jsonl", "--limit", 1, "--output", result)
    out = call("evaluate", *checkpoint, *data)
    evaluation = json.loads(result.read_text(encoding="utf-8"))
    assert [item["hypothesis"] + "\n" for item in evaluation["items"]] == [transcript]
    assert evaluation["items"][0]["reference"] == SENTENCES[0]
    assert evaluation["wer"] > 0 and evaluation["normalizer"] == "whisper-english"
    assert evaluation["wer_interval"] is None and evaluation["num_failed"] == 0
    summary = f"asr m: WER {evaluation['wer']:.2%} on 1 utterances (normalizer: whisper-english)"
    at_limit = "; answers that reached their limit: 1" if evaluation["num_at_limit"] else ""
    assert out == f"{summary}{at_limit}\n"


def test_an_answer_that_reaches_its_limit_is_marked(workplace):
    checkpoint, recording = ("--checkpoint", workplace / "run"), workplace / "wav" / "0.wav"
    asr = ("--task", "asr", "--input", recording, "--max-new-tokens", 1)
    status, _, err = run(ROOT / "tools" / "generate.py", *map(str, (*checkpoint, *asr)))
    assert status == 0
    assert f"warning: {recording}: the answer reached its limit (--max-new-tokens=1); its end may be missing" in err
    output = workplace / "new" / "cut.wav"
    tts = ("--task", "tts", "--input", "the fox", "--max-seconds", 0.04, "--output", output)
    status, _, err = run(ROOT / "tools" / "generate.py", *map(str, (*checkpoint, *tts)))
    assert status == 0
    assert f"warning: {output}: the answer reached its limit (--max-seconds=0.04); its end may be missing" in err


def test_an_utterance_longer_than_the_context_is_one_failed_item(workplace):
    lines = [json.loads(line) for line in (workplace / "m.jsonl").read_text().splitlines()[:1]]
    entries = write_wavs(workplace / "long", 1, seconds=4.0)
    lines.append({**entries[0], "id": "long", "text": "two words"})
    (workplace / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = workplace / "new" / "mixed.json"
    data = ("--suite", "asr", "--data", workplace / "mixed.jsonl", "--output", result)
    out = call("evaluate", "--checkpoint", workplace / "run", *data)
    evaluation = json.loads(result.read_text(encoding="utf-8"))
    good, failed = evaluation["items"]
    assert "failed" not in good
    assert failed["hypothesis"] == "" and "data.seq_length is 64" in failed["failed"]
    assert (evaluation["num_utterances"], evaluation["num_failed"]) == (2, 1)
    assert "; failed and counted as wrong: 1, first long: a prompt of" in out


def test_text_becomes_sound_that_a_recognizer_judges(workplace):
    pytest.importorskip("pocketsphinx")
    wav, text = workplace / "new" / "speech.wav", workplace / "say.txt"
    text.write_text(SENTENCES[1] + "\n")
    speak = ("--checkpoint", workplace / "run", "--task", "tts", "--temperature", 1.0, "--max-seconds", 0.4)
    written = []
    for words in ([SENTENCES[1]], [text], SENTENCES[1].split()):
        wav.unlink(missing_ok=True)
        call("generate", *speak, "--input", *words, "--output", wav)
        written.append(wav.read_bytes())
    assert written == [written[0]] * 3
    sound = soundfile.info(wav)
    assert sound.samplerate == 16000 and sound.frames % 640 == 0 and 1 <= sound.frames // 640 <= 10

    result = workplace / "new" / "tts.json"
    data = ("--suite", "tts", "--data", workplace / "m.jsonl", "--max-seconds", 0.4, "--output", result)
    call("evaluate", "--checkpoint", workplace / "run", *data)
    evaluation = json.loads(result.read_text(encoding="utf-8"))
    assert [item["reference"] for item in evaluation["items"]] == list(SENTENCES)
    words = {word for sentence in SENTENCES for word in sentence.split()}
    assert all(set(item["hypothesis"].split()) <= words for item in evaluation["items"])


def test_a_failed_generation_leaves_no_file(workplace):
    output = workplace / "too_long.wav"
    arguments = ("--checkpoint", workplace / "run", "--task", "tts", "--input", "a " * 99, "--output", output)
    status, _, err = run(ROOT / "tools" / "generate.py", *map(str, arguments))
    assert status == 1 and "exceed the model's 64" in err.splitlines()[-1]
    assert not list(workplace.glob("*too_long*"))
