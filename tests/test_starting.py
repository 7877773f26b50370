"""Connecting to a cluster or starting one: the message if that fails, and how soon it comes."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from corsa.errors import CorsaError
from corsa.flow import starting
from corsa.flow.starting import fixed_ports, refuse_what_does_not_answer, start


@contextmanager
def listening(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """An address that gives this answer to each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def error_at(address: str, seconds: float = 1.0) -> str:
    began = time.monotonic()
    with pytest.raises(CorsaError) as caught:
        refuse_what_does_not_answer(address, seconds)
    assert time.monotonic() - began < seconds + 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_address_at_which_nothing_listens_is_refused() -> None:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    assert f"cannot reach the Ray cluster at {address}: nothing answers" in error_at(address)
    assert "unset it to start a cluster here" in error_at(f"ray://{address}")
    assert "nothing answers" in error_at("no-such-host.invalid:6379", 5)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:8265", "this is a dashboard, as `ray job submit` uses it"),
        ("127.0.0.1", "this is no address"),
        ("ray://head", "this is no address"),
    ],
)
def test_an_address_of_another_form_is_refused_with_the_right_form(address: str, why: str) -> None:
    said = error_at(address)
    assert f"cannot reach the Ray cluster at {address}: {why}; a cluster's is HOST:6379 or ray://HOST:10001." in said


def test_something_that_is_no_cluster_is_refused() -> None:
    with listening(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        assert "it is not a Ray cluster" in error_at(address)
    with listening(lambda connection: time.sleep(5)) as address:  # a process that hangs
        assert "nothing answers" in error_at(address)


def test_a_server_that_speaks_as_ray_does_is_let_pass() -> None:
    with listening(lambda connection: connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))) as address:
        refuse_what_does_not_answer(address)
    for address in ("auto", "local"):
        refuse_what_does_not_answer(address)


def test_a_start_that_fails_is_tried_once_more_with_longer_limits_and_other_ports() -> None:
    from ray._private import ray_constants
    from ray._private.parameter import RayParams

    seen: list[dict[str, Any]] = []

    def init() -> str:
        from ray._private import parameter

        own = vars(parameter.RayParams())
        ports = {name: own[name] for name in own if name.endswith(("agent_port", "agent_listen_port", "export_port"))}
        ports |= {name: os.environ[name] for name in ("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT")}
        seen.append(ports | {"limit": ray_constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S})
        if len(seen) == 1:
            raise Exception("The current node timed out during startup.\nand pages of logs\nmore")
        return "started"

    said: list[str] = []
    assert start(init, said.append) == "started"
    (line,) = said
    assert line.endswith(" s (The current node timed out during startup): once more, with longer limits")
    first, second = seen
    assert (first.pop("limit"), second.pop("limit")) == (60, starting.LONGER)
    assert len(first) == 6
    assert all(first[name] and first[name] != second[name] for name in first)
    assert len(set(map(int, map(str, second.values())))) == 6
    assert RayParams().metrics_export_port is None  # outside, nothing has changed
    assert "DASHBOARD_METRIC_PORT" not in os.environ


def test_a_start_that_fails_twice_is_one_line() -> None:
    def init() -> None:
        raise OSError("[Errno 98] address in use\n" + "log\n" * 90)

    with pytest.raises(CorsaError) as caught:
        start(init, lambda line: None)
    assert str(caught.value).startswith("Ray could not be started here in ")
    assert " s: [Errno 98] address in use. `ray stop` ends a cluster" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ctrl_c_is_no_failed_start() -> None:
    def init() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(init, lambda line: pytest.fail("it is not tried again"))


def test_ports_in_use_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight ports are in use."""
    with ExitStack() as closing:
        for first in range(31000, 31900, 8):
            tried = [closing.enter_context(socket.socket()) for _ in range(8)]
            with suppress(OSError):
                for port, held in enumerate(tried, start=first):
                    held.bind(("", port))
                break
        for held in tried[2:]:
            held.close()
        monkeypatch.setattr(starting, "_PORTS", range(first, first + 8))
        with fixed_ports():
            found = {int(os.environ["DASHBOARD_METRIC_PORT"]), int(os.environ["AUTOSCALER_METRIC_PORT"])}
    assert found < set(range(first + 2, first + 8))


def test_the_second_attempt_waits_for_a_node_that_registers_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    looks = []

    def late(*node: str) -> dict[str, str]:
        looks.append(node)
        if len(looks) < 3:
            raise RuntimeError("no node yet")
        return {"node_id": node[1]}

    monkeypatch.setattr(services, "get_node", late)
    with starting._patience(30):
        assert services.get_node("gcs", "abc") == {"node_id": "abc"}
    assert looks == [("gcs", "abc")] * 3
    looks.clear()
    with starting._patience(0), pytest.raises(RuntimeError, match="no node yet"):
        services.get_node("gcs", "abc")
    assert services.get_node is late


def test_the_agents_port_is_known_before_the_agent_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the raylet waits 15 s for the agent, which takes longer to start on a busy machine."""
    from ray._private import services

    files: list[str] = []
    plain = wraps(services.start_raylet)(
        lambda *given, **named: files.extend(p.read_text() for p in tmp_path.iterdir())
    )
    monkeypatch.setattr(services, "start_raylet", plain)
    given: list[Any] = [str(tmp_path)] * 12  # the third is the node's id, the twelfth the directory of the session
    given[2] = "ab"
    with fixed_ports():
        services.start_raylet(*given, dashboard_agent_listen_port=20123)
    assert files == ["20123"]
