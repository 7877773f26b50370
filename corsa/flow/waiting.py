"""Which cluster resources a run waits for, and who holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from corsa.flow.cluster import Resources

_SECONDS = 10  # for an answer of the cluster


def waited_for() -> str | None:
    """What the tasks, actors and placement groups of the cluster wait for, in one sentence, or None.

    Raises:
        Exception: the cluster does not answer.
    """
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    context = ray.get_runtime_context()
    status = get_cluster_status(context.gcs_address, timeout=_SECONDS)
    demands = [*status.resource_demands.ray_task_actor_demand, *status.resource_demands.placement_group_demand]
    wanted = [(request.bundle, request.count) for demand in demands for request in demand.bundles_by_count]
    if not wanted:
        return None
    found = [node.resource_usage for node in (*status.active_nodes, *status.idle_nodes)]
    usage = [{u.resource_name: (u.total - u.used, u.total) for u in node.usage} for node in found if node]
    return standstill(wanted, usage, _holders(context.get_job_id()))


def standstill(
    wanted: Sequence[tuple[Resources, int]],
    nodes: Sequence[Mapping[str, tuple[float, float]]],
    holders: Mapping[str, int],
) -> str:
    """The sentence.

    Args:
        wanted: requested resources, and how many such requests.
        nodes: for each node, (free, total) by resource.
        holders: who holds something -> how many of them.

    >>> standstill([({"CPU": 1.0}, 2)], [{"CPU": (0.5, 1.0)}], {"RayTrainWorker of this run with 0.5 CPU": 1})
    '2 x 1 CPU are waited for; free: 0.5 of 1 CPU; held by RayTrainWorker of this run with 0.5 CPU'
    """
    shown = [f"{count} x {amounts(bundle)}" for bundle, count in wanted]
    names = sorted({name for bundle, _ in wanted for name in _plain(bundle)} & {"CPU", "GPU"}) or ["CPU"]
    free = [
        " and ".join(f"{node[name][0]:g} of {node[name][1]:g} {name}" for name in names if name in node)
        for node in nodes
    ]
    held = [f"{count} x {who}" if count > 1 else who for who, count in holders.items()]
    return f"{', '.join(shown)} are waited for; free: {', '.join(filter(None, free))}" + (
        f"; held by {', '.join(held)}" if held else ""
    )


def amounts(resources: Resources) -> str:
    """Resources in words.

    >>> amounts({"CPU": 0.5, "CPU_group_0_9f2c": 0.5, "GPU": 1.0})
    '0.5 CPU and 1 GPU'
    """
    return " and ".join(f"{amount:g} {name}" for name, amount in _plain(resources).items()) or "nothing"


def _plain(resources: Resources) -> dict[str, float]:
    """Amounts by resource; inside a placement group Ray has names of its own for them."""
    found: dict[str, float] = {}
    for name, amount in resources.items():
        kind = name.split("_group_")[0]
        if kind not in ("bundle", "memory", "object_store_memory") and not kind.startswith("node:"):
            found[kind] = max(found.get(kind, 0.0), amount)
    return found


def _holders(job: str) -> Counter[str]:
    """The actors and tasks that hold CPUs or GPUs, as the cluster's dashboard knows them; none where it is gone."""
    from ray.util import state

    found: Counter[str] = Counter()
    how: dict[str, Any] = {"detail": True, "timeout": _SECONDS, "limit": 1000, "raise_on_missing_output": False}
    with suppress(Exception):
        running: Any = [("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")]
        holding: list[Any] = [*state.list_actors(filters=[("state", "=", "ALIVE")], **how)]
        holding += state.list_tasks(filters=running, **how)
        for one in holding:
            resources = _plain(one.required_resources or {})
            if resources.get("CPU") or resources.get("GPU"):
                whose = "this run" if one.job_id == job else f"another run (job {one.job_id})"
                found[f"{getattr(one, 'class_name', None) or one.name} of {whose} with {amounts(resources)}"] += 1
    return found
