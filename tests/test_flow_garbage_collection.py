"""Garbage collection of a store keeps the files that a running or interrupted run needs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flow_steps import ADD, chain, diamond, execute, step
from pyarrow import fs

from corsa.cli.main import main
from corsa.flow import Store
from corsa.flow.garbage_collection import remove, waste
from corsa.flow.lease import Leases

DAY = 86400.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


@pytest.fixture(params=["local", "elsewhere"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "bucket" / "store")
    (tmp_path / "bucket").mkdir()
    return Store("store", fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem()))


@pytest.fixture
def leases(store: Store) -> Iterator[Leases]:
    taken = Leases(store)
    yield taken
    taken.close()


def names(store: Store) -> set[str]:
    return {record.name for record in store.records()}


def age(store: Store, tmp_path: Path, days: float) -> None:
    """Makes the runs look inactive for the given number of days."""
    del store
    then = time.time() - days * DAY
    for file in (tmp_path / "bucket" / "store" / "unfinished").iterdir():
        os.utime(file, (then, then))


def test_what_a_run_in_progress_needs_is_left_alone(store: Store, log: Path, leases: Leases) -> None:
    """It also keeps finished steps that no report uses yet, but no steps of another run."""
    first, second = chain("round", 2, log, step("edits", ADD, log))
    execute(store, first)
    execute(store, step("other", ADD, log, value=7))
    found, kept = waste(store, [], 0.0)
    assert {one.why.rpartition(": ")[2] for one in found} == {"edits", "round/1", "other"}  # before the run begins
    leases.protect([second], [*second.inputs.values(), *first.inputs.values(), second])
    remove(store, found)  # a preview that was made before
    assert names(store) == {"edits", "round/1"}
    store.files.replace(f"partial/{second.fingerprint[:16]}/checkpoint", b"half")
    store.files.replace("ray/run/state", b"of Ray")
    found, kept = waste(store, [], 0.0)
    assert (found, kept) == ([], [])
    leases.finished()
    assert {one.path.partition("/")[0] for one in waste(store, [], 0.0)[0]} == {"steps", "partial", "ray"}


def test_a_heartbeat_keeps_the_protection_and_ends_with_the_run(
    store: Store, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corsa.flow.lease.HEARTBEAT", 0.05)
    this = step("this", ADD, log)
    execute(store, this)
    leases = Leases(store)
    leases.protect([this], [this])
    age(store, tmp_path, days=1)
    time.sleep(0.5)
    assert waste(store, [], 0.0) == ([], [])
    leases.close()
    time.sleep(0.2)
    age(store, tmp_path, days=1)
    assert len(waste(store, [], 0.0)[0]) == 2  # the step, and the file of the run


def test_what_an_interrupted_run_has_finished_is_kept_for_a_time_and_named(
    store: Store, log: Path, tmp_path: Path
) -> None:
    """A run that fails in its last step: the same command can resume it."""
    before = step("before", ADD, log)
    last = step("last", ADD, log, before, fail="on purpose")
    assert execute(store, last)[0].failed
    store.files.replace(f"partial/{last.fingerprint[:16]}/checkpoint", b"half")
    execute(store, step("orphan", ADD, log, value=7))  # of a run that has ended
    age(store, tmp_path, days=3)
    found, kept = waste(store, [], 14.0)
    empty = "an attempt that never finished"  # the output folder of the failed step
    assert {one.why for one in found} - {empty} == {"no run that is kept rests on it: orphan"}
    assert [one.why for one in kept] == [
        "no run that is kept rests on it: before; kept for last, which was interrupted 3 days ago",
        "checkpoints of a step that nobody is running; kept for last, which was interrupted 3 days ago",
    ]
    remove(store, found)
    assert names(store) == {"before"}
    found, kept = waste(store, [], 2.0)  # it has expired
    assert kept == []
    assert {one.path.partition("/")[0] for one in found} == {"steps", "partial", "unfinished"}
    remove(store, found)
    assert waste(store, [], 2.0) == ([], [])
    assert names(store) == set()


def test_a_run_ends_well_though_the_store_is_cleaned_all_the_while(store: Store, log: Path) -> None:
    outcomes = []
    steps = diamond(log, sleep=0.3)
    driver = threading.Thread(target=lambda: outcomes.append(execute(store, *steps)))
    driver.start()
    cleaned = 0
    while driver.is_alive():
        remove(store, waste(store, [], 0.0)[0])
        cleaned += 1
        time.sleep(0.05)
    assert cleaned > 3
    assert not outcomes[0][0].failed
    assert names(store) >= {"base", "left", "right", "round/1", "round/2", "round/3"}
    assert log.read_text().split().count("base") == 1


def test_a_run_that_is_done_leaves_nothing_to_protect(store: Store, log: Path) -> None:
    failing, mended = (step("last", ADD, log, step("before", ADD, log), fail=why) for why in ("no", ""))
    execute(store, failing)
    assert len(store.files.names("unfinished")) == 1
    execute(store, mended)
    assert store.files.names("unfinished") == []


def test_the_command_names_what_it_keeps(tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "bucket" / "store")
    execute(store, step("last", ADD, log, step("before", ADD, log), fail="on purpose"))
    age(store, tmp_path, days=3)
    command = ["runs", "clean", "--storage", str(tmp_path / "bucket" / "store"), "--yes"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 folders, 0.0 MiB in all, removed" in said  # the output folder of the failed step
    assert "--keep-days 0" in said
    assert "before; kept for last, which was interrupted 3 days ago" in said
    assert names(store) == {"before"}
    assert main([*command, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["kept"]) == 1
    assert main([*command, "--keep-days", "-1"]) == 2
    assert main([*command, "--keep-days", "2"]) == 0
    assert names(store) == set()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "x", "steps": ["../../etc"]}', b"[" * 100_000])
def test_a_file_of_a_run_that_nobody_wrote_protects_and_breaks_nothing(store: Store, log: Path, content: bytes) -> None:
    execute(store, step("this", ADD, log))
    store.files.replace("unfinished/0123.json", content)
    assert len(waste(store, [], 14.0)[0]) == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "report"}', b"[" * 100_000])
def test_nothing_finished_goes_while_a_record_cannot_be_read(store: Store, log: Path, content: bytes) -> None:
    """It may be the record of the run that rests on the others."""
    first, second = chain("round", 2, log, step("edits", ADD, log))
    execute(store, second)
    store.files.replace(store.record_path(second.fingerprint), content)
    found, kept = waste(store, [], keep_days=0)
    assert found == []
    spared = {one.path: one.why for one in kept}
    assert "its record cannot be read" in spared[f"steps/{second.fingerprint[:16]}"]
    assert (
        f"kept while {store.record_path(second.fingerprint)} cannot be read"
        in spared[f"steps/{first.fingerprint[:16]}"]
    )
    assert len(kept) == 3


def test_a_record_that_cannot_be_read_is_named(store: Store, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not store.files.local:
        pytest.skip("the command opens a store by its address")
    only = step("edits", ADD, log)
    execute(store, only)
    store.files.replace(store.record_path(only.fingerprint), b"{")
    assert main(["runs", "--storage", store.url]) == 0
    assert f"note: {store.record_path(only.fingerprint)} cannot be read" in capsys.readouterr().err
