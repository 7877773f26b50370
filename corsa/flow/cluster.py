"""Connects to a Ray cluster or starts one, and checks in advance what fits on it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

from corsa.errors import CorsaError
from corsa.flow.starting import refuse_what_does_not_answer, start

Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU."""


def connect(console: Console) -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), or start one on this machine, with a dashboard.

    Does nothing if this process is connected already. CORSA_VERBOSE=1 shows Ray's own log.
    Raises `CorsaError` if the cluster cannot be reached, within half a minute, or none can be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # This limits Ray to this machine, on any system: Ray then listens on 127.0.0.1 only, not on all addresses of
        # the machine. Ray reads it at import.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Seconds a node may take to register. Ray's default of ten is too short on a busy machine. Ray reads it at import.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")
    import ray

    if ray.is_initialized():
        return
    verbose = bool(os.environ.get("CORSA_VERBOSE"))
    if not verbose:
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    # By default a waiting OpenMP thread spins for milliseconds. Ray's processes share the cores, so spinning takes CPU
    # time from the threads it waits for. A tenth of that spin count costs nothing when the cores are not shared.
    by_the_job = submitted() and "GOMP_SPINCOUNT" in os.environ  # from its runtime environment: Ray refuses it twice
    waiting = {"GOMP_SPINCOUNT": os.environ.setdefault("GOMP_SPINCOUNT", "30000")}
    # A failed start is reported in one line, without Ray's long logs.
    shown = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.CRITICAL}
    # Ray's handler would turn SIGTERM into a silent exit.
    with patch("ray._private.utils.set_sigterm_handler", lambda handler: None):
        if not address:  # what is started here inherits this process's environment
            how = {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
            context = start(lambda: ray.init(**how, **shown), lambda line: console.print(line, highlight=False))
        else:
            refuse_what_does_not_answer(address)
            environment = None if by_the_job else {"env_vars": waiting}
            try:
                context = ray.init(address=address, runtime_env=environment, **shown)
            except Exception as error:  # Ray raises plain ones too
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise CorsaError(
                    f"cannot reach the Ray cluster at {address}: {why}. Check RAY_ADDRESS and, where the cluster asks "
                    "for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (cluster/README.md); or unset RAY_ADDRESS to "
                    "start a cluster here"
                ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray's C++ code has replaced this process's handler with one that aborts the process after three seconds.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    if context.dashboard_url:
        console.print(f"dashboard  http://{context.dashboard_url}", highlight=False)


def disconnect() -> None:
    """Leave the cluster if this process has joined one. A cluster that was started here ends."""
    if _connected():
        sys.modules["ray"].shutdown()


def submitted() -> bool:
    """Whether this process is the driver of a submitted job: its working directory is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def nodes() -> list[Resources]:
    """What each node has. Before a connection: this machine, or nothing if RAY_ADDRESS names a cluster to join."""
    if _connected():
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if os.environ.get("RAY_ADDRESS"):
        return []
    return [{"CPU": os.cpu_count() or 1, "GPU": len(list(Path("/dev").glob("nvidia[0-9]*")))}]


def cluster_resources() -> dict[str, float]:
    """CPUs and GPUs of all nodes together."""
    found = nodes()
    return {name: sum(node.get(name, 0.0) for node in found) for name in ("CPU", "GPU")}


def check_fits(
    workers: int, cpus_per_worker: float, gpus_per_worker: float = 0.0, on: Sequence[Resources] | None = None
) -> None:
    """Refuse a group of workers that the cluster can never hold, before it hangs. A worker runs on one node.

    `on` defaults to `nodes()`. Raises `CorsaError` with the arithmetic.
    """
    on = nodes() if on is None else on
    if not on:
        return
    needed = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    room = sum(lanes(node, needed) for node in on)
    if room >= workers:
        return
    sums = [
        f"{workers} worker{'s' * (workers > 1)} x {amount:g} {name} = {workers * amount:g} {name} asked, "
        f"the cluster has {sum(node.get(name, 0.0) for node in on):g}"
        for name, amount in needed.items()
        if amount
    ]
    place = "1 node" if len(on) == 1 else f"{len(on)} nodes, a worker runs on one"
    remedy = f"ask for at most {room} worker{'s' * (room > 1)}" if room else "ask for less per worker"
    raise CorsaError(f"{'; '.join(sums)} ({place}): {remedy}, or use a larger cluster")


def lanes(total: Resources, needed: Resources) -> int:
    """How many groups that need `needed` each fit side by side into `total`; 0 if not even one does."""
    # A ratio such as 0.3 / 0.1 falls just short of the whole number it stands for.
    return int(min((total.get(name, 0.0) / amount + 1e-9 for name, amount in needed.items() if amount), default=1))
