"""Ray Data stages: making datasets, mapping with actors that hold a model, and retrying when actors are lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from corsa.config import Placement
from corsa.errors import CorsaError
from corsa.flow.cluster import cluster_resources

T = TypeVar("T")


def as_dataset(table: pa.Table, rows: int) -> ray.data.Dataset:
    """The table as a dataset in blocks of `rows` rows, which this process puts into the object store.

    Ray Data's own readers, and `from_arrow`, start tasks of a whole CPU each. If workers hold a part of every CPU,
    such a task waits forever. The tables of edits are small enough to do without these readers.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    starts = range(0, max(len(table), 1), rows)  # one empty block for an empty table
    return ray.data.from_blocks([table.slice(start, rows) for start in starts])


def map_with_model(
    data: ray.data.Dataset, actor: type, arguments: tuple[Any, ...], placement: Placement, **batches: Any
) -> ray.data.Dataset:
    """Map `data` in batches (`batch_size`, `batch_format`) by one actor per worker, each created with `arguments`."""
    with warnings.catch_warnings():
        # Ray 2.60 deprecates all arguments that it does not name, and names no other way to say `max_restarts`.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return data.map_batches(
            actor,
            fn_constructor_args=arguments,
            num_cpus=min(1.0, cluster_resources()["CPU"] / 4),  # leaves room for other work on a small cluster
            num_gpus=1 if placement.gpu else 0,
            compute=ray.data.ActorPoolStrategy(size=placement.workers),
            # A restarted actor needs its arguments again, and Ray may have dropped them (ray #53727): `retried` runs
            # the stage again instead.
            max_restarts=0,
            **batches,
        )


def retried(placement: Placement, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, retried up to `placement.max_failures` times when its actors are lost."""
    for left in range(placement.max_failures, -1, -1):
        try:
            return attempt()
        except ray.exceptions.RayError as error:
            if not left or isinstance(getattr(error, "cause", None), CorsaError):
                raise
    raise AssertionError("unreachable")
