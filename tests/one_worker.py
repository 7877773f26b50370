"""Rounds on one worker of this process, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
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


def taken(
    storage: Path,
    chains: Chains,
    *,
    pack: int = 1,
    prepare: Callable[[Store, Sequence[Step]], None] = lambda store, steps: None,
    take: Callable[[list[Task], WorkerContext], dict[str, str]] = lambda tasks, context: take_rounds(
        tasks, context, Silent()
    ),
    **settings: Any,
) -> tuple[Store, list[Step], dict[str, str]]:
    """Runs rounds on four chains of the shipped facts, from an empty store. Returns the results and the failures.

    `prepare` commits the other inputs of the rounds. `take` takes them. `settings` change the experiment.
    """
    experiment = Experiment(
        **{
            "model": MODEL,
            "limit": 4,
            "lora": LoraConfig(rank=4, alpha=8),
            "training": TrainingConfig(epochs=3, batch=3),
            "placement": Placement(threads=1, pack=pack),
            **settings,
        }
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
    prepare(store, steps)
    tokens = {taught.reference.fingerprint: TokenTable([pa.Table.from_pylist(rows, schema=REFERENCE)])}
    context = WorkerContext(WorkerGroup(0, 1, torch.device("cpu")), experiment.placement, tokens)
    return store, steps, take([Task(step, store) for step in steps], context)
