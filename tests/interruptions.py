"""A round that was stopped in its middle: where it stood, and whether it went on from there."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from ray_cluster import Run, records, store_of

from corsa.flow import Store
from corsa.training.checkpoint import Position, read_checkpoint


def checkpoint(undisturbed: Run, storage: Path | Store, step: str) -> Position | None:
    """Where a round stands, None if it has no checkpoint."""
    found = read_checkpoint(store_of(storage), checkpoint_path(undisturbed, step))
    return found[1] if found else None


def checkpoint_path(undisturbed: Run, step: str) -> str:
    """Where in a store the checkpoint of a round lies."""
    return f"partial/{undisturbed.records[step].fingerprint[:16]}/checkpoint"


def in_the_middle(undisturbed: Run, storage: Path | Store, step: str) -> Position:
    """Where a round stood when it was stopped; fails if it was not in its middle."""
    position = checkpoint(undisturbed, storage, step)
    assert step not in records(storage)
    assert position is not None
    assert 0 < position.step < undisturbed.records[step].metrics["steps"]
    return position


def assert_went_on_from(position: Position, undisturbed: Run, storage: Path | Store, step: str) -> None:
    """The steps before the interruption were not taken again (their durations are those of then); none is lost."""
    curves = _curves(storage, step)
    assert curves.step.tolist() == list(range(1, undisturbed.records[step].metrics["steps"] + 1))
    before = [row["seconds"] for row in position.curves]
    assert curves.seconds.tolist()[: position.step] == before
    learnt = _curves(undisturbed.storage, step)
    assert curves.drop(columns="seconds").equals(learnt.drop(columns="seconds"))


def _curves(storage: Path | Store, step: str) -> pd.DataFrame:
    artifact = store_of(storage).artifact(records(storage)[step].fingerprint)
    return pd.read_parquet(io.BytesIO(artifact.read("curves.parquet")))
