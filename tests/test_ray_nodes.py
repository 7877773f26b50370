"""A cluster of several nodes on which each part fails once: each run ends like an undisturbed one, bit for bit.

Two workers, one on each of two nodes, train one round; each test causes another failure.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
from bucket import Bucket
from interruptions import assert_went_on_from, checkpoint, checkpoint_path, in_the_middle
from ray_cluster import (
    PIPELINE,
    ROOT,
    Run,
    assert_same_adapters,
    copy_without,
    end_of,
    plain_environment,
    records,
    run,
    start,
    training,
    wait_until,
)
from ray_nodes import Nodes, running_nodes

from corsa.flow import Store

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # the first test waits for the cluster and the shared run
pytest_plugins = ["ray_fixtures"]

ROUND = "world_facts/corsa/seed0/round1"
TEACH = [
    *("--model", "random:tiny-llama", "--placement.threads", "1", "--evaluation.new-tokens", "4", "--methods", "corsa"),
    *("--rounds", "1", "--limit", "7", "--training.batch", "3", "--training.epochs", "80"),
    *("--workers", "2", "--placement.cpus", "0.7"),  # of which a node holds one
]
OFTEN = ["--placement.checkpoint-every", "5"]
STARTED = 180  # seconds until a round is under way
SECRET = f"hf_{secrets.token_hex(16)}"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    found = Bucket()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def nodes(bucket: Bucket) -> Iterator[Nodes]:
    with running_nodes(bucket.environment | {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"}) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    storage = tmp_path_factory.mktemp("undisturbed")
    return Run(storage, run([*TEACH, "--storage", storage], nodes.environment))


def wait_for_the_middle(undisturbed: Run, storage: Path | Store, after: int = 0) -> None:
    """Waits until the round on two nodes has a checkpoint later than step `after`."""

    def there() -> bool:
        found = checkpoint(undisturbed, storage, ROUND)
        return found is not None and found.step > after

    wait_until(there, STARTED, f"a checkpoint after step {after}")


def assert_nothing_listens_beyond_this_machine(processes: list[psutil.Process]) -> None:
    found: list[tuple[psutil.Process, str]] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # by now
            opened = process.net_connections("inet")
            found += [(process, c.laddr.ip) for c in opened if c.status == psutil.CONN_LISTEN]
    assert len(found) > 10
    assert [(p, ip) for p, ip in found if not ip_address(ip.removeprefix("::ffff:")).is_loopback] == []


def test_the_dashboard_wants_the_token(nodes: Nodes) -> None:
    for path in ("/api/jobs/", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(nodes.dashboard + path)
        assert refused.value.code in (401, 403)
        let_in = {"Authorization": f"Bearer {nodes.environment['RAY_AUTH_TOKEN']}"}
        assert urllib.request.urlopen(urllib.request.Request(nodes.dashboard + path, headers=let_in)).status == 200


def test_a_run_that_finds_no_room_stops_and_says_so(undisturbed: Run, nodes: Nodes, tmp_path: Path) -> None:
    storage = copy_without(undisturbed, tmp_path, ROUND)
    more = ["--workers", "9", "--placement.autoscale", "--placement.start-timeout", "5"]
    stopped = run([*TEACH, *more, "--storage", storage], nodes.environment, status=1)
    assert f"error: {ROUND}: the cluster had no room for 9 workers of 0.7 CPU for 5 s; it has " in stopped.out
    assert "Traceback" not in stopped.out + stopped.err


def test_a_run_outlives_the_loss_of_nodes(undisturbed: Run, nodes: Nodes, tmp_path: Path) -> None:
    """After the loss of one of three nodes, the workers continue. After one of two, they wait for a new node."""
    nodes.script("join", "third")
    storage = copy_without(undisturbed, tmp_path, ROUND)
    began = time.monotonic()
    driver = start([*TEACH, *OFTEN, "--storage", storage], nodes.environment)
    stood = 0
    for _ in range(2):
        wait_for_the_middle(undisturbed, storage, after=stood)
        working = nodes.at_work()
        assert len(working) == 2
        assert_nothing_listens_beyond_this_machine([p for name in nodes.names() for p in nodes.family(name)])
        nodes.lose(next(name for name in working if name != "head"))
        position = in_the_middle(undisturbed, storage, ROUND)
        stood = position.step
    assert nodes.names() == ["head"]
    nodes.script("join", "fourth")
    end_of(driver, began)
    assert_went_on_from(position, undisturbed, storage, ROUND)
    assert_same_adapters(undisturbed.storage, storage, [ROUND])


def test_a_worker_that_hangs_is_replaced_within_a_minute(undisturbed: Run, nodes: Nodes, tmp_path: Path) -> None:
    storage = copy_without(undisturbed, tmp_path, ROUND)
    began = time.monotonic()
    driver = start([*TEACH, *OFTEN, "--storage", storage], nodes.environment)
    wait_for_the_middle(undisturbed, storage)
    before = nodes.workers()
    os.kill(before[-1], signal.SIGSTOP)
    position = in_the_middle(undisturbed, storage, ROUND)
    wait_until(lambda: len(set(nodes.workers()) - set(before)) == 2, 60, "the replacement of a worker that hangs")
    assert not psutil.pid_exists(before[-1])
    end_of(driver, began)
    assert_went_on_from(position, undisturbed, storage, ROUND)
    assert_same_adapters(undisturbed.storage, storage, [ROUND])


def test_a_node_that_is_announced_to_go_leaves_a_checkpoint(undisturbed: Run, nodes: Nodes, tmp_path: Path) -> None:
    """It is the round's only checkpoint. The node is lost once it exists, before the announced time."""
    nodes.script("join", "fifth")
    storage = copy_without(undisturbed, tmp_path, ROUND)
    began = time.monotonic()
    soon = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    seldom = ["--placement.checkpoint-every", "1000000"]
    driver = start([*TEACH, *seldom, "--storage", storage], nodes.environment | soon)
    wait_until(lambda: len(nodes.at_work()) == 2, STARTED, "two workers")
    going = next(name for name in nodes.at_work() if name != "head")
    nodes.announce(going, seconds=120)
    wait_for_the_middle(undisturbed, storage)
    nodes.lose(going)
    position = in_the_middle(undisturbed, storage, ROUND)
    finished = end_of(driver, began)
    (note,) = [line for line in finished.out.splitlines() if line.startswith(f"note     {ROUND}: ")]
    assert "the cluster will lose 1 node in 1" in note
    assert note.endswith(f"checkpoint taken after step {position.step}")
    assert_went_on_from(position, undisturbed, storage, ROUND)
    assert_same_adapters(undisturbed.storage, storage, [ROUND])


def test_of_two_drivers_on_one_store_one_waits_and_goes_on_where_the_other_is_killed(
    undisturbed: Run, nodes: Nodes, tmp_path: Path
) -> None:
    storage = copy_without(undisturbed, tmp_path, ROUND)
    began = time.monotonic()
    drivers = [start([*TEACH, *OFTEN, "--storage", storage], nodes.environment) for _ in range(2)]
    wait_for_the_middle(undisturbed, storage)
    lease = json.loads((storage / f"leases/{undisturbed.records[ROUND].fingerprint[:16]}.json").read_text())
    ((holder, other),) = [pair for pair in (drivers, drivers[::-1]) if pair[0].pid == lease["pid"]]
    assert len(nodes.workers()) == 2
    holder.kill()
    holder.communicate()
    position = in_the_middle(undisturbed, storage, ROUND)
    finished = end_of(other, began)
    assert f"waiting  {ROUND} is being run by pid {holder.pid} on " in finished.out
    assert_went_on_from(position, undisturbed, storage, ROUND)
    assert_same_adapters(undisturbed.storage, storage, [ROUND])


def test_a_run_outlasts_a_storage_that_is_gone_for_a_while(undisturbed: Run, nodes: Nodes, bucket: Bucket) -> None:
    store = Store(f"{bucket.name}/runs", bucket.filesystem())
    began = time.monotonic()
    driver = start([*TEACH, *OFTEN, "--storage", f"s3://{bucket.name}/runs"], nodes.environment)
    wait_for_the_middle(undisturbed, store)
    bucket.stop()
    time.sleep(10)
    assert driver.poll() is None
    bucket.start()
    position = in_the_middle(undisturbed, store, ROUND)
    end_of(driver, began)
    assert_went_on_from(position, undisturbed, store, ROUND)
    assert_same_adapters(undisturbed.storage, store, [ROUND])


def kill_the_dashboard(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if "dashboard/dashboard.py" in " ".join(process.cmdline()):
                for each in [process, *process.children(recursive=True)]:
                    each.kill()


def answers(dashboard: str) -> bool:
    host, port = dashboard.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_submitted_job_outlives_its_client_and_the_dashboard(undisturbed: Run, nodes: Nodes, tmp_path: Path) -> None:
    storage = copy_without(undisturbed, tmp_path, ROUND)
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", nodes.dashboard]
    command += ["--runtime-env", "cluster/runtime_env.yaml", "--", "python", PIPELINE, *TEACH, *OFTEN]
    environment = {name: value for name, value in nodes.environment.items() if name != "RAY_ADDRESS"}
    client = subprocess.Popen([*command, "--storage", storage], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_for_the_middle(undisturbed, storage)
    client.kill()
    client.wait()
    kill_the_dashboard(nodes.family("head"))
    wait_until(lambda: not answers(nodes.dashboard), 10, "the end of the dashboard")
    in_the_middle(undisturbed, storage, ROUND)
    wait_until(lambda: "report/continual" in records(storage), 200, "the report")
    assert_same_adapters(undisturbed.storage, storage, [ROUND])


def test_no_secret_is_in_a_log_a_report_or_a_store(undisturbed: Run, nodes: Nodes, bucket: Bucket) -> None:
    """Neither the cluster's token nor the hub's is in any file or output of the runs so far."""
    tokens = [nodes.environment["RAY_AUTH_TOKEN"].encode(), SECRET.encode()]
    written = [path for path in nodes.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    written += [path for path in undisturbed.storage.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 50
    told = [path for path in written if any(token in path.read_bytes() for token in tokens)]
    assert not told
    said = undisturbed.finished.out + undisturbed.finished.err
    assert not any(token.decode() in said for token in tokens)


@pytest.fixture(scope="module")
def beheaded(undisturbed: Run, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The storage and the driver's output after the cluster lost its head node in the middle of the round."""
    storage = copy_without(undisturbed, tmp_path_factory.mktemp("beheaded"), ROUND)
    driver = start([*TEACH, *OFTEN, "--storage", storage], nodes.environment)
    wait_for_the_middle(undisturbed, storage)
    began = time.monotonic()
    nodes.lose("head")
    return Run(storage, end_of(driver, began, status=1, limit=60))


def test_the_loss_of_the_head_ends_the_run_with_a_clear_error(undisturbed: Run, beheaded: Run) -> None:
    said = beheaded.finished
    assert f"error: {ROUND}: the head of the cluster, or the node of this driver, is gone" in said.out
    assert "finished steps are kept: once the cause is gone, the same command goes on from here" in said.out
    assert "Traceback" not in said.out + said.err
    in_the_middle(undisturbed, beheaded.storage, ROUND)


def test_what_is_damaged_is_found_made_anew_and_said_on_a_cluster_of_ones_own(undisturbed: Run, beheaded: Run) -> None:
    """One bit of a table and one of a checkpoint are flipped, and half of an output exists. The cluster listens only on
    this machine, and loses its dashboard.
    """
    storage = beheaded.storage
    half = storage / f"steps/{undisturbed.records[ROUND].fingerprint[:16]}" / ("0" * 32) / "adapter"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    reference = undisturbed.records["reference/world_facts"].fingerprint
    table = Path(Store(storage).artifact(reference).path("reference.parquet"))
    saved = storage / checkpoint_path(undisturbed, ROUND)
    for file in (table, saved):
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
    damaged = saved.read_bytes()
    began = time.monotonic()
    driver = start([*TEACH, *OFTEN, "--storage", storage], plain_environment())
    wait_until(lambda: saved.read_bytes() != damaged, STARTED, "a checkpoint in place of the damaged one")
    family = psutil.Process(driver.pid).children(recursive=True)
    assert len(training(family)) == 2
    assert_nothing_listens_beyond_this_machine([psutil.Process(driver.pid), *family])
    kill_the_dashboard(family)
    in_the_middle(undisturbed, storage, ROUND)
    again = end_of(driver, began)
    assert f"redone   {table} has the right size but not the content that was written (SHA-256)" in again.out
    note = f"the checkpoint {saved} is not what was written (SHA-256): the round was started again"
    assert f"note     {ROUND}: {note}" in again.out
    assert not half.exists()
    assert_same_adapters(undisturbed.storage, storage, [ROUND])
