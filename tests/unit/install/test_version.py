"""The version comes from the last tag and names the commit after it."""

import importlib
import re
import subprocess
import sys
from importlib import metadata

import pytest

import megatron_most
from tests.unit.install.requirements import ROOT


@pytest.mark.parametrize(
    "tag, expected", [("v1.2.3", r"1\.2\.4\.dev1\+g[0-9a-f]+"), ("before-the-port", r"0\.1\.0\.dev\d+\+g[0-9a-f]+")]
)
def test_a_commit_is_named_with_the_tag_before_it(tmp_path, tag, expected):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "tagged")
    git("tag", tag)
    git("commit", "-qm", "after", "--allow-empty")
    done = subprocess.run([sys.executable, "-m", "setuptools_scm"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(expected, done.stdout.strip()), done.stdout


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", absent)
        assert importlib.reload(megatron_most).__version__ == "0+not.installed"
    importlib.reload(megatron_most)
    assert megatron_most.__version__ == metadata.version("megatron-most")
