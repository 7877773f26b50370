"""Rounds on one worker without a cluster: packed or one by one, each round gives the same separate result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray_cluster import adapter
from rich.console import Console

from corsa.config import LoraConfig, ModelConfig, Placement, TrainingConfig
from corsa.config.steps import RoundsConfig
from corsa.data.edit import from_table
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Step, Store, run
from corsa.flow.task import Silent, Task
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer
from corsa.training.rounds import take_rounds
from corsa.training.tokens import REFERENCE, TokenTable, token_rows
from corsa.training.worker_context import WorkerContext
from corsa.training.worker_group import WorkerGroup

MODEL = ModelConfig(name="random:tiny-llama")


Chains = Callable[[Planner[Experiment], Facts, Step], list[Step]]
"""The rounds that an experiment teaches, of the facts, on the schedule."""


def settings(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
    """Two rounds of two settings and one of a setting that diverges."""
    steps: list[Step] = []
    for name, change in (("a", {"rho": 0.05}), ("b", {"rho": 0.0, "lambda_": 0.5}), ("bad", {"rho": 1e30})):
        changed = planner.changed(corsa=planner.experiment.corsa.model_copy(update=change))
        steps += changed.chain("corsa", len(name), taught, schedule, rounds=(1, 2), name=name)
    return steps


def methods(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
    """One round of methods that differ in settings that a pack has per row, and in PCGrad, which it has not."""
    names = ("lora", "corsa", "corsa-no-pcgrad")
    return [planner.round(method, 0, taught, schedule) for method in names]


def taken(storage: Path, pack: int, chains: Chains) -> tuple[Store, list[Step], dict[str, str]]:
    """Runs the rounds on one worker from an empty store. Returns the results and the failures."""
    experiment = Experiment(
        model=MODEL,
        limit=4,
        lora=LoraConfig(rank=4, alpha=8),
        training=TrainingConfig(epochs=3, batch=3),
        placement=Placement(threads=1, pack=pack),
    )
    planner = Planner.of(experiment, "")
    store, taught = Store(storage), planner.facts(2)
    schedule = planner.schedule(taught, RoundsConfig(rounds=2))
    run([schedule], store, lambda: None, lambda steps: 1, Console(quiet=True))
    edits = from_table(pq.read_table(store.artifact(taught.edits.fingerprint).local("edits.parquet")))
    encoder = Encoder(load_tokenizer(MODEL), "qa")
    found = token_rows(encoder, [e.model_dump() for e in edits])
    rows = [row | {"reference_new": -20.0, "reference_old": -20.0} for row in found]
    steps = chains(planner, taught, schedule)
    table = pd.DataFrame(rows)
    output = store.workspace(taught.reference)
    pq.write_table(pa.Table.from_pandas(table, schema=REFERENCE, preserve_index=False), output / "reference.parquet")
    store.commit(taught.reference, output, {}, 0.0)
    tokens = {taught.reference.fingerprint: TokenTable([pa.Table.from_pylist(rows, schema=REFERENCE)])}
    context = WorkerContext(WorkerGroup(0, 1, torch.device("cpu")), experiment.placement, tokens)
    return store, steps, take_rounds([Task(step, store) for step in steps], context, Silent())


@pytest.mark.long
def test_a_packed_round_is_the_same_result_as_one_alone(tmp_path: Path) -> None:
    alone, steps, failed_alone = taken(tmp_path / "alone", 1, settings)
    packed, _, failed = taken(tmp_path / "packed", 3, settings)
    good, bad = steps[:4], steps[4:]
    assert failed.keys() == failed_alone.keys() == {step.fingerprint for step in bad}
    assert "non-finite gradient" in failed[bad[0].fingerprint]
    for step in good:
        theirs, mine = (store.artifact(step.fingerprint) for store in (alone, packed))
        together = 3 if step.name.endswith("round1") else 2  # the third has already failed
        assert (theirs.metrics["packed"], mine.metrics["packed"]) == (1, together)
        one, other = adapter(tmp_path / "alone", step.name), adapter(tmp_path / "packed", step.name)
        assert all(float((one[name] - other[name]).abs().max()) <= 1e-4 for name in one)
        asked = [pd.read_parquet(found.local("predictions.parquet")) for found in (theirs, mine)]
        assert asked[0].prompt.tolist() == asked[1].prompt.tolist()
        assert asked[0].output.tolist() == asked[1].output.tolist()


@pytest.mark.long
def test_a_method_is_packed_with_those_alone_that_leave_it_what_it_is(tmp_path: Path) -> None:
    alone, steps, failed_alone = taken(tmp_path / "alone", 1, methods)
    packed, _, failed = taken(tmp_path / "packed", 3, methods)
    assert failed == failed_alone == {}
    together = [packed.artifact(step.fingerprint).metrics["packed"] for step in steps]
    assert together == [2, 2, 1]  # lora and corsa; the other, without PCGrad, runs alone
    for step in steps:
        one, other = adapter(tmp_path / "alone", step.name), adapter(tmp_path / "packed", step.name)
        assert all(float((one[name] - other[name]).abs().max()) <= 1e-4 for name in one)
        asked = [
            pd.read_parquet(store.artifact(step.fingerprint).local("predictions.parquet")) for store in (alone, packed)
        ]
        assert asked[0].output.tolist() == asked[1].output.tolist()
