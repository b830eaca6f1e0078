"""A SLURM cluster for tests of what runs on one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.slurm_cluster import Cluster, slurm_cluster, why_not


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with slurm_cluster() as running:
        yield running
