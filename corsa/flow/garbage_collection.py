"""What a store holds that nothing needs any more, and taking it away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pyarrow import fs

from corsa.flow.lease import STALE
from corsa.flow.store import Record, Store


class Waste(NamedTuple):
    """A folder of the store, why it can go, and its size in bytes."""

    path: str
    why: str
    size: int


def waste(store: Store, roots: Iterable[str]) -> list[Waste]:
    """What no step of `roots` (fingerprints) rests on: finished steps, attempts without a record, checkpoints of steps
    that are finished or were given up, and what Ray Train wrote. Steps that somebody is running are left alone.
    """
    records = {record.fingerprint: record for record in store.records()}
    needed = _needed(records, roots)
    held = _held(store)
    found = []
    for folder in _folders(store, "steps"):
        record = next((r for f, r in records.items() if f.startswith(folder)), None)
        if folder in held:
            continue
        if record is None:
            found.append(_waste(store, f"steps/{folder}", "an attempt that never finished"))
        elif record.fingerprint not in needed:
            found.append(_waste(store, f"steps/{folder}", f"no run that is kept rests on it: {record.name}"))
    for folder in _folders(store, "partial"):
        if folder not in held:
            found.append(_waste(store, f"partial/{folder}", "checkpoints of a step that nobody is running"))
    if not held:
        found += [_waste(store, f"ray/{folder}", "left by Ray Train") for folder in _folders(store, "ray")]
    return found


def remove(store: Store, found: Sequence[Waste]) -> None:
    """Take it away; a step's record goes first, so that nothing half gone is taken for a result."""
    for one in found:
        store.files.remove(f"{one.path}/record.json")
        store.files.remove(one.path)


def _needed(records: dict[str, Record], roots: Iterable[str]) -> set[str]:
    needed: set[str] = set()
    left = [fingerprint for fingerprint in roots if fingerprint in records]
    while left:
        fingerprint = left.pop()
        if fingerprint not in needed:
            needed.add(fingerprint)
            left += [f for f in records[fingerprint].inputs.values() if f in records]
    return needed


def _held(store: Store) -> set[str]:
    """Folders of steps whose lease is fresh."""
    selector = fs.FileSelector(store.files.inside("leases"), allow_not_found=True)
    young = datetime.now(UTC) - timedelta(seconds=4 * STALE)
    infos = store.files.system.get_file_info(selector)
    return {i.base_name.partition(".")[0][:16] for i in infos if i.mtime is not None and i.mtime > young}


def _folders(store: Store, kind: str) -> list[str]:
    selector = fs.FileSelector(store.files.inside(kind), allow_not_found=True)
    infos = store.files.system.get_file_info(selector)
    return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)


def _waste(store: Store, path: str, why: str) -> Waste:
    selector = fs.FileSelector(store.files.inside(path), allow_not_found=True, recursive=True)
    return Waste(path, why, sum(info.size or 0 for info in store.files.system.get_file_info(selector)))
