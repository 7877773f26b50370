"""Storage that fails temporarily: an S3 server that is stopped and restarted, and a share whose server is gone."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket import Bucket
from flow_steps import ADD, chain, execute, step
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from corsa.errors import CorsaError
from corsa.flow import Store
from corsa.flow.files import Files
from corsa.flow.lease import STALE, Leases

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    bucket = Bucket()
    yield bucket
    bucket.stop()


@pytest.fixture
def store(server: Bucket, tmp_path: Path) -> Store:
    return Store(f"{server.name}/{tmp_path.name}", server.filesystem())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def test_every_operation_outlasts_a_server_that_is_gone_for_a_while(
    store: Store, server: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = store.files
    files.replace("kept", b"kept")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "file").write_text("content")
    for deed, result in [
        (lambda: files.read("kept"), b"kept"),
        (lambda: files.publish("kept", b"other"), False),
        (lambda: files.publish("new", b"new"), True),
        (lambda: files.replace("kept", b"replaced"), None),
        (lambda: files.upload(tmp_path / "output", "folder"), None),
        (lambda: files.names("folder"), ["file"]),
        (lambda: files.info(["folder/file"])[0].size, 7),
        (lambda: files.remove("new"), None),
    ]:
        server.gone_for(0.3)
        assert deed() == result
        assert "trying again in 0.5 s" in caplog.text
        caplog.clear()
    assert files.read("kept") == b"replaced"
    assert files.read("new") is None


def test_a_run_ends_as_if_the_server_had_never_been_gone(store: Store, server: Bucket, log: Path) -> None:
    steps = chain("round", 3, log, step("before", ADD, log, sleep=0.5), sleep=0.5)
    threading.Timer(0.7, server.gone_for, [2.0]).start()
    outcome, _, _ = execute(store, *steps)
    assert not outcome.failed
    assert outcome.artifacts[steps[-1].fingerprint].metrics == {"sum": 7.0}
    assert sorted(record.name for record in store.records()) == ["before", "round/1", "round/2", "round/3"]
    assert store.files.names("leases") == []


def test_a_lease_is_released_when_the_server_is_back(
    store: Store, server: Bucket, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corsa.flow.lease.HEARTBEAT", 0.2)
    leases, other = Leases(store), Leases(store)
    this = step("this", ADD, log)
    with leases.unfinished([this], print):
        server.stop()
    server.start()
    began = time.monotonic()
    with other.unfinished([this], print):  # waits for the next heartbeat, not until the lease is stale
        waited = time.monotonic() - began
    leases.close()
    other.close()
    assert waited < STALE / 3
    assert store.files.names("leases") == []


def test_a_server_that_stays_away_is_an_error_that_says_how_to_go_on(store: Store, server: Bucket, log: Path) -> None:
    store.files.patience = 1.0
    server.stop()
    try:
        with pytest.raises(CorsaError, match=r"does not answer, for 1 s now: .*NETWORK_CONNECTION.* the same command"):
            execute(store, step("this", ADD, log))
    finally:
        server.start()
    assert log.read_text() == ""


def test_what_will_not_pass_is_not_tried_again(server: Bucket, log: Path) -> None:
    began = time.monotonic()
    with pytest.raises(CorsaError, match=r"cannot write to no-such-bucket/x: Bucket .* not found.*Check the address"):
        execute(Store("no-such-bucket/x", server.filesystem()), step("this", ADD, log))
    assert time.monotonic() - began < 3


def test_a_network_share_is_asked_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, failures = os.link, [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]

    def unreliable(source: Path, target: Path) -> None:
        if failures:
            raise OSError(failures.pop(), "the server is gone")
        link(source, target)

    monkeypatch.setattr(os, "link", unreliable)
    assert Files(tmp_path).publish("one", b"1")
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == ["one"]  # no attempt left anything behind


def test_a_file_whose_upload_fails_when_it_ends_is_sent_again(tmp_path: Path) -> None:
    """As in S3, where data goes out when the stream is closed."""

    class Lost(io.BytesIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                raise OSError(errno.ETIMEDOUT, "no answer")

    class Unreliable(LocalFileSystem):
        writes = 0

        def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            self.writes += mode == "wb"
            return Lost() if mode == "wb" and self.writes == 1 else super().open(path, mode, **options)

    (tmp_path / "output" / "folder").mkdir(parents=True)
    (tmp_path / "output" / "folder" / "file").write_text("content")
    unreliable = fs.PyFileSystem(fs.FSSpecHandler(Unreliable(skip_instance_cache=True)))
    Files(tmp_path / "store", unreliable).upload(tmp_path / "output", "kept")
    assert (tmp_path / "store" / "kept" / "folder" / "file").read_text() == "content"


def test_a_write_whose_answer_was_lost_is_ours(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease and the record exist; the second attempt at each finds what the first one wrote."""
    link, lost = os.link, []

    def answers_late(source: Path, target: Path) -> None:
        link(source, target)
        if target.name not in lost:
            lost.append(target.name)
            raise OSError(errno.ETIMEDOUT, "no answer")

    monkeypatch.setattr(os, "link", answers_late)
    this, store = step("this", ADD, log), Store(tmp_path / "store")
    outcome, text, _ = execute(store, this)
    assert {"record.json", f"{this.fingerprint[:16]}.json"} <= set(lost)
    assert "waiting" not in text
    assert outcome.artifacts[this.fingerprint].read("folder/sum.txt") == b"1.0"
    assert log.read_text().split() == ["this"]


def test_a_heartbeat_does_not_wait_for_the_storage(
    store: Store, server: Bucket, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corsa.flow.lease.HEARTBEAT", 0.05)
    leases = Leases(store)
    with leases.unfinished([step("this", ADD, log)], print):
        server.stop()
        time.sleep(0.3)
        began = time.monotonic()
        leases.close()
        assert time.monotonic() - began < 5
    server.start()
