"""How much of its hardware a run used: the FLOP/s that its model's formulas ask for at the logged tokens per second."""

from __future__ import annotations

import dataclasses

from megatron_most.config.load import build_config
from megatron_most.errors import ConfigError
from megatron_most.report.run_files import RunFiles, number

FLOPS = "model_flops_per_second"
MFU = "mfu"
"""Keys that :func:`with_utilization` adds to the metrics: of all ranks, and in percent of the devices' bf16 peak."""


def with_utilization(run: RunFiles) -> RunFiles:
    """The run with :data:`MFU` in its metrics, or :data:`FLOPS` where the peak of the device is unknown (a CPU's is).

    FLOPs are those of :func:`~megatron_most.planning.train_flops_per_token`: of the average token at the configured
    mix of modalities, without recomputation. A run whose configuration is incomplete stays as it is.
    """
    from megatron_most.planning import GPUS, train_flops_per_token  # imports Megatron, which takes seconds

    if not any("tokens_per_second" in line for line in run.metrics):
        return run
    try:
        per_token = train_flops_per_token(build_config(str(run.directory), run.config))
    except ConfigError:
        if run.config:
            run.notes.append("config.yaml is not a complete configuration, so the model's FLOP/s are unknown.")
        return run
    device, ranks = str(run.environment.get("device", "")).lower(), number(run.environment.get("world_size"))
    peak = next((gpu.peak for name, gpu in GPUS.items() if name in device), None)
    key, factor = (MFU, 100 * per_token / (ranks * peak)) if peak and ranks else (FLOPS, per_token)
    metrics = [
        line if (speed := number(line.get("tokens_per_second"))) is None else line | {key: speed * factor}
        for line in run.metrics
    ]
    return dataclasses.replace(run, metrics=metrics)
