"""Stages of Ray Data: how tables are read, how actors that each hold a model are asked for, and what happens when they
are lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import ray.data
import ray.exceptions
from ray.util.annotations import RayDeprecationWarning

from corsa.config import Placement
from corsa.errors import CorsaError
from corsa.flow.cluster import cluster_resources

T = TypeVar("T")

READING = 0.25
"""CPUs of a task that reads. It mostly waits for storage. Ray's default, a whole one, would never be free where
every node is partly taken by actors or workers."""


def read_table(path: str, columns: list[str] | None = None) -> ray.data.Dataset:
    """The Parquet file, on any node that has a little room."""
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # its task that lists files takes a whole CPU
    context.enable_progress_bars = False
    return ray.data.read_parquet(path, columns=columns, num_cpus=READING)


def map_with_model(
    data: ray.data.Dataset, actor: type, arguments: tuple[Any, ...], placement: Placement, **batches: Any
) -> ray.data.Dataset:
    """`data` in batches (`batch_size`, `batch_format`) through one actor a worker, each made with `arguments`."""
    with warnings.catch_warnings():
        # Ray 2.60 deprecates all arguments that it does not name, and names no other way to say `max_restarts`.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return data.map_batches(
            actor,
            fn_constructor_args=arguments,
            num_cpus=min(1.0, cluster_resources()["CPU"] / 4),  # reading needs room beside the actors
            num_gpus=1 if placement.gpu else 0,
            compute=ray.data.ActorPoolStrategy(size=placement.workers),
            # A restarted actor would want its arguments again, which Ray may have dropped (ray #53727): `retried`
            # runs the stage anew instead.
            max_restarts=0,
            **batches,
        )


def retried(placement: Placement, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried anew when its actors are lost, `placement.max_failures` times."""
    for left in range(placement.max_failures, -1, -1):
        try:
            return attempt()
        except ray.exceptions.RayError as error:
            if not left or isinstance(getattr(error, "cause", None), CorsaError):
                raise
    raise AssertionError("unreachable")
