"""The time of a run outside training and evaluation, from its records and its wall time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from corsa.errors import CorsaError
from corsa.flow.store import Record, Store


@dataclass(frozen=True)
class OverheadFigures:
    """Seconds. The items add up to `overhead_s`."""

    wall_s: float
    training_s: float
    evaluation_s: float
    overhead_s: float
    items_s: dict[str, float]
    chains: int
    again_s: float  # the same command when all steps are done


CONNECTING = "the import of Ray, and cluster start or connecting"


def measure_overhead(command: Sequence[str], storage: Path) -> OverheadFigures:
    """Run a scenario with an empty storage, then run it again.

    Args:
        command: a scenario's command line without `--storage`.
        storage: a folder that does not exist, or is empty.

    Raises:
        CorsaError: the storage is not empty, or the command fails.
    """
    if storage.exists() and any(storage.iterdir()):
        raise CorsaError(f"{storage} is not empty: what is done there would not be measured; name a new folder")
    plain = _run([*command, "--storage", str(storage), "--dry-run"])
    began = time.time()
    wall = _run([*command, "--storage", str(storage)])
    again = _run([*command, "--storage", str(storage)])
    records = sorted(Store(storage).records(), key=_end)
    return itemised(records, began, plain, wall, again)


def itemised(records: Sequence[Record], began: float, plain: float, wall: float, again: float) -> OverheadFigures:
    """Breaks down the wall time: the times that steps record, and the time between steps. `plain`: seconds that the
    command takes only to plan.
    """
    rounds = [r for r in records if r.kind == "round"]

    def spent(what: str) -> float:
        return sum(r.metrics.get(f"{what}_s", 0.0) for r in rounds)

    training, evaluation = spent("training"), spent("evaluation")
    before = min((_end(r) - r.seconds for r in records if r.kind != "edits"), default=began + plain)
    items = {"imports and planning": plain}
    for record in records:
        if record.kind not in ("round", "report"):
            items[record.kind] = items.get(record.kind, 0.0) + record.seconds
    items[CONNECTING] = max(0.0, before - began - plain - items.get("edits", 0.0))
    if rounds:
        first = min(_end(r) - r.seconds for r in rounds)
        ready = max((_end(r) for r in records if r.kind in ("reference", "schedule", "statistics")), default=first)
        items["worker group start"] = max(0.0, first - ready - spent("stream"))
        items["data"] = spent("stream") + spent("data")
        items["model load"] = spent("loading")
        items["checkpoints and adapters"] = spent("checkpoints")
        named = training + evaluation + spent("data") + spent("loading") + spent("checkpoints")
        items["all else in rounds"] = sum(r.seconds for r in rounds) - named
    items["report"] = sum(r.seconds for r in records if r.kind == "report")
    overhead = wall - training - evaluation
    items["between steps, and the end of workers and cluster"] = overhead - sum(items.values())
    chains = len({r.name.rsplit("/round", 1)[0] for r in rounds if "/round" in r.name})
    return OverheadFigures(wall, training, evaluation, overhead, items, chains, again)


def _end(record: Record) -> float:
    return datetime.fromisoformat(record.created).timestamp()


def _run(command: Sequence[str]) -> float:
    """Run a command and return its seconds. `python` is replaced by this interpreter."""
    words = [sys.executable if command[0] == "python" else command[0], *command[1:]]
    start = time.perf_counter()
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CorsaError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return time.perf_counter() - start
