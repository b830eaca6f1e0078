"""Prepare training data: read data sets, train a text tokenizer, turn audio into codes, build datasets, inspect them.

    python tools/prepare_data.py tokenizer --manifest train.jsonl --vocab-size 512 --output tokenizer.model
    python tools/prepare_data.py manifest --source librispeech --root LibriSpeech --output train.jsonl
    python tools/prepare_data.py tokenize --manifest train.jsonl --codec codec.nemo --output codes/train
    python tools/prepare_data.py build --task asr --codes codes/train --tokenizer tokenizer.model --output data/asr
    python tools/prepare_data.py speechify --chat chat.jsonl --synthesiser "espeak-ng -w {output}" --output spoken
    python tools/prepare_data.py inspect --dataset data/asr --tokenizer tokenizer.model --document 0

docs/data.md explains manifests, tasks and files.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from megatron_most.cli import run
from megatron_most.data import commands, source_commands
from megatron_most.data.building.chat_modes import MODES
from megatron_most.data.building.document_builder import LOSSES
from megatron_most.data.storage.documents import TASKS
from megatron_most.vocab import CODEC_LAYOUTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands_of = parser.add_subparsers(dest="command", required=True)

    sub = commands_of.add_parser("tokenizer", help="train a SentencePiece text tokenizer")
    sub.add_argument("--manifest", nargs="+", required=True, help="JSON-lines manifests whose text is learnt")
    sub.add_argument("--vocab-size", type=int, required=True, help="ids at most; 256 are bytes, 4 special")
    sub.add_argument("--output", required=True, help="the .model file to write")

    source_commands.add_parsers(commands_of)

    sub = commands_of.add_parser("build", help="codes or text -> a dataset of one task")
    sub.add_argument("--task", choices=TASKS, required=True)
    sub.add_argument("--codes", nargs="+", default=[], help="prefixes of tokenized speech")
    sub.add_argument("--text", nargs="+", default=[], help="manifests with text, for text_lm")
    sub.add_argument("--chat", nargs="+", default=[], help="chat files, for chat; --codes holds their spoken turns")
    sub.add_argument(
        "--modes", nargs="+", choices=MODES, default=MODES, help="user-assistant of chat, S spoken, T written (all)"
    )
    sub.add_argument("--wordings", type=int, default=1, help="wordings of each instruction (default: the first only)")
    sub.add_argument("--loss", choices=LOSSES, default=LOSSES[0], help="default: %(default)s")
    sub.add_argument("--max-length", type=int, help="input positions of a document at most: data.seq_length")
    sub.add_argument(
        "--over-length",
        choices=("reject", "chunk", "split"),
        default="reject",
        help="longer documents: rejected, chunked anywhere, or split at sentences, turns or utterances (%(default)s)",
    )
    sub.add_argument("--tokenizer", required=True, help="SentencePiece .model or Hugging Face tokenizer.json")
    sub.add_argument("--layout", choices=CODEC_LAYOUTS, default="frame", help="default: %(default)s")
    sub.add_argument("--text-vocab-size", type=int, help="text ids of the model (default: the tokenizer's)")
    sub.add_argument("--num-codebooks", type=int, help="the model's: the first n of the codec's (default: all)")
    sub.add_argument("--codebook-size", type=int, help="of the model's codec, for text without codes")
    sub.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=START:STOP",
        help="text ids START to STOP - 1 are a modality of their own in the model; may be given several times",
    )
    sub.add_argument("--output", required=True, help="path prefix of the dataset")

    sub = commands_of.add_parser("inspect", help="what a dataset holds")
    sub.add_argument("--dataset", nargs="+", required=True, help="path prefixes of datasets")
    sub.add_argument("--tokenizer", help="to show a document's text")
    sub.add_argument("--document", type=int, help="which document to show")
    sub.add_argument("--codec", help="to turn the document's codes into sound")
    sub.add_argument("--wav", help="the WAV file to write")

    sub = commands_of.add_parser("speechify", help="turns of a chat file -> speech")
    sub.add_argument("--chat", required=True, help="chat file (JSON lines)")
    sub.add_argument(
        "--synthesiser",
        required=True,
        help="command that reads text on its standard input and writes the audio file {output};"
        " {role} and {voice} are filled in too",
    )
    sub.add_argument("--roles", nargs="+", choices=("user", "assistant"), default=["user", "assistant"])
    sub.add_argument("--voices", nargs="+", default=[], help="what {voice} may be; a side of a chat keeps its own")
    sub.add_argument("--max-characters", type=int, default=600, help="longer turns stay written (%(default)s)")
    sub.add_argument("--workers", type=int, help="processes (default: one per core)")
    sub.add_argument("--output", required=True, help="folder for audio, manifest.jsonl and chats.jsonl")

    run(parser, lambda arguments: commands.COMMANDS[arguments.command](arguments, shlex.join(sys.argv)))


if __name__ == "__main__":
    main()
