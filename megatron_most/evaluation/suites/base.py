"""What every suite is: it reads a data set as it was published, and judges a model on each of its samples.

An outcome is what is known of one sample after that, a dictionary for JSON: ``id``, ``value`` and, where they are not
the defaults of :mod:`megatron_most.evaluation.scores`, ``weight`` and ``unit``; and whatever else the suite keeps. One
with ``failed`` (why) counts as wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_most.errors import DataError
from megatron_most.evaluation.interface import Model

Outcome = dict[str, Any]
Interval = tuple[float, float] | None


class Identified(Protocol):
    """A sample: of any kind, with an id that no other sample of its set has."""

    @property
    def id(self) -> str: ...


class Suite[S: Identified](ABC):
    """One evaluation of one data set."""

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    lower_is_better: ClassVar[bool] = False
    set_name: str

    def bind(self, model: Model) -> None:  # noqa: B027  # most suites need nothing of it
        """Called once before all else, for suites whose samples depend on the model's tokenizer and context."""

    @property
    @abstractmethod
    def samples(self) -> Sequence[S]: ...

    @abstractmethod
    def outcomes(self, model: Model, samples: Sequence[S]) -> list[Outcome]:
        """Judge some of the samples, in their order. A sample that cannot be judged is a :meth:`failure`."""

    @abstractmethod
    def failure(self, sample: S, reason: str) -> Outcome:
        """The outcome of a sample that failed: wrong."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about outcomes, besides the samples and the model: options, normalizers, recognizers."""
        return {}

    def summary(self, outcomes: Sequence[Outcome], score: float, interval: Interval) -> dict[str, Any]:
        """Further entries of the result."""
        return {}

    def write_files(self, outcomes: Sequence[Outcome], output: Path) -> list[Path]:
        """Write what others ask for, such as submissions, beside ``output``; returns the files."""
        return []

    def try_each(self, samples: Sequence[S], prepare: Callable[[S], Any]) -> tuple[list[Any], dict[int, Outcome]]:
        """What ``prepare`` makes of the samples that it can take, and the failures of the others by their place."""
        prepared, failures = [], {}
        for place, sample in enumerate(samples):
            made = attempt(prepare, sample)
            if isinstance(made, DataError):
                failures[place] = self.failure(sample, str(made))
            else:
                prepared.append(made)
        return prepared, failures


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns, or the :class:`DataError` that it raises or is given."""
    for argument in arguments:
        if isinstance(argument, DataError):
            return argument
    try:
        return function(*arguments)
    except DataError as error:
        return error


def merged(count: int, failures: dict[int, Outcome], others: Sequence[Outcome]) -> list[Outcome]:
    """``count`` outcomes: failures at their places, and ``others`` at the free ones."""
    rest = iter(others)
    return [failures[place] if place in failures else next(rest) for place in range(count)]
