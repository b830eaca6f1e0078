"""``.nemo`` files from strangers: nothing runs, nothing grows, one line says why."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from megatron_most.audio.nemo_archive import CONFIG, WEIGHTS, BoundedBuilding, codec_config, read_archive
from megatron_most.errors import DataError

MODULES = "nemo.collections.tts.modules.audio_codec_modules"
GOOD = {
    "target": "nemo.collections.tts.models.audio_codec.AudioCodecModel",
    "sample_rate": 16000,
    "samples_per_frame": 640,
    "audio_encoder": {"_target_": f"{MODULES}.CausalHiFiGANEncoder", "base_channels": 4},
    "audio_decoder": {"_target_": f"{MODULES}.CausalHiFiGANDecoder"},
    "vector_quantizer": {"_target_": f"{MODULES}.GroupFiniteScalarQuantizer"},
    "discriminator": {"_target_": f"{MODULES}.SLMDiscriminator", "slm_model_name": "from/elsewhere"},
    "train_ds": {"dataset": {"_target_": "os.system", "command": "touch canary"}},
}
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
DOUBLING = {"a0": "x" * 1000, **{f"a{level}": f"${{a{level - 1}}}" * 2 for level in range(1, 40)}}


def weights_of(values: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


GOOD_WEIGHTS = weights_of({"audio_encoder.a": torch.zeros(3)})


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry, content


def archive_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry, content in members:
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def good(config: str | None = None, weights: bytes = GOOD_WEIGHTS) -> list[tuple[tarfile.TarInfo, bytes]]:
    text = yaml.safe_dump(GOOD) if config is None else config
    return [member(f"./{CONFIG}", text.encode()), member(f"./{WEIGHTS}", weights)]


@pytest.fixture
def refused(tmp_path) -> Callable[[bytes], str]:
    """The line with which an archive of this content is refused."""

    def refuse(content: bytes) -> str:
        path = tmp_path / "some.nemo"
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_archive(path)
        line = str(caught.value)
        assert line.startswith(f"codec {path}: ") and "\n" not in line and len(line) < 600
        return line

    return refuse


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_only_what_encodes_and_decodes_is_kept(tmp_path, compress):
    path = tmp_path / "good.nemo"
    path.write_bytes(compress(archive_of(member("./", type=tarfile.DIRTYPE), *good(), member("./notes.txt", b"x"))))
    config, weights = read_archive(path)
    assert set(weights) == {"audio_encoder.a"}
    assert "discriminator" not in config and "train_ds" not in config
    assert config["audio_encoder"] == GOOD["audio_encoder"] and config["sample_rate"] == 16000


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (member("../canary", b"x"), "'../canary': must be a file or folder inside the archive"),
        (member("/tmp/canary", b"x"), "'/tmp/canary': must be"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'link': must be"),
        (member("link", type=tarfile.LNKTYPE, linkname=f"./{CONFIG}"), "'link': must be"),
        (member("pipe", type=tarfile.FIFOTYPE), "'pipe': must be"),
        (member(f"more/{WEIGHTS}", b"x"), f"{WEIGHTS} is in it twice"),
        (member(f"./{CONFIG}", b"x"), f"{CONFIG} is in it twice"),
    ],
    ids=["up", "absolute", "symlink", "hardlink", "pipe", "weights twice", "config twice"],
)
def test_members_that_no_model_has_are_refused(refused, extra, message):
    assert message in refused(archive_of(*good(), extra))


def test_bombs_are_refused(refused):
    zeros = archive_of(member(f"./{WEIGHTS}", bytes(200 << 20)))
    assert "decompresses to more than 64 MiB" in refused(gzip.compress(zeros))
    assert f"{CONFIG}: larger than 1 MiB" in refused(archive_of(member(CONFIG, b" " * (2 << 20))))
    assert "holds more than 1,000 files" in refused(archive_of(*(member(f"{index}") for index in range(1500))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(100 << 20))
    assert "holds more than its size" in refused(archive_of(*good(weights=buffer.getvalue())))


def test_what_is_no_archive_is_refused(refused):
    whole = archive_of(*good())
    for content in (b"", b"x" * 5000, whole[:700], gzip.compress(whole)[:300], gzip.compress(b"x" * 5000)):
        refused(content)
    assert f"has no {CONFIG}, so it is no NeMo model" in refused(archive_of(member("a", b"x")))
    assert f"has no {WEIGHTS}" in refused(archive_of(good()[0]))


class Canary:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("canary"),)


def test_weights_run_no_code(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (
        weights_of({"a": Canary()}),
        pickle.dumps(Canary()),
        b"x" * 100,
        weights_of([1]),
        weights_of({1: 2}),
    ):
        assert WEIGHTS in refused(archive_of(*good(weights=content)))
    assert not (tmp_path / "canary").exists()


def with_value(**changes: object) -> str:
    return yaml.safe_dump({**GOOD, **changes})


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + with_value(), "more than 100,000 values"),
        ("a: " + "[" * 2000, "nested deeper than 64 levels"),
        ("a: " + "1:" * 10_000 + "1", "a number of 20,001 digits"),
        ("a: !!bool x", "a value does not fit its tag"),
        ("a: !!timestamp x", "a value does not fit its tag"),
        ("[]", "must hold a mapping"),
        (with_value(target=["a"]), "target=['a']: must be an AudioCodecModel"),
        (with_value(target="nemo.collections.asr.models.EncDecCTCModel"), "must be an AudioCodecModel"),
        (with_value(audio_encoder={"_target_": "torch.hub.load"}), "_target_='torch.hub.load': is no class of a codec"),
        (with_value(audio_encoder={"_target_": f"{MODULES}.load_fsspec", "path": "x"}), "load_fsspec': is no class"),
        (with_value(audio_encoder={"_target_": [1]}), "_target_=[1]: is no class of a codec"),
        (with_value(audio_encoder={**GOOD["audio_encoder"], "_args_": [1]}), "_args_=[1]: is no class of a codec"),
        (with_value(audio_encoder={**GOOD["audio_encoder"], "a": [{"_target_": "os.system"}]}), "os.system"),
        (with_value(audio_decoder="x"), "audio_decoder='x': must be a mapping with a _target_"),
        (with_value(audio_encoder={"_target_": "${a}"}, a="os.system"), "os.system"),
        (with_value(sample_rate="x"), "sample_rate='x': must be an integer above 0"),
        (with_value(sample_rate=1 << 60), "must be an integer above 0"),
        (with_value(sample_rate="${nowhere}"), "nowhere"),
        (with_value(sample_rate="${oc.create:x}"), "an interpolation must be"),
        (with_value(**DOUBLING), "interpolations make more"),
        (with_value(semantic_codec={"a": 1}), "sample_rate is missing"),
    ],
    ids=lambda value: value[:12] if len(value) > 40 else value,
)  # fmt: skip
def test_configurations_that_no_codec_has_are_refused(text, message):
    with pytest.raises(ValueError) as caught:
        codec_config(text.encode())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_codec_inside_is_kept_and_checked():
    config = codec_config(with_value(semantic_codec=GOOD).encode())
    assert set(config["semantic_codec"]) == set(config) - {"semantic_codec"}
    evil = {**GOOD, "audio_encoder": {"_target_": "os.system"}}
    with pytest.raises(ValueError, match=r"os\.system"):
        codec_config(with_value(semantic_codec=evil).encode())


def test_modules_far_larger_than_the_weights_are_not_built():
    small = {"a": torch.zeros(1000)}
    with BoundedBuilding(small):
        torch.nn.Conv1d(64, 64, 7)
    with pytest.raises(ValueError, match="far larger than its weights"), BoundedBuilding(small):
        for _ in range(1000):
            torch.nn.Conv1d(512, 512, 7)
