"""Real driver processes: killed, interrupted, and two on one store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import flow_steps
import pytest
from flow_steps import ADD, diamond, execute, step

from corsa.flow import Store
from corsa.flow.lease import STALE, Holder, Leases

pytestmark = pytest.mark.process

NAMES = ["base", "left", "right", "round/1", "round/2", "round/3"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def driver(store: Path, log: Path, sleep: float) -> subprocess.Popen[str]:
    command = [sys.executable, flow_steps.__file__, str(store), str(log), str(sleep)]

    def heed() -> None:  # a background process would ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)


def wait_for(log: Path, line: str) -> None:
    for _ in range(400):
        if line in log.read_text().split("\n"):
            return
        time.sleep(0.05)
    raise AssertionError(f"{line!r} was not run within 20 s")


def ran(log: Path) -> Counter[str]:
    return Counter(line for line in log.read_text().split("\n") if line and not line.startswith("list"))


@pytest.mark.parametrize("while_running", ["left", "round/2"])
def test_a_killed_driver_loses_only_the_step_it_was_in(tmp_path: Path, log: Path, while_running: str) -> None:
    first = driver(tmp_path / "store", log, 0.5)
    wait_for(log, while_running)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    store = Store(tmp_path / "store")
    assert store.find({"left": diamond(log)[0], "round/2": diamond(log)[2]}[while_running]) is None
    kept = {record.name for record in store.records()}
    assert "base" in kept

    began = time.monotonic()
    outcome, text, _ = execute(store, *diamond(log))
    assert time.monotonic() - began < 10  # the leases were taken over at once, not after the heartbeat's 30 s
    assert "waiting" not in text
    assert outcome.artifacts[diamond(log)[-1].fingerprint].metrics == {"sum": 10.0}
    counts = ran(log)
    assert all(counts[name] == 1 for name in kept)
    assert counts[while_running] == 2
    attempts = list((tmp_path / "store" / "steps").glob("*/*/"))
    assert len(attempts) == len(NAMES)  # partial files are removed


def test_an_interrupted_driver_gives_its_leases_back_and_says_how_to_go_on(tmp_path: Path, log: Path) -> None:
    first = driver(tmp_path / "store", log, 5)
    wait_for(log, "base")
    began = time.monotonic()
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=10)
    assert time.monotonic() - began < 3  # it does not wait for the step
    assert first.returncode == 130
    assert "interrupted: finished steps are kept, and the same command continues from here" in output
    assert "Traceback" not in output
    assert {path.name for path in (tmp_path / "store" / "leases").iterdir()} == {".lock"}


def test_two_drivers_run_every_step_once(tmp_path: Path, log: Path) -> None:
    drivers = [driver(tmp_path / "store", log, 0.5) for _ in range(2)]
    outputs = [one.communicate(timeout=60)[0] for one in drivers]
    assert [one.returncode for one in drivers] == [0, 0]
    assert ran(log) == Counter(NAMES)
    assert "failed" not in "".join(outputs)
    assert any("is being run by pid" in output for output in outputs)


def lease(tmp_path: Path, holder: Holder, age: float) -> None:
    path = tmp_path / "store" / "leases" / f"{step('this', ADD, tmp_path).fingerprint[:16]}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_lease_is_taken_over_when_its_process_is_gone_or_silent(tmp_path: Path, log: Path) -> None:
    store, this, me = Store(tmp_path / "store"), step("this", ADD, log), Holder.this_process()
    elsewhere = replace(me, host="node7", machine="another", pid=1)
    for holder, age, taken in [
        (me, 1.0, False),
        (replace(me, started="0"), 1.0, True),  # the pid was given to another process
        (elsewhere, STALE - 5, False),
        (elsewhere, STALE + 5, True),
    ]:
        lease(tmp_path, holder, age)
        leases = Leases(store)
        try:
            assert leases._take_all([this]) == (None if taken else f"this is being run by {holder}")
        finally:
            leases.close()
        for path in (tmp_path / "store" / "leases").iterdir():
            path.unlink()
        (tmp_path / "store" / "leases").rmdir()


def test_a_lease_is_kept_fresh(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corsa.flow.lease.HEARTBEAT", 0.05)
    this = step("this", ADD, log)
    leases = Leases(Store(tmp_path / "store"))
    with leases.unfinished([this], print) as unfinished:
        assert unfinished == [this]
        (path,) = (tmp_path / "store" / "leases").glob("*.json")
        os.utime(path, (0, 0))
        time.sleep(0.3)
        assert path.stat().st_mtime > time.time() - 5
    assert not path.exists()
    leases.close()
