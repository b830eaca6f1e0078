"""A run directory as training and evaluation leave it, made up: curves that fall, routing that settles, sound."""

import json
import math
import random
import struct
import wave
from pathlib import Path

from megatron_most.config import MoEConfig, dump_config
from megatron_most.config.load import build_config
from megatron_most.training.routing_metrics import RoutingMetrics

SENTENCES = [
    "the small boys count seven red stones",
    "the old farmer sees two green boats",
    "the young sailors paint five dark doors",
    "the kind teacher finds nine warm coats",
    "the tall drivers carry three clean boxes",
    "the quiet doctor buys four blue plates",
]


TOKENS = {"text": 4000, "audio": 11000, "image": 900}


def make_run(
    path: Path,
    steps: int = 1000,
    interval: int = 10,
    layers: int = 3,
    group: int = 4,
    top_k: int = 2,
    modalities: tuple[str, ...] = ("text", "audio"),
    common: int = 0,
    by_list: bool = False,
    before_statistics: bool = False,
) -> Path:
    """Write every file of a finished run to ``path``, which must not exist, and return it.

    Args:
        common: experts that every modality may choose.
        by_list: groups are lists of experts, dealt out in turn, instead of sizes.
        before_statistics: routing as older runs wrote it, counts alone.
    """
    path.mkdir(parents=True)
    rng = random.Random(0)
    moe = _config(path, layers, group, top_k, modalities, common, by_list)
    environment = {
        "versions": {"python": "3.12.3", "megatron-core": "0.19.2", "torch": "2.13.0"},
        "command": "python examples/pretrain_most.py --config examples/configs/quickstart.yaml",
        "world_size": 2,
        "device": "x86_64 CPU, 2 cores",
    }
    _json(path / "environment.json", environment)
    metrics, routing = [], []
    for step in range(interval, steps + 1, interval):
        done = step / steps
        noise = rng.gauss(1, 0.03)
        text, audio = 4.6 * math.exp(-9 * done) * noise + 0.004, 27.0 * math.exp(-1.6 * done) * noise
        statistics = RoutingMetrics(moe)
        statistics.add([_layer(rng, 2 + index, statistics.choices, moe, done) for index in range(layers)])
        routing.append({"step": step, "layers": statistics.layers()})
        if before_statistics:
            routing[-1]["layers"] = [
                {"layer": layer["layer"], **layer["pairs"], "outside_group": 0} for layer in routing[-1]["layers"]
            ]
        metrics.append(
            {
                "step": step,
                "time": 1.79e9 + step * 0.3,
                "consumed_samples": step * 16,
                "consumed_tokens": step * 1500,
                "lr": 1.5e-3 * min(1.0, step / 30) * 0.5 * (1 + math.cos(math.pi * done)),
                "grad_norm": 9 * math.exp(-4 * done) * rng.lognormvariate(0, 0.2) + 0.3,
                "loss": 0.25 * text + 0.75 * audio,
                "loss/text": text,
                "loss/audio": audio,
                "loss/asr": text,
                "loss/tts": audio,
                **{f"loss/{name}": 3 + 2 * math.exp(-4 * done) * noise for name in modalities[2:]},
                **{f"loss/codebook_{index}": audio / 4 * (0.8 + 0.15 * index) for index in range(4)},
                **({"balance_loss": 1.4} if before_statistics else statistics.metrics()),
                "tokens_per_second": 5000 * rng.gauss(1, 0.02),
                "step_seconds": 0.3 * rng.gauss(1, 0.02),
                "max_memory_bytes": (3 << 28) + step * 1000,
            }
        )
        if step % (10 * interval) == 0:
            values = {"heldout_s_asr": text * 1.1, "heldout_p_asr": text * 1.6, "heldout_s_tts": audio * 1.05}
            metrics.append({"step": step, "time": 1.79e9} | {f"validation/{k}/loss": v for k, v in values.items()})
    _lines(path / "metrics.jsonl", metrics)
    _lines(path / "routing.jsonl", routing)
    _evaluation(path, rng)
    summary = {
        "asr_wer_heldout": 0.0,
        "asr_wer_heldout_hard": 0.0125,
        "asr_wer_untrained": 0.985,
        "tts_wer_heldout": 0.031,
        "tts_wer_heldout_hard": 0.118,
        "codec_roundtrip_wer": 0.007,
        "original_wer": 0.01,
        "loss_first": {"text": metrics[0]["loss/text"], "audio": metrics[0]["loss/audio"]},
        "tokens_outside_group": 0,
        "train_seconds": 301.4,
        "steps": steps,
        "tokens_per_second": 4987.2,
        "parameters_total": 4_512_345,
        "parameters_active": 3_012_345,
    }
    _json(path / "summary.json", summary)
    return path


def _config(
    path: Path, layers: int, group: int, top_k: int, modalities: tuple[str, ...], common: int, by_list: bool
) -> MoEConfig:
    sizes = {name: {"size": group} for name in modalities}
    shared = {"size": common}
    if by_list:
        count = len(modalities)
        sizes = {name: {"experts": list(range(i, group * count, count))} for i, name in enumerate(modalities)}
        shared = {"experts": list(range(group * count, group * count + common))}
    groups = [{"modality": name, "moe_router_topk": top_k, **size} for name, size in sizes.items()]
    further = [{"name": name, "start": 50 + i, "stop": 51 + i} for i, name in enumerate(modalities[2:])]
    values = {
        "vocab": {"text_vocab_size": 100, "num_codebooks": 4, "codebook_size": 1000, "further_modalities": further},
        "model": {"num_layers": layers + 1, "moe": {"groups": groups, "common": shared}},
    }
    config = build_config("fake", values)
    (path / "config.yaml").write_text(dump_config(config))
    return config.model.moe


def _layer(rng: random.Random, number: int, choices: dict[str, tuple[int, ...]], moe: MoEConfig, done: float) -> dict:
    """Sums of one layer, as :func:`megatron_most.moe.collect_routing` returns them."""
    tokens = {name: TOKENS[name] for name in choices}
    pairs, scores = {}, {}
    for (name, choice), group in zip(choices.items(), moe.groups, strict=True):
        weight = {e: 1 + (1.2 - done) * math.sin(number + 2.1 * e) ** 2 + rng.gauss(0, 0.04) for e in choice}
        shares = [weight.get(expert, 0.0) / sum(weight.values()) for expert in range(moe.num_experts)]
        pairs[name] = [round(tokens[name] * group.moe_router_topk * share) for share in shares]
        scores[name] = [tokens[name] * share for share in shares]
    return {
        "layer": number,
        "pairs": pairs,
        "scores": scores,
        "entropy": {
            name: tokens[name] * math.log(len(choice)) * (0.6 + 0.3 * done) for name, choice in choices.items()
        },
        "tokens": tokens,
        "outside_group": 0,
        "balance_loss": sum(tokens.values()) * (1 + 0.4 * math.exp(-5 * done)),
        "z_loss": 0.0,
        "orthogonality_loss": 0.0,
        "rank_imbalance": [10 * (1.1 + 0.3 * (1 - done) * rng.random()), 10],
    }


def _evaluation(path: Path, rng: random.Random) -> None:
    wrong = {
        "asr": {1: "the old farmer sees ten green boats"},
        "tts": {0: "the small count seven red stones", 3: "the kind teacher finds nine warm coats and", 4: "the"},
    }
    for name in ("heldout_s", "heldout_p"):
        for suite in ("original", "roundtrip", "asr", "tts"):
            items = []
            for index, sentence in enumerate(SENTENCES):
                item = {"id": f"{name}_{index:03d}", "reference": sentence}
                item["hypothesis"] = wrong.get(suite, {}).get(index, sentence)
                if suite == "tts" and index < 2:
                    for kind in ("original", "roundtrip", "generated"):
                        item[f"{kind}_wav"] = f"samples/{name}_{index}_{kind}.wav"
                        write_tone(path / item[f"{kind}_wav"], 200 + 60 * index, rng)
                items.append(item)
            result = {
                "suite": suite,
                "set": name,
                "num_utterances": len(items),
                "wer": 0.05 if name == "heldout_s" else 0.08,
                "items": items,
            }
            _json(path / "evaluation" / f"{suite}_{name}.json", result)


def write_tone(path: Path, hertz: float, rng: random.Random, seconds: float = 0.8, rate: int = 16000) -> None:
    """A WAV file that can be told from another by ear."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [
        round(9000 * math.sin(2 * math.pi * hertz * i / rate) + rng.gauss(0, 50)) for i in range(int(seconds * rate))
    ]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(struct.pack(f"<{len(frames)}h", *frames))


def _json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
