"""Files of version 0.1 can still be read: it wrote ``version_0_1/``, three utterances of a toy codec.

Its sidecars say ``licence``, ``licences`` and ``tokenised``.
"""

import io
import json
from pathlib import Path

import numpy as np
import soundfile

from megatron_most.checkpointing.metadata import Fingerprint
from megatron_most.data.building import build as building
from megatron_most.data.building.build import Inputs, build_dataset
from megatron_most.data.building.vocab_options import VocabOptions
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.data.storage.inspection import audio_of, summary
from megatron_most.data.storage.sidecar import with_current_keys
from megatron_most.data.storage.token_dataset import TokenDataset
from tests.unit.data.tiny import LetterTokenizer, LoudnessCodec, example_document, layout

FOLDER = Path(__file__).parent / "version_0_1"


def waveform(number: int) -> np.ndarray:
    """The waveform of utterance ``number``, as a 16-bit WAV file rounded it."""
    samples = np.random.default_rng(number).uniform(-0.5, 0.5, 600 + 100 * number).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, samples, 8000, format="WAV")
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def test_the_fixture_is_of_version_0_1():
    assert '"licence": "CC BY 4.0"' in (FOLDER / "codes.json").read_text()
    assert '"tokenised": 3' in (FOLDER / "codes.json").read_text()
    assert '"licences"' in (FOLDER / "train_asr.json").read_text()


def test_codes_are_read_with_their_provenance():
    codes = CodesDataset(FOLDER / "codes")
    for number, utterance in enumerate(codes):
        assert (utterance.id, utterance.text) == (f"u{number}", f"fox {'abc'[number]}")
        np.testing.assert_array_equal(utterance.codes, LoudnessCodec().encode(waveform(number)))
    assert codes.provenance["source"]["licenses"] == {"CC0": 2, "MIT": 1}
    assert codes.provenance["source"]["options"]["license"] == "CC BY 4.0"
    assert codes.provenance["counts"]["tokenized"] == 3
    assert "licence" not in json.dumps(codes.provenance) and "tokenised" not in json.dumps(codes.provenance)


def test_a_dataset_is_read_with_its_provenance():
    dataset = TokenDataset(FOLDER / "train_asr")
    for number, document in enumerate(dataset):
        codes = LoudnessCodec().encode(waveform(number))
        expected = example_document("asr", layout(), f"fox {'abc'[number]}", codes)
        np.testing.assert_array_equal(document.ids, expected.ids)
        np.testing.assert_array_equal(document.loss_mask, expected.loss_mask)
        np.testing.assert_array_equal(document.side_codes, expected.side_codes)
        np.testing.assert_array_equal(audio_of(document, dataset.vocab)[0], codes)
    assert dataset.provenance["licenses"] == {"codes": {"CC0": 2, "MIT": 1}}
    assert summary(dataset).endswith("3 documents, 78 positions (18 with loss), 21 audio frames")


def test_a_dataset_is_built_of_its_codes_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "load_tokenizer", lambda path: LetterTokenizer())
    monkeypatch.chdir(tmp_path)
    for path in FOLDER.glob("codes.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    build_dataset("train_asr", "asr", "t.model", Inputs(["codes"]), VocabOptions(text_vocab_size=40), command="build")
    for path in FOLDER.glob("train_asr.*.*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    expected = with_current_keys(json.loads((FOLDER / "train_asr.json").read_text()))
    written = json.loads((tmp_path / "train_asr.json").read_text())
    assert written["provenance"].pop("tool_version") and expected["provenance"].pop("tool_version")
    assert written == expected


def test_a_checkpoint_of_then_knows_the_dataset_it_was_trained_on():
    then = "f1db19a7e6b2b2da36e645310fdf6a9a81c587a255b792e9021487b7772a98bc"
    assert Fingerprint.of_dataset(str(FOLDER / "train_asr")).fingerprint == then


def test_paths_and_names_of_licenses_keep_their_spelling():
    old = {"licences": {"licence": {"licences": 2}}, "source": {"licence": "licence"}, "licence": ["licence"]}
    new = {"licenses": {"licence": {"licences": 2}}, "source": {"license": "licence"}, "license": ["licence"]}
    assert with_current_keys(old) == new
