"""The doctor says what is missing, what it would give and how to get it, and decides only by what training needs."""

import json
from importlib import metadata

import pytest
import torch

from megatron_most.platform import doctor


@pytest.fixture
def without(monkeypatch):
    """Let the doctor see other versions of distributions; None hides one."""

    def without(**versions: str | None) -> None:
        real = metadata.version
        shown = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str:
            found = shown.get(name.replace("_", "-"), "")
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found or real(name)

        monkeypatch.setattr(metadata, "version", version)

    return without


def find(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_a_machine_that_runs_the_tests_can_train(tmp_path):
    findings = doctor.examine(tmp_path)
    assert doctor.can_train(findings)
    assert find(findings, "megatron-core").value == "0.16.1"
    assert find(findings, "torch").value.startswith(torch.__version__)
    assert find(findings, "gloo").state == "present"
    assert doctor.as_text(findings).splitlines()[-1].startswith("can train on this machine")


@pytest.mark.parametrize("name", ["megatron-core", "psutil", "sentencepiece", "omegaconf"])
def test_a_missing_required_package_decides(tmp_path, without, name):
    without(**{name: None})
    findings = doctor.examine(tmp_path)
    assert not doctor.can_train(findings)
    assert doctor.as_text(findings).splitlines()[-1] == f"cannot train: {name}"


def test_another_megatron_core_does_not_do(tmp_path, without):
    without(megatron_core="0.17.0")
    findings = doctor.examine(tmp_path)
    finding = find(findings, "megatron-core")
    assert (finding.state, finding.value) == ("unfit", "0.17.0, 0.19.2 is needed")
    assert not doctor.can_train(findings)


@pytest.mark.parametrize("name", ["nemo_toolkit", "pocketsphinx", "espeakng-loader", "wandb", "transformer-engine"])
def test_a_missing_optional_package_is_explained(tmp_path, without, name):
    without(**{name: None})
    findings = doctor.examine(tmp_path)
    finding = find(findings, name)
    assert doctor.can_train(findings)
    assert finding.state == "missing"
    assert f"gives: {finding.gives}; get it: {finding.remedy}" in doctor.as_text(findings)


def test_whatever_is_not_right_says_what_it_gives_and_how_to_get_it(tmp_path, without, monkeypatch):
    without(megatron_core=None, nemo_toolkit="1.0", pocketsphinx=None, apex=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.1.0")
    wrong = [finding for finding in doctor.examine(tmp_path) if finding.state != "present"]
    assert {"torch", "megatron-core", "nemo_toolkit", "pocketsphinx", "CUDA", "apex"} <= {f.name for f in wrong}
    assert all(finding.gives and finding.remedy for finding in wrong)


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), "missing"), ((8, 9), "present"), ((9, 0), "present")])
def test_what_a_gpu_can_do_follows_from_its_capability(tmp_path, monkeypatch, capability, fp8):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability if index else (9, 0))
    findings = doctor.examine(tmp_path)
    assert find(findings, "CUDA").value == "2 x Some GPU"
    assert find(findings, "bf16").state == "present"
    assert find(findings, "FP8").state == fp8


def test_space_is_measured_where_the_run_will_be(tmp_path, monkeypatch):
    seen = []

    def disk_usage(path):
        seen.append(path)
        return type("usage", (), {"free": 2**30})

    monkeypatch.setattr(doctor.shutil, "disk_usage", disk_usage)
    finding = find(doctor.examine(tmp_path / "runs" / "new"), f"free in {tmp_path / 'runs' / 'new'}")
    assert seen == [tmp_path]
    assert finding.state == "unfit"
    assert finding.value.startswith("1.0 GiB")


def test_the_json_holds_every_finding(tmp_path):
    findings = doctor.examine(tmp_path)
    values = json.loads(json.dumps(doctor.as_dict(findings)))
    assert values["can_train"] is True
    assert [entry["name"] for entry in values["findings"]] == [finding.name for finding in findings]
