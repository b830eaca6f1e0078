#!/usr/bin/env python
"""Operators that each part of a training step launches, forward and backward, and where the host waits.

    python -m tools.bench.launches [--part NAME ...] [--operators] [key=value ...]

The model has the structure of most_16b_stage1 (64 experts, top-6, 13 codebooks, YaRN) at small sizes: the number of
operators hardly depends on sizes, and on a GPU each costs host time. Every part (:data:`PARTS`) runs alone, twice, and
the second run is counted; ``step`` and ``micro-batch`` run all of them. ``counting.py`` says what is counted. Prints
Markdown.

Shape letters: s positions, h hidden size.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_most import cli, parallel, platform
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.data.loading.batch import Batch
from megatron_most.errors import ConfigError
from megatron_most.inference import Generator, Sampling
from megatron_most.moe.token_planes import pack_planes
from megatron_most.training.microbatches import packed_seq_params, run_microbatches, stage
from megatron_most.training.optimizer import fuse_adam
from megatron_most.training.train_step import TrainState, build_train_state, compute_gradients, train_step
from tools.bench.counting import Count, Counting
from tools.bench.router import plain_router
from tools.bench.rows import half_audio, packed_documents

DOCUMENTS = 16
_GROUP = {"size": 32, "moe_router_topk": 6}
CONFIG = {
    "vocab": {"text_vocab_size": 1024, "num_codebooks": 13, "codebook_size": 100},
    "model": {
        "num_layers": 3,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "attention": {
            "num_attention_heads": 4,
            "kv_lora_rank": 32,
            "qk_head_dim": 16,
            "qk_pos_emb_head_dim": 8,
            "v_head_dim": 16,
            "rope": {
                "rope_type": "yarn",
                "rotary_base": 10000.0,
                "rotary_scaling_factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
        "moe": {
            "groups": [{"modality": name, **_GROUP} for name in ("text", "audio")],
            "moe_ffn_hidden_size": 32,
            "moe_shared_expert_intermediate_size": 64,
            "moe_router_load_balancing_type": "seq_aux_loss",
        },
    },
    # Parts run alone, so no hook may wait for gradients of the whole model.
    "optimizer": {"overlap_grad_reduce": False},
    "data": {"seq_length": 256, "packing": False},
    "training": {"micro_batch_size": 1, "global_batch_size": 1},
    "precision": {"dtype": "fp32"},
}


class Bench:
    """A model that has taken a step, and inputs of its parts. Process groups must be initialized."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.state: TrainState = build_train_state(config)
        fuse_adam(self.state.optimizer)  # as on a GPU
        [self.model] = self.state.model_chunks
        self.batch = half_audio(config)
        self.packed = stage(packed_documents(config, DOCUMENTS), platform.device())
        self.rotations = self.model.rotary(config.data.seq_length)
        self.packed_rotations = self.model.rotary(config.data.seq_length, self.packed.packed_row)
        self.planes = pack_planes(self.batch.modality, self.batch.is_padding, len(config.vocab.modality_names))
        # The first step sets the scale of balance losses in later backward passes.
        train_step(self.state, [self.batch])
        parameter = next(self.model.parameters())
        shape = (config.data.seq_length, 1, config.model.hidden_size)
        self.hidden = torch.randn(shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        self.dense_layer, self.layer = self.model.decoder.layers[0], self.model.decoder.layers[1]
        self.moe = self.layer.mlp
        self.router = self.moe.router
        self.plain_router = plain_router(self.router)
        with torch.no_grad():
            self.probs, self.routing_map = self.router(self.hidden, self.planes.transpose(0, 1))
            rows, probs, counts = self._dispatch()
        self.expert_inputs = rows.clone().requires_grad_(), counts, probs.clone().requires_grad_()
        self.targets = self.batch.targets()
        self.slot_losses = torch.rand(
            *self.batch.ids.shape, 1 + config.vocab.num_codebooks, device=parameter.device, requires_grad=True
        )

    def _dispatch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the experts, their probs, and the number of rows of each expert."""
        dispatcher = self.moe.token_dispatcher
        sent = dispatcher.dispatch_preprocess(self.hidden, self.routing_map, self.probs)
        rows, counts, probs = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
        return rows, probs, counts

    def there_and_back(self) -> torch.Tensor:
        """Dispatch and combine, with experts that return their input."""
        dispatcher, (rows, _, _) = self.moe.token_dispatcher, self._dispatch()
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))

    def moe_layer(self, router: torch.nn.Module) -> torch.Tensor:
        self.moe.router = router
        output, _ = self.moe(self.hidden, padding_mask=self.planes)
        self.moe.router = self.router
        return output

    def attention(self, packed_row: Any = None) -> torch.Tensor:
        rotations = self.rotations if packed_row is None else self.packed_rotations
        return self.layer.self_attention(self.hidden, None, rotary_pos_emb=rotations, packed_seq_params=packed_row)[0]

    def whole_layer(self, packed_row: Any = None) -> torch.Tensor:
        rotations = self.rotations if packed_row is None else self.packed_rotations
        return self.layer(
            self.hidden, rotary_pos_emb=rotations, padding_mask=self.planes, packed_seq_params=packed_row
        )[0]

    def microbatch(self, batch: Batch) -> None:
        run_microbatches(self.state.wrapped, [batch], self.state.loss_table)

    def step(self, batch: Batch) -> None:
        train_step(self.state, [batch])

    def update(self) -> None:
        """The optimizer's step alone, with the gradients of the previous pass."""
        self.state.optimizer.step()

    def tokens(self, number: int) -> None:
        """Generate exactly ``number`` text ids after a prompt of eight."""
        prompt = types.SimpleNamespace(ids=self.batch.ids[0, :8].cpu().numpy(), side_codes=None)
        text = Generator(self.model).text([prompt], end=-1, max_new=number, sampling=Sampling(temperature=0.0))
        assert len(text[0]) == number
        self.model.train()


Part = Callable[[Bench], torch.Tensor | None]
"""Runs a part. If it returns a tensor, the tensor's backward pass is counted too."""

PARTS: dict[str, Part] = {
    "attention": lambda bench: bench.attention(),
    "attention, packed": lambda bench: bench.attention(bench.packed.packed_row),
    "router": lambda bench: bench.router(bench.hidden, bench.planes.transpose(0, 1))[0],
    "router, Megatron's": lambda bench: bench.plain_router(bench.hidden)[0],
    "dispatch": lambda bench: bench.there_and_back(),
    "experts": lambda bench: bench.moe.experts(*bench.expert_inputs)[0],
    "shared expert": lambda bench: bench.moe.shared_experts(bench.hidden),
    "MoE layer": lambda bench: bench.moe_layer(bench.router),
    "MoE layer, Megatron's router": lambda bench: bench.moe_layer(bench.plain_router),
    "layer": lambda bench: bench.whole_layer(),
    "layer, packed": lambda bench: bench.whole_layer(bench.packed.packed_row),
    "dense feed-forward": lambda bench: bench.dense_layer.mlp(bench.hidden)[0],
    "embeddings": lambda bench: bench.model._embed(bench.batch.ids, bench.batch.codes),
    "heads and losses": lambda bench: bench.model.losses(bench.hidden, bench.targets),
    "loss": lambda bench: bench.state.loss_table(bench.batch, bench.slot_losses)[0],
    "packed row": lambda bench: packed_seq_params(bench.packed) and None,  # another thread does this in training
    "optimizer": lambda bench: bench.update(),
    "micro-batch": lambda bench: bench.microbatch(bench.batch),
    "micro-batch, packed": lambda bench: bench.microbatch(bench.packed),
    "step": lambda bench: bench.step(bench.batch),
    "step, packed": lambda bench: bench.step(bench.packed),
}


DECODE = "decode token"


def count_part(bench: Bench, part: Part) -> tuple[Count, Count | None]:
    """Forward and backward of the second run, after caches are filled. The backward is None if there is none."""
    for _ in range(2):
        for chunk in bench.state.wrapped:
            chunk.zero_grad_buffer()
        with Counting() as forward:
            output = part(bench)
        backward = None
        if output is not None:
            gradient = torch.ones_like(output)
            with Counting() as backward:
                output.backward(gradient)
    return forward, backward


def count_token(bench: Bench) -> Count:
    """One more text token, after a cache of ten positions."""
    bench.tokens(1)
    counts = []
    for number in (2, 3):
        with Counting() as count:
            bench.tokens(number)
        counts.append(count)
    return counts[1] - counts[0]


def count_parts(bench: Bench, parts: Sequence[str]) -> dict[str, tuple[Count, Count | None]]:
    """Counts of :data:`PARTS` and :data:`DECODE`, forward and backward."""
    # The optimizer's part needs gradients.
    compute_gradients(bench.state, [bench.batch])
    return {name: (count_token(bench), None) if name == DECODE else count_part(bench, PARTS[name]) for name in parts}


def table(counts: dict[str, tuple[Count, Count | None]], with_operators: bool) -> str:
    """The counts in Markdown."""
    lines = [
        "| part | operators, forward | backward | waits, forward | backward | MB | GFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    details = []
    for name, (forward, backward) in counts.items():
        both = [forward] if backward is None else [forward, backward]
        operators = [count.num_operators for count in both] + [""] * (2 - len(both))
        waits = [count.num_waits for count in both] + [""] * (2 - len(both))
        megabytes = sum(count.bytes for count in both) / 1e6
        gigaflops = sum(count.flops for count in both) / 1e9
        cells = (name, *operators, *waits, f"{megabytes:.1f}", f"{gigaflops:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for direction, count in zip(("forward", "backward"), both, strict=False):
            for what, counter in (("operators", count.operators), ("waits", count.waits)):
                if counter:
                    listed = ", ".join(f"{key} {number}" for key, number in counter.most_common())
                    details.append(f"- {name}, {direction}, {what}: {listed}")
    return "\n".join([*lines, *(["", *details] if with_operators else [])])


def bench_launches(arguments: argparse.Namespace) -> None:
    names = [*PARTS, DECODE]
    unknown = [name for name in arguments.part if name not in names]
    if unknown:
        raise ConfigError(f"--part {unknown[0]}: no such part; parts are {', '.join(names)}")
    platform.install()
    platform.set_threads(1)
    config = build_config("bench", CONFIG, arguments.overrides)
    parallel.initialize(config.parallel, config.seed)
    counts = count_parts(Bench(config), arguments.part or names)
    shape = f"{config.model.num_layers} layers, {config.data.seq_length} positions, {DOCUMENTS} documents where packed"
    print(f"{shape}, {config.precision.dtype}, torch {torch.__version__}, {platform.device().type}\n")
    print(table(counts, arguments.operators))
    parallel.destroy()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="count the operators of each part of a training step")
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help="count this part only; repeatable")
    parser.add_argument("--operators", action="store_true", help="list operators and waits of each part by name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the configuration")
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), bench_launches)
