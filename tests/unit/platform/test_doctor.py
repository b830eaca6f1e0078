"""The doctor says what is missing, what it would give and how to get it, and decides only by what training needs."""

import json
import os
import re
import sys
from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_most.platform import doctor
from megatron_most.platform.findings import TESTED
from tests.unit.install.requirements import ROOT, setup_arguments, setup_requirements
from tests.unit.install.stand_in_distributions import write_distribution


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
    assert find(findings, "megatron-core").value == "0.19.2"
    assert find(findings, "torch").value.startswith(torch.__version__)
    assert find(findings, "gloo").state == "present"
    assert doctor.as_text(findings).splitlines()[-1].startswith("can train on this machine")


@pytest.mark.parametrize("name", ["megatron-core", "psutil", "sentencepiece", "omegaconf"])
def test_a_missing_required_package_decides(tmp_path, without, name):
    without(**{name: None})
    findings = doctor.examine(tmp_path)
    assert not doctor.can_train(findings)
    assert doctor.as_text(findings).splitlines()[-1] == f"cannot train: {name}"


@pytest.mark.parametrize(
    ("name", "version", "problem"),
    [
        ("megatron-core", "0.16.1", "0.16.1, >=0.19.2,<0.20 is needed"),
        ("megatron-core", "0.20.0", "0.20.0, >=0.19.2,<0.20 is needed"),
        ("megatron-core", "0.19.3", None),
        ("nemo_toolkit", "2.7.3", "2.7.3, ==3.0.0 is needed"),
        ("nemo_toolkit", "3.0.0", None),
    ],
)
def test_a_version_out_of_range_does_not_do(tmp_path, without, name, version, problem):
    without(**{name.replace("-", "_"): version})
    findings = doctor.examine(tmp_path)
    finding = find(findings, name)
    assert (finding.state, finding.value) == (("unfit", problem) if problem else ("present", version))
    assert (finding in doctor.misfits(findings)) == (problem is not None)
    assert doctor.can_train(findings) == (problem is None or name == "nemo_toolkit")


@pytest.mark.parametrize(
    ("version", "state", "value"),
    [
        ("2.9.1", "unfit", "2.9.1 (CUDA 13.0), >=2.10 is needed"),
        ("2.10.0a0+a36e1d39eb.nv26.01", "unfit", "2.10.0a0+a36e1d39eb.nv26.01 (CUDA 13.0), >=2.10 is needed"),
        ("2.11.0+cu130", "present", "2.11.0+cu130 (CUDA 13.0)"),
        ("2.13.0a0+8145d630e8.nv26.06", "present", "2.13.0a0+8145d630e8.nv26.06 (CUDA 13.0)"),
        ("2.14.0", "present", "2.14.0 (CUDA 13.0), the tests ran with 2.11 and 2.13"),
    ],
)
def test_torch_is_new_enough_or_not_and_one_that_was_not_tested_is_said_so(
    tmp_path, monkeypatch, version, state, value
):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    finding = find(doctor.examine(tmp_path), "torch")
    assert (finding.state, finding.value) == (state, value)


@pytest.mark.parametrize(
    ("version", "state"), [((3, 11, 9), "unfit"), ((3, 12, 0), "present"), ((3, 13, 2), "present")]
)
def test_python_is_new_enough_or_not(tmp_path, monkeypatch, version, state):
    monkeypatch.setattr(sys, "version_info", version)
    assert find(doctor.examine(tmp_path), "Python").state == state


def test_what_is_supported_and_needed_is_what_pyproject_asks_for():
    requirements = {requirement.name: requirement.specifier for requirement in setup_requirements("audio")}
    ranges = {name: specifier for name, specifier in requirements.items() if specifier}
    python = SpecifierSet(setup_arguments()["python_requires"])
    assert {"Python": python, **ranges} == {name: SpecifierSet(text) for name, text in doctor.SUPPORTED.items()}
    assert {*doctor._REQUIRED_PACKAGES, "torch", "megatron-core"} == {needed.name for needed in setup_requirements()}


def test_every_optional_package_is_looked_for_once_and_its_extra_brings_it():
    listed = [(name, extra) for extra, packages in doctor._OPTIONAL_PACKAGES.items() for name in packages]
    extras = setup_arguments()["extras_require"]
    assert all(name in {Requirement(text).name for text in extras[extra]} for name, extra in listed)
    assert sorted(name for name, _ in listed) == sorted(
        {needed.name for extra in ("all", "harness", "studio") for needed in setup_requirements(extra)}
        - {needed.name for needed in setup_requirements()}
        - {"emerging-optimizers"}  # listed with what accelerates
    )


def test_the_torch_that_setup_installs_is_one_that_is_called_tested():
    version = re.search(r"^TORCH_VERSION := (\d+\.\d+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert version in TESTED["torch"]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder searched first, for metadata by this process and for modules by its children."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (folder / "torch.py").write_text("")  # only children see it: here torch is loaded
    return folder


def test_what_is_compiled_for_another_torch_does_not_fit(tmp_path, site):
    broken = "raise OSError('undefined symbol: _ZN3c10')"
    write_distribution(site, "transformer-engine", "2.16.0+4220403e", {"transformer_engine/pytorch.py": broken})
    write_distribution(site, "apex", "0.1", {"apex/multi_tensor_apply.py": "", "amp_C.py": "import os; os._exit(139)"})
    write_distribution(site, "torchaudio", "2.9.0", {"torchaudio.py": ""})
    findings = doctor.examine(tmp_path)
    engine, apex = find(findings, "transformer-engine"), find(findings, "apex")
    assert engine.state == "unfit"
    assert engine.value == (
        f"2.16.0+4220403e does not work with torch {torch.__version__}: OSError: undefined symbol: _ZN3c10"
    )
    assert (apex.state, apex.value.split(": ")[-1]) == ("unfit", "its import ends with status 139")
    assert find(findings, "torchaudio").state == "present"
    assert doctor.can_train(findings)
    lines = doctor.as_check(findings).splitlines()
    assert [line.split(":")[0] for line in lines] == ["transformer-engine", "apex"]
    assert all(": get it: " not in line and "; get it: " in line for line in lines)


def test_what_can_be_imported_fits(tmp_path, site):
    write_distribution(site, "transformer-engine", "2.17.0", {"transformer_engine/pytorch.py": ""})
    write_distribution(site, "torchaudio", "2.9.0", {"torchaudio.py": "raise OSError('libtorch.so')"})
    findings = doctor.examine(tmp_path)
    assert (find(findings, "transformer-engine").state, find(findings, "transformer-engine").value) == (
        "present",
        "2.17.0",
    )
    assert [finding.name for finding in doctor.misfits(findings)] == ["torchaudio"]


def test_a_library_whose_import_hangs_does_not_fit(tmp_path, site, monkeypatch):
    monkeypatch.setattr("megatron_most.platform.findings._IMPORT_SECONDS", 0.2)
    write_distribution(site, "apex", "0.1", {"amp_C.py": "import time; time.sleep(60)"})
    assert find(doctor.examine(tmp_path), "apex").value.endswith("its import takes more than 0.2 s")


def test_a_megatron_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    """As without triton, or with half a Transformer Engine, whose FileNotFoundError Megatron does not expect."""
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.moe.moe_layer", None)
    monkeypatch.setattr(doctor, "driver_version", lambda: "unknown")
    findings = doctor.examine(tmp_path)
    finding = find(findings, "Megatron's import")
    assert finding.state == "unfit" and "ModuleNotFoundError" in finding.value
    assert not doctor.can_train(findings)
    assert not [finding for finding in findings if finding.section.startswith("Chosen")]


def test_a_gpu_that_torch_cannot_use_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.95.05")
    findings = doctor.examine(tmp_path)
    assert find(findings, "CUDA").value == (
        f"driver 580.95.05 shows a GPU that torch {torch.__version__}, built for CPUs alone, cannot use"
    )
    assert find(findings, "CUDA") in doctor.misfits(findings)


def test_where_all_fits_the_check_is_one_line(tmp_path):
    line = doctor.as_check(doctor.examine(tmp_path))
    assert line.startswith(f"all fits: Python {sys.version.split()[0]}, torch {torch.__version__}") and "\n" not in line


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
