"""Optional libraries of Megatron that a configuration may need, checked before anything is built."""

from __future__ import annotations

from megatron_most.errors import ConfigError
from megatron_most.platform.trial import can_run_triton

_REMEDIES = {
    "Transformer Engine": "pip install --no-build-isolation -c constraints.txt '.[gpu]'",
    "DeepEP": "build it from github.com/deepseek-ai/DeepEP",
    "emerging_optimizers": "pip install -c constraints.txt '.[muon]'",
    "Triton": "it needs a GPU, and comes with torch's builds for CUDA",
    "HybridEP": "build the hybrid-ep branch of github.com/deepseek-ai/DeepEP",
}


def has_library(library: str) -> bool:
    """Whether Megatron can use ``library``: it is installed and can be imported."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.optimizer import emerging_optimizers
    from megatron.core.transformer.moe import fused_a2a

    return {
        "Transformer Engine": transformer_engine.HAVE_TE,
        "DeepEP": fused_a2a.HAVE_DEEP_EP,
        "HybridEP": fused_a2a.HAVE_HYBRIDEP,
        "Triton": can_run_triton(),
        "emerging_optimizers": emerging_optimizers.HAVE_EMERGING_OPTIMIZERS,
    }[library]


def require_library(library: str, field: str, value: str | bool) -> None:
    """Raise :class:`ConfigError` unless Megatron can use ``library``, which ``field=value`` needs."""
    if not has_library(library):
        raise ConfigError(
            f"{field}={value!r}: needs {library}, which is not installed or cannot be imported; {_REMEDIES[library]}"
        )
