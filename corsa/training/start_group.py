"""Starts a group of Ray Train workers, waits for its end, and reports a failure with the worker's own error."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.parquet as pq

from corsa.config import Placement
from corsa.config.steps import TrialPlace
from corsa.errors import CorsaError
from corsa.flow.cluster import cluster_resources, nodes
from corsa.training.resources import cpus_per_worker

STREAMED = 4096
"""Rows per block of a streamed table."""


def in_group(
    work: Callable[[dict[str, Any]], Any],
    config: Mapping[str, Any],
    placement: Placement,
    storage: str,
    tables: Mapping[str, str],
) -> Any:
    """Run `work(config)` on all workers of a group. Returns the result of the first worker.

    Args:
        work: the function that every worker runs.
        config: its argument, the same on all workers.
        placement: how many workers, on which devices, and how often they may fail. A group that can grow
            (`max_workers`) starts with what the cluster has, and is started again when that has changed. It waits
            without a limit for the least that it needs: Ray's elastic policy has none.
        storage: where Ray Train keeps its own state.
        tables: {shard name: local Parquet file}. Every worker streams every whole file.

    Raises:
        CorsaError: the group failed more often than `placement.max_failures` (with the worker's own error), the cluster
            had no room for it within `placement.start_timeout`, or the cluster was lost.
    """
    from ray.exceptions import RayActorError
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.tune.integration.ray_train import TuneReportCallback

    from corsa.flow.ray_data import as_dataset
    from corsa.training.rendezvous import Rendezvous

    watched = isinstance(placement, TrialPlace)  # Ray Tune watches it
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(placement.heartbeat_timeout)
    patience = min(60.0, placement.start_timeout)  # seconds per attempt to reserve the workers
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the delay until the end of a group is noticed
    trainer = TorchTrainer(
        work,
        train_loop_config=dict(config),
        torch_config=Rendezvous(),
        scaling_config=ScalingConfig(
            num_workers=(placement.workers, placement.max_workers) if placement.max_workers else placement.workers,
            elastic_resize_monitor_interval_s=placement.resize_interval,
            use_gpu=placement.gpu,
            resources_per_worker={"CPU": cpus_per_worker(placement)},
        ),
        run_config=RunConfig(
            name=f"{placement.title if watched else 'rounds'}-{uuid.uuid4().hex[:8]}",
            storage_path=f"{storage}/ray",
            failure_config=FailureConfig(
                max_failures=placement.max_failures,
                controller_failure_limit=math.ceil(placement.start_timeout / patience) - 1,
            ),
            callbacks=[TuneReportCallback()] if watched and placement.metric else [],
        ),
        datasets={name: as_dataset(pq.read_table(path), STREAMED) for name, path in tables.items()},
        dataset_config=DataConfig(datasets_to_split=[]),  # every worker sees every row: no edit is dropped
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as e:
        if isinstance(getattr(e, "controller_failure", None), WorkerGroupStartupTimeoutError):
            raise CorsaError(_no_room(placement)) from e
        raise CorsaError(f"the training workers failed: {_root_cause(e)}") from e
    except RayActorError as e:  # the controller died; Ray Train runs it on the driver's node
        raise CorsaError(
            f"the head of the cluster, or the node of this driver, is gone ({type(e).__name__}). Finished rounds are "
            "kept: once the cluster is complete again, the same command continues from the last checkpoint"
        ) from e


def _no_room(placement: Placement) -> str:
    each = {"CPU": cpus_per_worker(placement), "GPU": 1.0 if placement.gpu else 0.0}
    asked = " and ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
    has = cluster_resources()
    return (
        f"the cluster had no room for {placement.workers} worker{'s' * (placement.workers > 1)} of {asked} for "
        f"{placement.start_timeout:g} s; it has {has['CPU']:g} CPU and {has['GPU']:g} GPU on {len(nodes())} nodes now. "
        "Restore the lost nodes, ask for less, or raise --placement.start-timeout; finished rounds are kept, and "
        "the same command continues from the last checkpoint"
    )


def _root_cause(error: Exception) -> str:
    failures = getattr(error, "worker_failures", None) or {0: error}
    text = str(next(iter(failures.values()))).strip()
    return text.splitlines()[-1] if text else type(error).__name__
