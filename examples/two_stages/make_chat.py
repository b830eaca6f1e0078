"""Conversations about the sentences of the quickstart: ``chat.jsonl``, and the texts that a tokenizer should know.

    python examples/two_stages/make_chat.py --corpus runs/two_stages/corpus --output runs/two_stages/chat

The user says a sentence and asks about it; the answer is a part of the sentence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.two_stages.world import exchanges  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.data.building.instructions import INSTRUCTIONS  # noqa: E402
from megatron_most.data.preparation.manifest import read_manifest  # noqa: E402
from megatron_most.files import write_text  # noqa: E402

SEED = 7


def make_chat(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "conversations")
    sentences = [record.text for record in read_manifest(arguments.corpus / "train.jsonl", needs_audio=False)]
    chats, texts = [], [INSTRUCTIONS[purpose][0] for purpose in ("answer_written", "answer_spoken")]
    for number, one in enumerate(exchanges(sentences, arguments.conversations, SEED)):
        turns = zip(("user", "assistant"), (one.question, one.answers[0]), strict=True)
        messages = [{"role": role, "content": content} for role, content in turns]
        chats.append({"id": f"chat-{number:04d}", "messages": messages})
        texts += [one.question, one.answers[0]]
    for name, rows in (("chat", chats), ("texts", [{"text": text} for text in texts])):
        write_text(arguments.output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{arguments.output / 'chat.jsonl'}: {len(chats)} conversations")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write conversations about the sentences of the quickstart")
    parser.add_argument("--corpus", type=Path, required=True, help="what make_corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--conversations", type=int, default=1500, help="how many (default %(default)s)")
    cli.run(parser, make_chat)
