"""Checks of an interrupted round: the position where it stopped, and whether it resumed there."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from ray_cluster import Run, records, store_of

from corsa.flow import Store
from corsa.training.checkpoint import Position, read_checkpoint


def checkpoint(undisturbed: Run, storage: Path | Store, step: str) -> Position | None:
    """The position in the round's checkpoint; None without a checkpoint."""
    found = read_checkpoint(store_of(storage), checkpoint_path(undisturbed, step))
    return found[1] if found else None


def checkpoint_path(undisturbed: Run, step: str) -> str:
    """The path of a round's checkpoint in a store."""
    return f"partial/{undisturbed.records[step].fingerprint[:16]}/checkpoint"


def in_the_middle(undisturbed: Run, storage: Path | Store, step: str) -> Position:
    """The position where a round was stopped; fails unless the round was in progress."""
    position = checkpoint(undisturbed, storage, step)
    assert step not in records(storage)
    assert position is not None
    assert 0 < position.step < undisturbed.records[step].metrics["steps"]
    return position


def assert_went_on_from(position: Position, undisturbed: Run, storage: Path | Store, step: str) -> None:
    """Asserts that steps before the interruption did not run again (same durations), and that no step is missing."""
    curves = _curves(storage, step)
    assert curves.step.tolist() == list(range(1, undisturbed.records[step].metrics["steps"] + 1))
    before = [row["seconds"] for row in position.curves]
    assert curves.seconds.tolist()[: position.step] == before
    learnt = _curves(undisturbed.storage, step)
    assert curves.drop(columns="seconds").equals(learnt.drop(columns="seconds"))


def _curves(storage: Path | Store, step: str) -> pd.DataFrame:
    artifact = store_of(storage).artifact(records(storage)[step].fingerprint)
    return pd.read_parquet(io.BytesIO(artifact.read("curves.parquet")))
