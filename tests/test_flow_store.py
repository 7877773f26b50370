"""Stored files, detected damage, and storage that refuses access."""

from __future__ import annotations

import errno
import math
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from flow_steps import ADD, FILL, Number, chain, execute, step
from pyarrow import fs

from corsa.errors import CorsaError
from corsa.flow import DamagedError, MissingError, Step, Store, Task
from corsa.flow.files import Files


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


@pytest.fixture(params=["local", "elsewhere"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    (tmp_path / "bucket").mkdir()
    return Store("store", fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem()))


def written(store: Store, step: Step, text: str = "hello") -> Task:
    task = Task(step, store)
    (task.output / "folder").mkdir()
    (task.output / "folder" / "file.txt").write_text(text)
    return task


def test_a_record_says_what_was_run_with_what(store: Store, log: Path) -> None:
    before = step("before", ADD, log)
    this = step("this", ADD, log, before, value=2)
    assert store.find(this) is None
    with pytest.raises(MissingError):
        store.artifact(this.fingerprint).metrics  # noqa: B018
    found = written(store, this).commit({"loss": 0.5, "ratio": math.nan, "each": {"a": [1]}}, 1.23456)
    record = found.record
    assert (record.name, record.kind, record.version, record.config) == ("this", "add", 1, {"value": 2.0})
    assert record.inputs == {"input0": before.fingerprint}
    assert record.metrics == {"loss": 0.5, "ratio": None, "each": {"a": [1]}}
    assert record.seconds == 1.235
    assert {"python", "torch", "ray"} <= record.versions.keys()
    assert record.files["folder/file.txt"][0] == 5
    assert found.read("folder/file.txt") == b"hello"
    with pytest.raises(CorsaError, match=r"'this' has no file 'else', only: folder/file\.txt"):
        found.path("else")
    written(store, before).commit({}, 0)
    assert [record.name for record in store.records()] == ["this", "before"]


def test_local_files_of_a_store_elsewhere(
    store: Store, log: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = written(store, step("this", ADD, log)).commit({}, 0)
    for _ in range(2):
        assert (found.local("folder") / "file.txt").read_text() == "hello"


def test_the_first_record_wins_and_partial_results_go(store: Store, log: Path) -> None:
    this = step("this", ADD, log)
    one, two = written(store, this, "one"), pickle.loads(pickle.dumps(written(store, this, "lost")))
    (two.output / "other").write_text("two")  # the serialized copy has its own directory
    store.files.replace(f"partial/{this.fingerprint[:16]}/checkpoint", b"half")
    assert one.partial == f"{store.url}/partial/{this.fingerprint[:16]}"
    assert two.finished is None
    assert one.commit({}, 0).read("folder/file.txt") == b"one"
    two.output.mkdir(parents=True, exist_ok=True)
    assert two.commit({}, 0).read("folder/file.txt") == b"one"
    assert two.finished
    assert store.files.read(f"partial/{this.fingerprint[:16]}/checkpoint") is None


def test_half_written_output_is_invisible_and_swept(store: Store, log: Path) -> None:
    this = step("this", ADD, log)
    for name in ("one", "two"):
        store.files.replace(f"steps/{this.fingerprint[:16]}/{name}/folder/sum.txt", b"nonsense")
    assert store.find(this) is None
    assert store.records() == []
    outcome, _, _ = execute(store, this)
    assert outcome.artifacts[this.fingerprint].read("folder/sum.txt") == b"1.0"
    if store.files.local:
        assert len(list(Path(store.files.inside("steps")).glob("*/*"))) == 2  # one attempt and its record


def break_record(store: Store, fingerprint: str) -> None:
    store.files.replace(f"steps/{fingerprint[:16]}/record.json", b"{")


def shorten(store: Store, fingerprint: str) -> None:
    attempt = store.artifact(fingerprint).record.attempt
    store.files.replace(f"steps/{fingerprint[:16]}/{attempt}/folder/sum.txt", b"")


def flip(store: Store, fingerprint: str) -> None:
    attempt = store.artifact(fingerprint).record.attempt
    store.files.replace(f"steps/{fingerprint[:16]}/{attempt}/folder/sum.txt", b"9.9")


def take_away(store: Store, fingerprint: str) -> None:
    store.files.remove(f"steps/{fingerprint[:16]}/{store.artifact(fingerprint).record.attempt}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [(break_record, "not a record"), (shorten, "0 bytes, 3 were"), (flip, "(SHA-256)"), (take_away, "is gone")],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_damaged_result_is_redone_and_said(store: Store, log: Path, damage, said: str, together: bool) -> None:
    first, second = chain("round", 2, log) if together else (a := step("first", ADD, log), step("second", ADD, log, a))
    execute(store, second)
    good = store.artifact(first.fingerprint)
    assert good.read("folder/sum.txt") == b"1.0"
    damage(store, first.fingerprint)
    if damage is flip:
        with pytest.raises(DamagedError, match="Run the same command again"):
            good.read("folder/sum.txt")

    log.write_text("")
    third = step("third", ADD, log, first, second, value=3)
    outcome, text, _ = execute(store, third)
    assert not outcome.failed
    assert f"redone   {store.url}" in text
    assert said in text
    assert second.name not in log.read_text()
    assert log.read_text().count(first.name) == 1
    assert store.artifact(first.fingerprint).read("folder/sum.txt") == b"1.0"
    assert execute(store, third)[1].strip() == "3 steps: 3 done, 0 to do"


def test_a_store_in_memory() -> None:
    memory = Store("root", fs._MockFileSystem())
    memory.files.replace("a/b", b"x")
    assert memory.files.read("a/b") == b"x"
    assert not memory.files.publish("a/b", b"y")
    assert memory.files.publish("a/c", b"y")
    memory.files.remove("a")
    assert memory.files.read("a/b") is None


def test_a_local_root_by_url_and_an_unknown_one(tmp_path: Path) -> None:
    assert Store(f"file://{tmp_path}").files.local
    assert pickle.loads(pickle.dumps(Store(tmp_path))).url == str(tmp_path)
    with pytest.raises(CorsaError, match=r"storage 'ftp://x'.*Give a local path, s3://\.\.\. or gs://"):
        Store("ftp://x")


def test_exclusive_creation_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    files = Files(tmp_path)
    assert files.publish("folder/one", b"1")
    assert not files.publish("folder/one", b"2")
    assert files.read("folder/one") == b"1"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["one"]


def test_a_store_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path, log: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CorsaError, match=r"cannot write to .*file/store.*: Not a directory\. Choose a --storage"):
        execute(Store(tmp_path / "file" / "store"), step("this", ADD, log))
    with pytest.raises(
        CorsaError, match=r"cannot write to /proc/store: No such file or directory\. Choose a --storage"
    ):
        execute(Store("/proc/store"), step("this", ADD, log))
    assert log.read_text() == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_fails_the_step_with_the_remedy_and_keeps_the_rest(small_disk: Path, log: Path) -> None:
    store = Store(small_disk)
    small = step("small", ADD, log)
    outcome, text, _ = execute(store, Step("big", FILL, Number()), small)
    assert "No space left on device. Free some space there or choose another --storage" in outcome.failed["big"]
    assert "Traceback" not in text
    execute(store, small)
    assert store.find(small, checksums=True)


def test_a_record_that_does_not_fit_fails_the_step_with_the_remedy(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Files.publish

    def full(self: Files, path: str, content: bytes) -> bool:
        if path.endswith("record.json"):
            with self.writing():
                raise OSError(errno.ENOSPC, "full")
        return publish(self, path, content)

    monkeypatch.setattr(Files, "publish", full)
    outcome, _, _ = execute(Store(tmp_path / "store"), step("this", ADD, log))
    assert "No space left on device" in outcome.failed["this"]
    monkeypatch.undo()
    assert not execute(Store(tmp_path / "store"), step("this", ADD, log))[0].failed
