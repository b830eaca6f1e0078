"""Run tasks of lm-evaluation-harness on a trained model: what speech costs its text abilities."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from megatron_most import cli
from megatron_most.commands.model_options import SIZES, add_checkpoint, add_sizes
from megatron_most.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("harness", __doc__)
    add_checkpoint(parser)
    parser.add_argument("--tasks", required=True, nargs="+", help="names of the harness's tasks and groups")
    parser.add_argument("--include-path", help="folder with further tasks (YAML)")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: as the task says)")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT samples of each task, to try things out")
    parser.add_argument("--output", required=True, help="JSON file for the results")
    parser.add_argument("--tokenizer", help="text tokenizer, if it has moved since training")
    parser.add_argument("--batch-size", type=int, default=32, help="samples at a time (default %(default)s)")
    add_sizes(parser)
    return parser


def harness(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit", "batch_size", *SIZES)
    require("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from megatron_most.errors import ConfigError
    from megatron_most.evaluation.harness import MostLM
    from megatron_most.files import require_writable, write_json
    from megatron_most.parallel import is_rank_zero

    require_writable(arguments.output)
    manager = TaskManager(include_path=arguments.include_path)
    if unknown := sorted(set(arguments.tasks) - set(manager.all_tasks)):
        raise ConfigError(f"--tasks: the harness has no task {unknown[0]!r}")
    model = MostLM(
        arguments.checkpoint,
        arguments.tokenizer,
        arguments.batch_size,
        arguments.tensor_parallel,
        arguments.expert_parallel,
    )
    found = simple_evaluate(
        model=model,
        tasks=arguments.tasks,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        task_manager=manager,
    )
    if is_rank_zero():
        write_json(arguments.output, _kept(found) | {"model": model.model.description})
        print(make_table(found))


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    """The results, without the texts of all samples."""
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "lm_eval_version")
    return json.loads(json.dumps({name: found[name] for name in names if name in found}, default=str))


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), harness, arguments)


if __name__ == "__main__":
    main()
