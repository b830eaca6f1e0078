"""The training loop, its checkpoints and its logs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.keys import key


@dataclass
class RetentionConfig:
    """Whether the model still predicts text as it did at the start: bits per byte of a text, measured in training."""

    data: str | None = key(
        None, "text to measure: a `.txt` file, or a `.jsonl` manifest of texts; null for none. Needs `tokenizer`"
    )
    interval: int = key(1000, "steps between measurements; the start and the last step are always measured")
    limit: float = key(0.1, "warn when bits per byte exceed those of the start by more than this fraction")

    def __post_init__(self) -> None:
        require_positive("training.retention", self, ("interval",))
        require_not_negative("training.retention", self, ("limit",))


@dataclass
class TrainingConfig:
    """Steps and batches. Batch sizes count rows of ``data.seq_length`` positions."""

    train_iters: int = key(1000, "training steps", "--train-iters")
    micro_batch_size: int = key(1, "rows in a micro-batch", "--micro-batch-size")
    global_batch_size: int = key(8, "rows in a step, over all ranks", "--global-batch-size")
    recompute: str = key(
        "none",
        "activations recomputed in the backward pass: `none`, `moe_act` (those of the experts' activation function),"
        " `moe` (those of expert layers) or `full`",
        "--recompute-granularity",
    )
    eval_interval: int = key(0, "steps between validations; 0 for none", "--eval-interval")
    eval_iters: int = key(8, "batches from each validation dataset", "--eval-iters")
    check_weight_hash_across_dp_replicas_interval: int = key(
        0,
        "steps between comparisons of the weights that several ranks hold; 0 compares them only before each save",
        "--check-weight-hash-across-dp-replicas-interval",
    )
    skip_nonfinite_steps: int = key(
        0,
        "skip up to this many steps in a row whose loss or gradient norm is not finite; the next one ends the run",
    )
    spiky_loss_factor: float | None = key(
        None,
        "write out which documents a step read if its loss exceeds this many times the median of the last 32 steps;"
        " null never does",
        "--check-for-spiky-loss",
    )
    threads_per_rank: int = key(
        0, "CPU threads per rank; 0 divides the cores of the machine among its ranks", most=1024
    )
    retention: RetentionConfig = key(RetentionConfig, "text retention")

    def __post_init__(self) -> None:
        require_positive("training", self, ("train_iters", "micro_batch_size", "global_batch_size", "eval_iters"))
        intervals = ("eval_interval", "check_weight_hash_across_dp_replicas_interval")
        require_not_negative("training", self, (*intervals, "skip_nonfinite_steps", "threads_per_rank"))
        factor = self.spiky_loss_factor
        require(factor is None or factor > 1, "training.spiky_loss_factor", factor, "must be greater than 1, or null")
        require_one_of("training.recompute", self.recompute, ("none", "moe_act", "moe", "full"))


@dataclass
class CheckpointConfig:
    """Checkpoints go to ``run_dir/checkpoints``; a run that finds some there continues from the newest."""

    save_interval: int = key(1000, "steps between checkpoints; the last step is always saved", "--save-interval")
    async_save: bool = key(
        True,
        "write while training continues; each rank copies what it writes to host memory first",
        "--async-save",
    )
    keep_last: int = key(2, "number of newest checkpoints to keep")
    save_retain_interval: int = key(
        0, "also keep the checkpoints of steps divisible by this; 0 for none", "--save-retain-interval"
    )
    load: str | None = key(None, "checkpoint or run directory with the initial weights of a new run", "--load")

    def __post_init__(self) -> None:
        require_positive("checkpoint", self, ("save_interval", "keep_last"))
        require_not_negative("checkpoint", self, ("save_retain_interval",))
        require(
            self.save_retain_interval % self.save_interval == 0,
            "checkpoint.save_retain_interval",
            self.save_retain_interval,
            f"must be a multiple of checkpoint.save_interval, {self.save_interval}: there are no other steps to keep",
        )


@dataclass
class LoggingConfig:
    """Logs beside ``metrics.jsonl``, which is always written."""

    log_interval: int = key(10, "steps between log lines", "--log-interval")
    tensorboard: bool = key(True, "write TensorBoard logs to `run_dir/tensorboard`", "--tensorboard-dir")
    wandb_project: str | None = key(None, "Weights & Biases project; null for none", "--wandb-project")
    profile_steps: list[int] = key(
        list,
        "`[first, last]`: profile these steps on rank 0 with torch's profiler; empty for none",
        "--profile-step-start",
    )

    def __post_init__(self) -> None:
        require_positive("logging", self, ("log_interval",))
        steps = self.profile_steps
        require(
            not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            "logging.profile_steps",
            steps,
            "must be [first, last] with 1 <= first <= last",
        )
