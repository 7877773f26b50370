"""The steps of an update that need no cluster: import the line, and make the edits that the update teaches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from corsa.config.steps import FactsConfig, LineConfig
from corsa.data.benchmarks.cases import asked_once
from corsa.data.benchmarks.file import Draft, drafts_of
from corsa.data.edit import Edit, from_table, to_table
from corsa.editing.history import WEIGHTS, Standing, join, reworded, taken_back
from corsa.evaluation.predict import with_values
from corsa.evaluation.prepared_predictions import BASE
from corsa.flow.task import Task


def import_line(task: Task) -> dict[str, Any]:
    """Step function: an adapter's directory -> adapter/, edits.parquet and predictions.parquet (if it has them)."""
    config: LineConfig = task.config
    source = Path(task.placement.directory)
    (task.output / "adapter").mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(source / name, task.output / "adapter" / name)
    metrics = {"edits": 0}
    if (source / "edits.parquet").is_file():
        shutil.copyfile(source / "edits.parquet", task.output / "edits.parquet")
        metrics["edits"] = pq.read_metadata(source / "edits.parquet").num_rows
    if (source / "predictions.parquet").is_file():
        rows = pq.read_table(source / "predictions.parquet")
        rows = rows.filter(pc.field("method") != BASE)
        rows = with_values(rows, method=config.method, seed=config.seed)
        pq.write_table(rows, task.output / "predictions.parquet")
    return metrics


def read_facts(task: Task) -> dict[str, Any]:
    """Step function: a user's file -> edits.parquet: the line's edits, then the edits of this update."""
    drafts = drafts_of(Path(task.placement.data))
    return write_edits(task, drafts, {}) | {"asked": 0, "known": 0}


def write_edits(task: Task, drafts: Sequence[Draft], answers: dict[str, str]) -> dict[str, Any]:
    """Writes the line's edits and the new ones. `answers` are the model's answers, used as old answers."""
    config: FactsConfig = task.config
    line = line_edits(task)
    before = standing(line)
    edits, repeats = asked_once(join(before, drafts, config.update, answers), before)
    known = Standing(before)
    templated = sum(not reworded(d) and known.matched(d) is None for d in drafts)
    return _write(task, [*line, *edits]) | {"edits": len(edits), "templated": templated} | repeats.counts


def take_back(task: Task) -> dict[str, Any]:
    """Step function: the line -> edits.parquet: its edits, then the edits that teach old answers again."""
    line = line_edits(task)
    edits = taken_back(standing(line), task.config.edits, task.config.update)
    return _write(task, [*line, *edits]) | {"edits": len(edits), "templated": 0, "asked": 0, "known": 0}


def take_standing(task: Task) -> dict[str, Any]:
    """Step function: the line -> edits.parquet: the latest edit of each fact."""
    edits = standing(line_edits(task))
    return _write(task, edits) | {"edits": len(edits)}


def line_edits(task: Task) -> list[Edit]:
    """The edits of the input `line`; empty without a line, or if it was made elsewhere."""
    line = task.inputs.get("line")
    if line is None or "edits.parquet" not in line.record.files:
        return []
    return from_table(pq.read_table(line.local("edits.parquet")))


def standing(line: Sequence[Edit]) -> list[Edit]:
    """The latest edit of each fact."""
    return list({edit.chain: edit for edit in line}.values())


def _write(task: Task, edits: Sequence[Edit]) -> dict[str, Any]:
    pq.write_table(to_table(edits), task.output / "edits.parquet")
    (task.output / "skipped.json").write_text(json.dumps([]))
    return {"facts": len({e.chain for e in edits})}
