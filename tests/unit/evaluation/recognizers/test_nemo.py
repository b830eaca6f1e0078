"""NeMo recognizers, on a tiny random model, and files that ask for more."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.recognizers import load_recognizer, package_of

LETTERS = [" ", *"abcde"]
MODULES = "nemo.collections.asr.modules"
CONFIG = {
    "target": "nemo.collections.asr.models.ctc_models.EncDecCTCModel",
    "sample_rate": 16000,
    "preprocessor": {"_target_": f"{MODULES}.AudioToMelSpectrogramPreprocessor", "features": 16, "dither": 0.0},
    "encoder": {
        "_target_": f"{MODULES}.ConvASREncoder",
        "feat_in": 16,
        "activation": "relu",
        "jasper": [
            {
                "filters": 8,
                "repeat": 1,
                "kernel": [3],
                "stride": [2],
                "dilation": [1],
                "dropout": 0.0,
                "residual": False,
            }
        ],
    },
    "decoder": {
        "_target_": f"{MODULES}.ConvASRDecoder",
        "feat_in": 8,
        "num_classes": len(LETTERS),
        "vocabulary": LETTERS,
    },
    "train_ds": {"manifest_filepath": "/absent.json", "dataset": {"_target_": "os.system"}},
}


def archive(path: Path, config: dict) -> Path:
    """What has the form of a ``.nemo`` file, without weights."""
    content = yaml.safe_dump(config).encode()
    with tarfile.open(path, "w") as file:
        entry = tarfile.TarInfo("model_config.yaml")
        entry.size = len(content)
        file.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.slow
def test_a_ctc_model_writes_what_its_weights_say(tmp_path: Path) -> None:
    from nemo.collections.asr.models import EncDecCTCModel
    from omegaconf import OmegaConf

    torch.manual_seed(0)
    built = {key: value for key, value in CONFIG.items() if key != "train_ds"}
    model = EncDecCTCModel(cfg=OmegaConf.create(built))
    with torch.no_grad():
        model.decoder.decoder_layers[0].bias[LETTERS.index("c")] += 100
    model.save_to(str(tmp_path / "tiny.nemo"))
    recognizer = load_recognizer(tmp_path / "tiny.nemo", "en")
    audio = np.random.default_rng(0).normal(size=8000).astype(np.float32) * 0.1
    assert recognizer.transcribe(audio, 8000) == "c"
    assert recognizer.transcribe(np.zeros(0), 16000) == ""
    assert recognizer.name.startswith("EncDecCTCModel in tiny.nemo (") and "NeMo 3." in recognizer.name
    with pytest.raises(DataError, match="not finite"):
        recognizer.transcribe(np.array([np.nan]), 16000)
    with pytest.raises(ConfigError, match="half.nemo: NeMo cannot restore it: "):
        load_recognizer(archive(tmp_path / "half.nemo", CONFIG), "en")


def test_a_file_that_asks_for_other_classes_is_refused_before_it_is_built(tmp_path: Path) -> None:
    assert package_of("x.nemo") == "nemo"
    for changed, message in (
        ({"encoder": {"_target_": "os.system", "command": "true"}}, "_target_='os.system': is no class of a NeMo rec"),
        ({"encoder": {"_partial_": True}}, "_partial_=True: is no class of a NeMo recognizer"),
        ({"loss": [{"_target_": "nemo.core.x"}]}, "_target_='nemo.core.x': is no class of a NeMo recognizer"),
        (
            {"target": "nemo.collections.tts.models.audio_codec.AudioCodecModel"},
            "must be a model of nemo.collections.a",
        ),
    ):
        with pytest.raises(ConfigError, match=f"bad.nemo: model_config.yaml: .*{message}"):
            load_recognizer(archive(tmp_path / "bad.nemo", {**CONFIG, **changed}), "en")
    (tmp_path / "no.nemo").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="recognizer .*no.nemo: not readable as a .nemo archive"):
        load_recognizer(tmp_path / "no.nemo", "en")
