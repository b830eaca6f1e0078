"""What pyproject.toml and the lists of requirements ask for, and what that needs in turn."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
OLDEST_PYTHON = {"python_version": "3.12", "python_full_version": "3.12.0"}
"""What the lists are for; a later Python needs a package or two more, which left its standard library."""


def setup_arguments() -> dict:
    """What pyproject.toml says, by the names of setup()'s arguments.

    An extra has the requirements of the extras that it names.
    """
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = content["project"], content["build-system"]
    extras = project["optional-dependencies"]

    def of(extra: str) -> list[str]:
        found = []
        for text in extras[extra]:
            requirement = Requirement(text)
            others = requirement.extras if requirement.name == project["name"] else ()
            found += [one for other in sorted(others) for one in of(other)] if others else [text]
        return list(dict.fromkeys(found))

    return {
        "setup_requires": build["requires"],
        "python_requires": project["requires-python"],
        "install_requires": project["dependencies"],
        "extras_require": {extra: of(extra) for extra in extras},
    }


def setup_requirements(*extras: str) -> list[Requirement]:
    """``install_requires`` and the requirements of ``extras``."""
    arguments = setup_arguments()
    texts = [*arguments["install_requires"], *(text for name in extras for text in arguments["extras_require"][name])]
    return [Requirement(text) for text in texts]


def listed(path: str) -> dict[str, Requirement]:
    """Requirements of a file of pip, by canonical name, in its order."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def closure(roots: Iterable[Requirement], without: Iterable[str] = ()) -> set[str]:
    """Canonical names of ``roots`` and of all they need here, as the installed distributions say.

    Neither ``without`` nor what only they need is among them.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.
    """
    left_out = set(without)
    seen: dict[str, set[str]] = {}  # the extras of a distribution whose requirements were followed; "" is none
    ahead = list(roots)
    while ahead:
        requirement = ahead.pop()
        name = canonicalize_name(requirement.name)
        if name in left_out:
            continue
        new = ({""} | requirement.extras) - seen.setdefault(name, set())
        seen[name] |= new
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if any(needed.marker is None or needed.marker.evaluate({**OLDEST_PYTHON, "extra": extra}) for extra in new):
                ahead.append(needed)
    return set(seen)
