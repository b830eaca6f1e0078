"""The subcommands of ``most prepare`` that read data sets: ``manifest`` and ``tokenize``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megatron_most import __version__
from megatron_most.cli import require_positive
from megatron_most.data.preparation.collect import MAX_QUARANTINE, SourceSpec, collect
from megatron_most.data.preparation.sources import SOURCES, SourceOptions
from megatron_most.data.storage.sidecar import write_sidecar
from megatron_most.errors import ConfigError, DataError
from megatron_most.extras import require
from megatron_most.files import require_writable

_LAYOUTS = "\n".join(f"  {name:14} {source.layout}" for name, source in SOURCES.items())


def add_parsers(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of the two subcommands."""
    sub = commands.add_parser(
        "manifest",
        help="data set in its published layout -> checked manifest",
        epilog=f"sources and what they read:\n{_LAYOUTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(sub)
    sub.add_argument("--output", required=True, help="manifest to write; rejected records and provenance go beside it")

    sub = commands.add_parser(
        "tokenize",
        help="audio -> codec codes",
        epilog=f"sources and what they read:\n{_LAYOUTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_source(sub)
    sub.add_argument("--codec", required=True, help=".nemo file, or name of a pretrained NeMo codec")
    sub.add_argument("--output", required=True, help="path prefix of the codes to write")
    sub.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    sub.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="encode shard I of N, counted from 0; every task of a job array encodes one (default %(default)s)",
    )
    sub.add_argument("--device", default="auto", help="device of the codec: auto (default), cpu or cuda")
    sub.add_argument(
        "--max-seconds", type=float, default=60.0, help="maximum length of an utterance (default %(default)g)"
    )
    sub.add_argument(
        "--chunk-transcribed",
        action="store_true",
        help="cut longer audio that has a text into chunks without text, as is always done with audio that has none"
        " (default: reject it)",
    )
    sub.add_argument(
        "--hash-audio",
        action="store_true",
        help="notice edited audio files by their content, which is read once more (default: by size and time)",
    )
    sub.add_argument(
        "--max-quarantine",
        type=float,
        default=MAX_QUARANTINE,
        help="fraction of rejected records above which the command fails (default %(default)g)",
    )


def _add_source(sub: argparse.ArgumentParser) -> None:
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--manifest", help="NeMo manifest (JSON lines); short for --source nemo --root FILE")
    which.add_argument("--source", choices=SOURCES, help="published layout of the data set at --root")
    sub.add_argument("--root", help="folder or file of the data set")
    sub.add_argument(
        "--audio-root", action="append", default=[], help="another folder that audio may be in; may be repeated"
    )
    sub.add_argument("--split", nargs="+", default=[], help="read only these splits (default: all but held-out ones)")
    sub.add_argument("--language", help="language of records that do not name one")
    sub.add_argument("--license", "--licence", help="license of records that do not name one")
    sub.add_argument("--text-field", help="field with the text, if the data set has several")
    sub.add_argument("--lower-case", action="store_true", help="fold texts that are all capitals (LibriSpeech)")
    sub.add_argument("--audio-only", action="store_true", help="also take audio that has no text")


def _spec(arguments: argparse.Namespace) -> SourceSpec:
    if bool(arguments.source) != bool(arguments.root):
        raise ConfigError("--source and --root: each needs the other (--manifest needs neither)")
    options = SourceOptions(
        splits=tuple(arguments.split),
        language=arguments.language,
        license=arguments.license,
        text_field=arguments.text_field,
        needs_text=not arguments.audio_only,
        lower_case=arguments.lower_case,
    )
    root = arguments.root or arguments.manifest
    return SourceSpec(arguments.source or "nemo", root, tuple(arguments.audio_root), options)


def manifest(arguments: argparse.Namespace) -> None:
    spec, output = _spec(arguments), Path(arguments.output)
    require_writable(output)
    base = output.with_suffix("") if output.suffix in (".jsonl", ".json") else output
    quarantine, sidecar = Path(f"{base}.quarantine.jsonl"), Path(f"{base}.provenance.json")
    collected = collect(spec, output, quarantine)
    if not collected.num_records:
        output.unlink()
        raise DataError(f"{quarantine}: none of {collected.num_rejected} records can be used; the reasons are there")
    counts = {"records": collected.num_records, "quarantined": collected.num_rejected}
    source = spec.to_dict() | collected.origin()
    provenance = {"source": source, "counts": counts, "tool_version": __version__, "command": shlex.join(sys.argv)}
    write_sidecar(sidecar, provenance)
    print(f"{output}: {collected.num_records} records ({_join(collected.licenses)})")
    print(f"  splits: {_join(collected.splits)}")
    if collected.num_rejected:
        print(f"{quarantine}: {collected.num_rejected} that cannot be used")
    if collected.num_repeated:
        print(f"warning: {collected.num_repeated} of them repeat a conversation")


def tokenize(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "workers", "max_seconds")
    if not 0 <= arguments.max_quarantine <= 1:
        raise ConfigError(f"--max-quarantine={arguments.max_quarantine}: must be in 0..1")
    require_writable(f"{arguments.output}.json")
    require("nemo", "soundfile", "soxr")
    from megatron_most.data.preparation.shards import Execution, Limits
    from megatron_most.data.preparation.tokenize_audio import tokenize_audio

    codes = tokenize_audio(
        _spec(arguments),
        arguments.codec,
        arguments.output,
        execution=Execution(arguments.workers, _share(arguments.shard), arguments.device, arguments.hash_audio),
        limits=Limits(arguments.max_seconds, arguments.chunk_transcribed),
        max_quarantine=arguments.max_quarantine,
        command=shlex.join(sys.argv),
    )
    if codes is None:
        print(f"{arguments.output}: shard {arguments.shard} is done, others are not; the last one puts them together")
        return
    counts = codes.provenance["counts"]
    print(
        f"{arguments.output}: {len(codes)} utterances, {codes.seconds / 3600:.2f} h, codec {codes.codec.name};"
        f" {counts['records']} records = {counts['tokenized']} tokenized + {counts['quarantined']} in quarantine"
    )
    print(f"  splits: {_join(codes.provenance['source'].get('splits', {}))}")
    if counts["chunked"]:
        print(f"  {counts['chunked']} recordings are longer than {arguments.max_seconds:g} s and became chunks")


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard={text}: must be i/n with i in 0..n-1")
    return int(index), int(count)


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
