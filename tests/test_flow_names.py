"""A store, a lease and an address that somebody else wrote: no path in them leaves the store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from flow_steps import ADD, execute, step
from pyarrow import fs

from corsa.errors import CorsaError
from corsa.flow import DamagedError, Store
from corsa.flow.files import Files
from corsa.flow.lease import Leases
from corsa.flow.names import below, part, relative

SECRET = b"what nobody may read"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


@pytest.fixture(params=["local", "elsewhere"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "local":
        return Store(tmp_path / "bucket" / "store")
    (tmp_path / "bucket").mkdir()
    return Store("store", fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem()))


def forged(store: Store, fingerprint: str, fields: dict[str, Any]) -> None:
    """The record with changed fields, as somebody with access to the bucket could write it."""
    path = store.record_path(fingerprint)
    record = json.loads(store.files.read(path) or b"")
    store.files.replace(path, json.dumps(record | fields).encode())


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/etc/passwd",
        "a/../../out",
        "..",
        ".",
        "",
        "a//b",
        "a/",
        "a\\..\\b",
        "C:out",
        "a\nb",
        "a\x00b",
        "\u202eb",
    ],
)
def test_a_name_that_could_mean_another_place_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the name of a file"):
        relative(name)
    with pytest.raises(ValueError, match="is not the name of a file"):
        part(name)
    with pytest.raises(CorsaError, match="is not the name of a file"):
        below(tmp_path, name)
    assert relative("adapter/adapter_config.json") == "adapter/adapter_config.json"
    with pytest.raises(ValueError, match="is not the name"):
        part("adapter/adapter_config.json")


@pytest.mark.parametrize("name", ["../../../out", "/tmp/out", "x/../../../../out", "a\\b"])
@pytest.mark.parametrize("field", ["attempt", "files", "fingerprint", "inputs"])
def test_a_record_that_names_another_place_is_damaged_and_nothing_is_written(
    store: Store, log: Path, tmp_path: Path, field: str, name: str
) -> None:
    this = step("this", ADD, log)
    execute(store, this)
    entry = [len(SECRET), hashlib.sha256(SECRET).hexdigest()]
    forged(store, this.fingerprint, {field: {"files": {name: entry}, "inputs": {"input": name}}.get(field, name)})
    artifact = store.artifact(this.fingerprint)
    before = sorted(tmp_path.rglob("*"))
    for deed in (
        lambda: artifact.read(name),
        lambda: artifact.local(name),
        lambda: artifact.path(name),
        lambda: artifact.check(checksums=True),
        lambda: artifact.url,
    ):
        with pytest.raises(DamagedError, match="is not a record"):
            deed()
    assert store.records() == []
    assert sorted(tmp_path.rglob("*")) == before
    outcome, said, _ = execute(store, this)  # it runs again, like any damaged step
    assert "redone" in said
    assert outcome.artifacts[this.fingerprint].read("folder/sum.txt") == b"1.0"


def test_a_record_under_another_steps_name_is_no_result(store: Store, log: Path) -> None:
    one, other = step("one", ADD, log), step("other", ADD, log, value=2)
    execute(store, one, other)
    record = store.files.read(store.record_path(one.fingerprint))
    store.files.replace(store.record_path(other.fingerprint), record or b"")
    assert [found.name for found in store.records()] == ["one"]
    assert store.find(other) is None


def test_a_link_in_a_local_store_is_not_followed_out_of_it(tmp_path: Path, log: Path) -> None:
    store, this = Store(tmp_path / "store"), step("this", ADD, log)
    execute(store, this)
    (tmp_path / "secret").write_bytes(SECRET)
    found = store.artifact(this.fingerprint)
    file = Path(found.path("folder/sum.txt"))
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    for deed in (found.read, found.local, found.path):
        with pytest.raises(CorsaError, match=r"leads out of .*/steps, to .*/secret: a link"):
            deed("folder/sum.txt")


def test_what_is_fetched_is_checked_also_when_it_was_fetched_before(
    tmp_path: Path, log: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir()
    store = Store("store", fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem()))
    this = step("this", ADD, log)
    execute(store, this)
    found = store.artifact(this.fingerprint)
    local = found.local("folder/sum.txt")
    assert local.is_relative_to(tmp_path / "cache")
    local.write_bytes(b"9.9")  # by another store with an attempt of this name, or by hand
    assert found.local("folder/sum.txt").read_bytes() == b"1.0"
    local.unlink()
    local.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorsaError, match="leads out of"):
        found.local("folder/sum.txt")
    assert not (tmp_path / "elsewhere").exists()
    local.unlink()
    store.files.replace(f"steps/{this.fingerprint[:16]}/{found.record.attempt}/folder/sum.txt", b"9.9")
    with pytest.raises(DamagedError, match="is damaged"):
        found.local("folder/sum.txt")
    assert not local.exists()


@pytest.mark.parametrize("pid", ["../../etc/passwd", -1, 1.5, None, [1]])
def test_a_lease_that_somebody_else_wrote_names_no_file(tmp_path: Path, log: Path, pid: Any) -> None:
    store, this = Store(tmp_path / "store"), step("this", ADD, log)
    holder = {"host": "h", "machine": "m", "pid": pid, "started": "s", "token": "t"}
    store.files.replace(f"leases/{this.fingerprint[:16]}.json", json.dumps(holder).encode())
    leases = Leases(store)
    assert str(leases._holder(f"leases/{this.fingerprint[:16]}.json")) == "pid 0 on an unknown host"
    leases.close()


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEYID:HUSH@bucket/runs",
        "s3://KEYID:HU/SH+H@bucket/runs",
        "s3://KEYID@bucket",
        "s3://KEYID:HUSH",
        "gs://KEYID:HUSH@bucket",
        "ftp://KEYID:HUSH@host/x",
        "s3://KEYID%3AHUSH%40bucket/runs",
        "s3://KEYID%3aHU%2FSH+H@bucket/runs",
        "s3://bucket/runs?endpoint_override=http://KEYID:HUSH@host",
        "s3://bucket/runs?region=x&endpoint_override=http%3A%2F%2FKEYID%3AHUSH%40host",
        "s3://bucket/runs?secret_key=HUSH",
        "s3://bucket/runs?x=1;access-key=KEYID",
        "abfs://bucket/runs?sas_token=HUSH",
    ],
)
def test_an_address_with_credentials_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(CorsaError, match="credentials do not belong in an address") as caught:
        Store(address)
    chain: BaseException | None = caught.value
    while chain is not None:
        assert not any(word in str(chain) for word in ("KEYID", "HUSH", "HU/SH", "bucket"))
        chain = chain.__cause__ or chain.__context__


@pytest.mark.parametrize("address", ["s3:/KEYID:HUSH@bucket/runs", "s3:KEYID%3AHUSH%40bucket", "gs:KEYID:HUSH"])
def test_an_address_that_names_no_bucket_is_not_shown_where_it_may_hold_credentials(address: str) -> None:
    with pytest.raises(CorsaError, match=r"storage '(s3|gs):\.\.\.' names no bucket") as caught:
        Store(address)
    assert not any(word in str(caught.value) for word in ("KEYID", "HUSH"))


@pytest.mark.parametrize(
    "address", ["s3://bucket/me@home/runs", "s3://bucket", "s3://bucket/runs?endpoint_override=h:1"]
)
def test_an_address_without_credentials_is_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        """Arrow asks Amazon for the region of a bucket."""

        from_uri = staticmethod(lambda url: (fs.LocalFileSystem(), url))

    monkeypatch.setattr("corsa.flow.files.fs.FileSystem", Known)
    assert Files(address).url == address


def test_what_an_address_asks_for_in_vain_is_not_shown() -> None:
    with pytest.raises(CorsaError) as caught:
        Store("s3://bucket/runs?secret_key=HUSH")
    assert "HUSH" not in str(caught.value)
