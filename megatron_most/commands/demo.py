"""Open a web page to talk to a model: record, upload or write, and hear or read the answer as it comes.

    most demo --checkpoint runs/mine
    most demo --checkpoint runs/mine --port 8000 --max-seconds 10

The page is for this machine alone unless --host says otherwise: there is no password.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_most import cli
from megatron_most.commands.model_options import AUDIO, add_checkpoint, add_decoding, add_parts, decoding_of
from megatron_most.errors import ConfigError
from megatron_most.extras import require

if TYPE_CHECKING:
    from megatron_most.demo.host import Limits
    from megatron_most.demo.page import Page
    from megatron_most.inference import Decoding

_LIMITS = ("max_new_tokens", "max_seconds", "max_input_seconds", "max_input_characters", "max_upload_mib")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("demo", __doc__)
    add_checkpoint(parser)
    add_parts(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        help="asr, tts, chat, continue: what the page offers (default: what the recorded datasets teach, or all)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at; 0: a free one (default %(default)s)")
    add_decoding(parser, max_new_tokens=256, max_seconds=20.0)
    parser.add_argument(
        "--max-input-seconds", type=float, default=30.0, help="longest recording that is heard (default %(default)g)"
    )
    parser.add_argument(
        "--max-input-characters", type=int, default=2000, help="longest text that is read (default %(default)s)"
    )
    parser.add_argument("--max-upload-mib", type=int, default=20, help="largest upload, in MiB (default %(default)s)")
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=8,
        help="requests that may wait while one is answered; more are told that the page is busy (default %(default)s)",
    )
    return parser


def demo(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, *_LIMITS, "max_waiting")
    host, port = arguments.host, free_port(arguments.host, arguments.port)
    require("gradio", *AUDIO)
    decoding = decoding_of(arguments)
    from megatron_most.demo.host import Limits

    limits = Limits(
        arguments.max_input_seconds,
        arguments.max_input_characters,
        arguments.max_upload_mib,
        arguments.max_waiting,
        arguments.max_new_tokens,
        arguments.max_seconds,
    )
    with tempfile.TemporaryDirectory(prefix="most-demo-") as folder:
        # Before gradio is imported: uploads and sounds are this page's alone, and are gone when it ends.
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(arguments, limits, decoding, Path(folder))
        serve(page, host, port)


def build(arguments: argparse.Namespace, limits: Limits, decoding: Decoding, folder: Path) -> Page:
    """Load the model and lay out its page.

    Raises:
        ConfigError: it offers none of the tasks, or not one that is asked for.
    """
    from megatron_most.demo.card import card_of
    from megatron_most.demo.host import TASKS, Host, tasks_of
    from megatron_most.inference import MissingCodec, load_for_generation

    checkpoint, has_codec = arguments.checkpoint, True
    for task in arguments.tasks or ():
        if task not in TASKS:
            raise ConfigError(f"--tasks={task}: must be of {', '.join(sorted(TASKS))}")
    try:
        model = load_for_generation(checkpoint, arguments.tokenizer, arguments.codec)
    except MissingCodec as error:
        print(f"note: {error}, to hear and speak; the page offers text alone", file=sys.stderr)
        model, has_codec = load_for_generation(checkpoint, arguments.tokenizer, needs_codec=False), False
    tasks = tuple(arguments.tasks or tasks_of(model, has_codec))
    if not has_codec and {"asr", "tts"} & set(tasks):
        raise ConfigError("--tasks: asr and tts need a codec; pass one with --codec")
    if not tasks:
        raise ConfigError(f"{checkpoint}: was trained for none of {', '.join(TASKS)}; name what to try with --tasks")
    from megatron_most.demo.page import Page

    name = Path(checkpoint).resolve().name
    return Page(Host(model, tasks, limits, has_codec), name, card_of(checkpoint, model), decoding, folder)


def serve(page: Page, host: str, port: int) -> None:
    """Until Ctrl-C or SIGTERM."""
    from megatron_most.demo.page import launch

    logging.getLogger("httpx").setLevel(logging.WARNING)
    url = launch(page, host, port)
    print(f"the page is at {url} until Ctrl-C", flush=True)
    if not is_loopback(host):
        print(f"warning: --host={host}: whoever reaches this address can use the model; no password", file=sys.stderr)
    is_over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_over.set())
    try:
        is_over.wait()
    finally:
        page.blocks.close(verbose=False)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0, before a model is loaded.

    Raises:
        ConfigError: the address is not this machine's, or the port is taken or forbidden.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port={port}: must be from 0 to {(1 << 16) - 1}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: cannot listen there: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), demo, arguments)


if __name__ == "__main__":
    main()
