"""What recipes name is what documented commands make: datasets, codec, codebooks, tokenizers, checkpoints.

The code blocks of these pages run in a shell in which ``most`` prints its arguments and no other command exists.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_most.commands import compare, convert, evaluate, generate, plan, prepare, report, train
from megatron_most.config import RunConfig, load_config
from tests.pages import ROOT, code_blocks

PAGES = ("docs/data.md", "docs/first-run.md", "docs/recipe.md")
RECIPES = sorted(path.stem for path in (ROOT / "examples" / "configs").glob("most_*b_*.yaml"))
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "compare": compare.make_parser,
    "convert": convert.make_parser,
    "evaluate": evaluate.make_parser,
    "generate": generate.make_parser,
    "plan": plan.make_parser,
    "prepare": prepare.make_parser,
    "report": report.make_parser,
    "train": train.make_parser,
}
STAND_INS = """
most() {
    if [ "$1" = torchrun ]; then
        while [ "$1" != -m ]; do shift; done
        set -- "${2##*.}" "${@:3}"
    fi
    printf '%s\\x1f' "$@"
    printf '\\n'
}
"""


@functools.cache
def commands(page: str) -> list[list[str]]:
    """The arguments of every ``most`` command of a page, shell variables and loops expanded."""
    blocks = [block.text for block in code_blocks(page) if block.language in ("", "bash")]
    script = STAND_INS + "".join(block for block in blocks if re.search(r"most (prepare|convert|plan|torchrun)", block))
    with tempfile.TemporaryDirectory() as folder:
        shell = ["/bin/bash", "--norc", "-c", script]
        done = subprocess.run(shell, env={"PATH": ""}, cwd=folder, capture_output=True, text=True, check=False)
    assert "syntax error" not in done.stderr, done.stderr
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


@functools.cache
def parsed(page: str) -> list[tuple[str, argparse.Namespace]]:
    found = []
    for name, *arguments in commands(page):
        parser = PARSERS[name]()
        parse = parser.parse_args if name in ("prepare", "convert") else parser.parse_intermixed_args
        found.append((name, parse(arguments)))
    return found


def made_by(command: str, subcommand: str) -> list[argparse.Namespace]:
    """The documented calls of a subcommand, those in the heads of recipes included."""
    found = [call for page in PAGES for name, call in parsed(page) if name == command and call.command == subcommand]
    for name in RECIPES:
        head = (ROOT / "examples" / "configs" / f"{name}.yaml").read_text(encoding="utf-8").split("\nrun_dir")[0]
        text = re.sub(r" \\\n#", "", head)
        for line in re.findall(rf"most {command} ({subcommand} .*)", text):
            found.append(PARSERS[command]().parse_args(line.split()))
    return found


def codec_name(name_or_file: str) -> str:
    return Path(name_or_file).name.removesuffix(".nemo")


def recipe(name: str) -> RunConfig:
    return load_config(ROOT / "examples" / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_documented_command_exists(page: str) -> None:
    assert len(parsed(page)) > 10


@pytest.mark.parametrize("name", RECIPES)
def test_documented_commands_build_what_a_recipe_names(name: str) -> None:
    config, builds = recipe(name), {call.output: call for call in made_by("prepare", "build")}
    bases = {Path(call.out): call.hf for call in made_by("convert", "import")}
    for entry in (*config.data.train, *config.data.validation):
        assert entry.path in builds, f"{name} names {entry.path}, which no documented command builds"
        build = builds[entry.path]
        assert bases[Path(build.tokenizer).parent] == bases[Path(config.tokenizer).parents[1]]
        assert build.text_vocab_size == config.vocab.text_vocab_size
        assert build.layout == config.vocab.layout
        assert build.max_length <= config.data.seq_length
        if not build.codes:
            sizes = (build.num_codebooks, build.codebook_size)
            assert sizes == (config.vocab.num_codebooks, config.vocab.codebook_size)


@pytest.mark.parametrize("name", RECIPES)
def test_codes_are_made_by_the_codec_of_the_recipe(name: str) -> None:
    config = recipe(name)
    builds = {call.output: call for call in made_by("prepare", "build")}
    tokenized = {call.output: call for call in made_by("prepare", "tokenize")}
    for entry in (*config.data.train, *config.data.validation):
        for codes in builds[entry.path].codes:
            assert Path(tokenized[codes].codec).name.removesuffix(".nemo") == Path(config.codec).name.removesuffix(
                ".nemo"
            )


@pytest.mark.parametrize("name", RECIPES)
def test_a_documented_command_makes_the_checkpoint_that_a_recipe_starts_from(name: str) -> None:
    config, imports = recipe(name), {call.out: call for call in made_by("convert", "import")}
    runs = {recipe(other).run_dir for other in RECIPES}
    assert config.checkpoint.load in imports.keys() | runs
    call = imports.get(config.checkpoint.load)
    if call is not None and call.audio_vocab is not None:
        vocab = config.vocab
        assert call.audio_vocab == f"{vocab.layout}:{vocab.num_codebooks}x{vocab.codebook_size}"


def test_all_recipes_have_one_codec() -> None:
    names = {codec_name(recipe(name).codec) for name in RECIPES}
    assert names == {"nemo-nano-codec-22khz-1.78kbps-12.5fps"}
    assert {(recipe(name).vocab.num_codebooks, recipe(name).vocab.codebook_size) for name in RECIPES} == {(13, 2016)}


def test_a_documented_evaluation_of_a_run_appears_in_its_report() -> None:
    """The report reads the results in the run directory's ``evaluation``."""
    evaluations = [call for page in PAGES for name, call in parsed(page) if name == "evaluate"]
    assert evaluations
    for call in evaluations:
        assert Path(call.output).parent == Path(call.checkpoint) / "evaluation"
