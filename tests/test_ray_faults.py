"""Processes killed in the middle of a round: the results equal those of an undisturbed run, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interruptions import assert_went_on_from, checkpoint, in_the_middle
from ray_cluster import (
    TINY,
    Cluster,
    Run,
    assert_same_adapters,
    copy_without,
    end_of,
    records,
    run,
    start,
    wait_until,
)

from corsa.flow import Store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # the first test waits for the cluster and the shared run
pytest_plugins = ["ray_fixtures"]

CORSA = [f"world_facts-x3/corsa/seed0/round{number}" for number in (1, 2, 3)]
ARGUMENTS = [*TINY, "--placement.checkpoint-every", "5"]
STARTED = 120  # seconds until a round is under way


def test_a_killed_worker_is_replaced_and_its_round_goes_on(undisturbed: Run, cluster: Cluster, tmp_path: Path) -> None:
    storage = copy_without(undisturbed, tmp_path, *CORSA[1:])
    began = time.monotonic()
    driver = start([*ARGUMENTS, "--storage", storage], cluster.environment)
    wait_until(lambda: checkpoint(undisturbed, storage, CORSA[1]), STARTED, "a checkpoint")
    (worker,) = cluster.workers()
    os.kill(worker, signal.SIGKILL)
    position = in_the_middle(undisturbed, storage, CORSA[1])
    finished = end_of(driver, began)
    assert "Traceback" not in finished.out + finished.err
    assert_went_on_from(position, undisturbed, storage, CORSA[1])
    assert_same_adapters(undisturbed.storage, storage, CORSA)
    assert not (storage / "partial").exists() or not list((storage / "partial").iterdir())


def test_a_killed_driver_loses_no_finished_round(undisturbed: Run, cluster: Cluster, tmp_path: Path) -> None:
    storage = copy_without(undisturbed, tmp_path, *CORSA)
    driver = start([*ARGUMENTS, "--storage", storage], cluster.environment)
    wait_until(lambda: checkpoint(undisturbed, storage, CORSA[1]), STARTED, "a checkpoint")
    driver.kill()
    driver.communicate()
    wait_until(lambda: not cluster.workers(), 30, "the end of the killed driver's worker")
    position = in_the_middle(undisturbed, storage, CORSA[1])
    record = storage / Store(storage).record_path(undisturbed.records[CORSA[0]].fingerprint)
    kept = record.stat().st_mtime_ns, record.read_text()

    again = run([*ARGUMENTS, "--storage", storage], cluster.environment)
    assert "waiting" not in again.out  # the lease of a dead process is taken over at once
    assert kept == (record.stat().st_mtime_ns, record.read_text())
    assert_went_on_from(position, undisturbed, storage, CORSA[1])
    assert_same_adapters(undisturbed.storage, storage, CORSA)


def test_an_interrupted_run_says_how_to_go_on_and_does(undisturbed: Run, cluster: Cluster, tmp_path: Path) -> None:
    storage = copy_without(undisturbed, tmp_path, CORSA[2])
    driver = start([*ARGUMENTS, "--storage", storage], cluster.environment)
    wait_until(lambda: checkpoint(undisturbed, storage, CORSA[2]), STARTED, "a checkpoint")
    began = time.monotonic()
    driver.send_signal(signal.SIGINT)
    finished = end_of(driver, began, status=130)
    assert "interrupted: finished steps are kept, and the same command continues from here" in finished.out
    assert "Traceback" not in finished.out + finished.err
    assert {path.name for path in (storage / "leases").iterdir()} == {".lock"}
    wait_until(lambda: not cluster.workers(), 30, "the end of the interrupted driver's worker")
    position = in_the_middle(undisturbed, storage, CORSA[2])

    run([*ARGUMENTS, "--storage", storage], cluster.environment)
    assert_went_on_from(position, undisturbed, storage, CORSA[2])
    assert_same_adapters(undisturbed.storage, storage, CORSA)


BUSY = """
import signal, sys, threading, time, ray
from corsa.config.command_line import exit_with
from corsa.flow.cluster import connect
from rich.console import Console

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored

def command():
    connect(Console(file=sys.stderr))
    task = ray.remote(num_cpus=0)(lambda seconds: time.sleep(seconds))
    def wait(seconds, again):
        ray.get(task.remote(seconds))
        while again:
            ray.nodes()
            ray.get(task.remote(seconds))
    for seconds, again in [(600, False)] * 4 + [(0.001, True)] * 3:
        threading.Thread(target=wait, args=(seconds, again), daemon=True).start()
    time.sleep(1 + float(sys.argv[1]) / 3)
    signal.raise_signal(signal.SIGINT if int(sys.argv[1]) % 2 else signal.SIGTERM)
    time.sleep(60)

exit_with(command)
"""
"""A driver that is interrupted while seven of its threads are in Ray."""


@pytest.mark.parametrize("number", range(4))
def test_threads_that_wait_in_ray_do_not_crash_an_interrupted_driver(number: int, cluster: Cluster) -> None:
    """Leaving Ray in the ordinary way ends some of such drivers with status 1 or a segmentation fault."""
    ended = subprocess.run(
        [sys.executable, "-c", BUSY, str(number)], env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == (130 if number % 2 else 143), ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_method_that_diverges_fails_alone(undisturbed: Run, cluster: Cluster, tmp_path: Path) -> None:
    """A perturbation so large that the loss overflows: CoRSA's first round fails, LoRA's last is trained and kept."""
    storage = copy_without(undisturbed, tmp_path, *CORSA, "world_facts-x3/lora/seed0/round3")
    failed = run([*TINY, "--storage", storage, "--corsa.rho", "1e30"], cluster.environment, status=1)
    cause = "round 1: 6 of 6 steps had a non-finite gradient, the last being step 6. Lower"
    assert f"error: {CORSA[0]}: {cause}" in failed.out
    assert f"not run, for want of these: {CORSA[1]}, {CORSA[2]}, report/continual" in failed.out
    assert "Traceback" not in failed.out + failed.err
    lora = [name.replace("corsa", "lora") for name in CORSA]
    assert_same_adapters(undisturbed.storage, storage, lora)
    assert not set(records(storage)) & set(CORSA)
