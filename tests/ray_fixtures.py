"""Plugin: one cluster and one finished run, shared by all tests that use them. Pipelines end with their test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_cluster import TINY, Cluster, Run, end_what_is_left, run, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of this test session."""
    with running_cluster() as found:
        yield found


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both methods over three rounds, on one worker, from an empty storage."""
    storage = tmp_path_factory.mktemp("undisturbed")
    return Run(storage, run([*TINY, "--storage", storage], cluster.environment))


@pytest.fixture(autouse=True)
def _no_pipeline_outlives_its_test() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    yield
    end_what_is_left()
