"""Finds and removes the files of a store that no run needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, NamedTuple

from pyarrow import fs
from pydantic import Field, ValidationError

from corsa.config import Frozen
from corsa.flow.lease import STALE
from corsa.flow.store import Record, Store

_ALIVE = timedelta(seconds=4 * STALE)  # since a heartbeat


class Waste(NamedTuple):
    """A folder or a file of the store, why it can go or why it is kept, and its size in bytes."""

    path: str
    why: str
    size: int


class _Run(Frozen):
    """What a driver records about its run while it lasts (`corsa.flow.lease`)."""

    name: str
    steps: tuple[Annotated[str, Field(pattern="^[0-9a-f]{16}$")], ...]  # folders of all steps that it needs


class _Unfinished(NamedTuple):
    path: str
    run: _Run
    age: timedelta  # since its last heartbeat

    @property
    def alive(self) -> bool:
        return self.age < _ALIVE


def waste(store: Store, roots: Iterable[str], keep_days: float) -> tuple[list[Waste], list[Waste]]:
    """What no step of `roots` (fingerprints) depends on: finished steps, attempts without a record, checkpoints of
    finished or abandoned steps, and files of Ray Train.

    Everything that a run in progress needs or has finished is left alone, and so are steps that are being run. The
    finished steps and checkpoints of an interrupted run are kept for `keep_days` after its end. While a record cannot
    be read, every finished step is kept: it may be one that the damaged step rests on.

    Returns:
        What can be removed, and what is kept only because of interrupted runs or damaged records.
    """
    readable, damaged = store.records_and_damage()
    records = {record.fingerprint[:16]: record for record in readable}
    needed = {fingerprint[:16] for fingerprint in _needed(records, roots)}
    runs = _unfinished(store)
    busy = _busy(store, runs)
    recent = [run for run in runs if not run.alive and run.age < timedelta(days=keep_days)]
    found, kept = [], []

    def take(path: str, folder: str, why: str) -> None:
        of = next((run for run in recent if folder in run.run.steps), None)
        if of is None:
            found.append(_waste(store, path, why))
        else:
            kept.append(_waste(store, path, f"{why}; kept for {of.run.name}, which was interrupted {_ago(of.age)} ago"))

    for folder in _folders(store, "steps"):
        record = records.get(folder)
        if folder in busy or folder in needed:
            continue
        if f"steps/{folder}/record.json" in damaged:
            kept.append(
                _waste(store, f"steps/{folder}", "its record cannot be read: run its command again, or remove it")
            )
        elif record is not None and damaged:
            why = f"no run that is kept rests on it: {record.name}; kept while {damaged[0]} cannot be read"
            kept.append(_waste(store, f"steps/{folder}", why))
        elif record is None:
            found.append(_waste(store, f"steps/{folder}", "an attempt that never finished"))
        else:
            take(f"steps/{folder}", folder, f"no run that is kept rests on it: {record.name}")
    for folder in _folders(store, "partial"):
        if folder not in busy:
            take(f"partial/{folder}", folder, "checkpoints of a step that nobody is running")
    if not busy:
        found += [_waste(store, f"ray/{folder}", "left by Ray Train") for folder in _folders(store, "ray")]
    for run in runs:
        if not run.alive and run not in recent:
            found.append(Waste(run.path, f"what {run.run.name} needed, interrupted {_ago(run.age)} ago", 0))
    return found, kept


def remove(store: Store, found: Sequence[Waste]) -> None:
    """Remove what was found. A step's record goes first, so that a partly removed step is never taken for a result.

    What a run has begun to need in the meantime stays.
    """
    busy = _busy(store, _unfinished(store))
    for one in found:
        if one.path.partition("/")[2] not in busy:
            store.files.remove(f"{one.path}/record.json")
            store.files.remove(one.path)


def _needed(records: dict[str, Record], roots: Iterable[str]) -> set[str]:
    needed: set[str] = set()
    left = [fingerprint for fingerprint in roots if fingerprint[:16] in records]
    while left:
        fingerprint = left.pop()
        if fingerprint not in needed:
            needed.add(fingerprint)
            left += [f for f in records[fingerprint[:16]].inputs.values() if f[:16] in records]
    return needed


def _busy(store: Store, runs: Sequence[_Unfinished]) -> set[str]:
    """Folders of steps that a run in progress needs, or whose lease is fresh."""
    leases = [info for info in _listed(store, "leases") if info.extension == "json"]
    fresh = {info.base_name.partition(".")[0] for info in leases if _age(info) < _ALIVE}
    return fresh.union(*(run.run.steps for run in runs if run.alive))


def _unfinished(store: Store) -> list[_Unfinished]:
    """The runs without a result, in progress or interrupted."""
    found = []
    for info in _listed(store, "unfinished"):
        path = f"unfinished/{info.base_name}"
        try:
            run = _Run.model_validate_json(store.files.read(path) or b"")
        except ValidationError:  # not written by a driver, or partly removed
            continue
        found.append(_Unfinished(path, run, _age(info)))
    return found


def _age(info: fs.FileInfo) -> timedelta:
    return datetime.now(UTC) - info.mtime if info.mtime else timedelta()


def _ago(age: timedelta) -> str:
    return f"{age.days} days" if age.days > 1 else f"{age.total_seconds() / 3600:.1f} hours"


def _listed(store: Store, folder: str) -> list[fs.FileInfo]:
    return store.files.system.get_file_info(fs.FileSelector(store.files.inside(folder), allow_not_found=True))


def _folders(store: Store, kind: str) -> list[str]:
    return sorted(info.base_name for info in _listed(store, kind) if info.type == fs.FileType.Directory)


def _waste(store: Store, path: str, why: str) -> Waste:
    selector = fs.FileSelector(store.files.inside(path), allow_not_found=True, recursive=True)
    return Waste(path, why, sum(info.size or 0 for info in store.files.system.get_file_info(selector)))
