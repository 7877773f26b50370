"""Starts Ray on this machine, even a busy one, and checks whether a cluster answers at an address.

Imports ray only to start it.
"""

from __future__ import annotations

import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any
from unittest.mock import patch

from corsa.errors import CorsaError

ANSWER = 10.0
"""Seconds within which a server at a cluster's address must answer."""

LONGER = 300
"""Seconds that the second attempt gives each part of Ray to start. Ray's own limits are between 15 and 60."""

_PORTS = range(20000, 32000)  # below the system's ephemeral ports, above those of Ray's workers
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with an empty SETTINGS frame
_SETTINGS = 4  # type of the frame that every HTTP/2 server, as each of Ray's is, sends first


_FORMS = "a cluster's is HOST:6379 or ray://HOST:10001"


def refuse_what_does_not_answer(address: str, seconds: float = ANSWER) -> None:
    """Raises `CorsaError` if `address` is not `HOST:PORT`, `ray://HOST:PORT`, "auto" or "local", or if no
    Ray cluster answers there.

    Ray itself would retry for many minutes.
    """
    if address in ("auto", "local"):
        return
    scheme, mark, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    if scheme in ("http", "https"):
        raise CorsaError(_unreachable(address, f"this is a dashboard, as `ray job submit` uses it; {_FORMS}"))
    if mark and scheme != "ray":  # of an extension of Ray
        return
    if not host or not port.isdecimal():
        raise CorsaError(_unreachable(address, f"this is no address; {_FORMS}"))
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return
            connection.sendall(_PREFACE)
            frame = connection.recv(9, socket.MSG_WAITALL)
    except (OSError, OverflowError) as error:
        raise CorsaError(_unreachable(address, f"nothing answers ({error})")) from error
    if len(frame) < 9 or frame[3] != _SETTINGS:
        raise CorsaError(_unreachable(address, "something listens, but it is not a Ray cluster"))


def _unreachable(address: str, why: str) -> str:
    return (
        f"cannot reach the Ray cluster at {address}: {why}. Start the cluster, correct RAY_ADDRESS, or unset it to "
        "start a cluster here"
    )


def start(init: Callable[[], Any], say: Callable[[str], object]) -> Any:
    """Start Ray on this machine with `init` and return its result. A failed start is repeated once, with longer limits
    and ports that were just found free.

    Raises:
        CorsaError: both attempts failed; the text has Ray's last error.
    """
    began = time.monotonic()
    try:
        with fixed_ports():
            return init()
    except Exception as error:  # Ray raises plain exceptions here
        _clear_away(error)
        say(f"Ray did not start in {time.monotonic() - began:.0f} s ({_said(error)}): once more, with longer limits")
    try:
        with fixed_ports(), _patience(LONGER):
            return init()
    except Exception as error:
        _clear_away(error)
        raise CorsaError(
            f"Ray could not be started here in {time.monotonic() - began:.0f} s: {_said(error)}. `ray stop` ends a "
            "cluster that was left behind; else try again when the machine is less busy, or set RAY_ADDRESS to join a "
            "cluster that runs"
        ) from error


@contextmanager
def fixed_ports() -> Iterator[None]:
    """Inside, Ray starts with given free ports, for every part whose port it would not choose itself or would wait for
    the part to report. On a busy machine Ray gives up that wait after 15 s.

    The raylet waits for a file with the agent's port even if that is given, so the file is written before.
    """
    from ray import _raylet
    from ray._private import parameter, services

    raylet: Any = _raylet  # a compiled module, without types

    names = ("dashboard_agent_listen_port", "metrics_agent_port", "metrics_export_port", "runtime_env_agent_port")
    dashboard, autoscaler, *ports = _free_ports(len(names) + 2)
    plain, plain_raylet = parameter.RayParams, services.start_raylet
    own = {"DASHBOARD_METRIC_PORT": str(dashboard), "AUTOSCALER_METRIC_PORT": str(autoscaler)}

    def with_ports(*given: Any, **named: Any) -> Any:
        found = plain(*given, **named)
        for name, port in zip(names, ports, strict=True):
            setattr(found, name, port)
        return found

    def with_file(*given: Any, **named: Any) -> Any:
        how = signature(plain_raylet).bind_partial(*given, **named).arguments
        agent = how["session_dir"], how["node_id"], raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME
        raylet.persist_port(*agent, how["dashboard_agent_listen_port"])
        return plain_raylet(*given, **named)

    with (
        patch.dict(os.environ, own),
        patch.object(parameter, "RayParams", with_ports),
        patch.object(services, "start_raylet", with_file),
    ):
        yield


def _free_ports(count: int) -> list[int]:
    """Ports of this machine on which nothing listens."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with suppress(OSError), socket.socket() as tried:
            tried.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise CorsaError(f"no {count} ports between {_PORTS.start} and {_PORTS.stop} are free on this machine")


@contextmanager
def _patience(seconds: int) -> Iterator[None]:
    """Inside, Ray waits `seconds` for each of its parts."""
    from ray._private import ray_constants, services

    find = services.get_node

    def found(*node: Any) -> Any:
        """Ray's driver gives up after the first failed look that ends later than 30 s, a number in its code."""
        end = time.monotonic() + seconds
        while True:
            try:
                return find(*node)
            except RuntimeError:  # the raylet has not registered yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    limits = {"RAY_agent_register_timeout_ms": str(1000 * seconds)}
    limits["RAY_gcs_server_request_timeout_seconds"] = str(seconds)
    with (
        patch.dict(os.environ, limits),
        patch.object(ray_constants, "RAY_DASHBOARD_STARTUP_TIMEOUT_S", seconds),
        patch.object(ray_constants, "GCS_SERVER_REQUEST_TIMEOUT_SECONDS", seconds),
        patch.object(services, "get_node", found),
    ):
        yield


def _clear_away(error: BaseException) -> None:
    """End the processes of a start that failed: Ray forgets them, and they would load the machine further."""
    import ray
    from ray._private.node import Node

    nodes = {
        id(f.f_locals["self"]): f.f_locals["self"]
        for f, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(f.f_locals.get("self"), Node)
    }
    for node in nodes.values():
        with suppress(Exception):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    with suppress(Exception):
        ray.shutdown()


def _said(error: BaseException) -> str:
    """The first line of an error's text: Ray appends whole logs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
