"""Runs that are left alone: the time they take, what is done so far, several models and protocols in one command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import paper as paper_file
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flow_steps import CLUSTER, step
from rich.console import Console
from single_update import SingleUpdate, single_update
from synthetic_run import predictions

from corsa.config import EvaluationConfig, ModelConfig
from corsa.config.steps import ServedConfig
from corsa.editing.kinds import SERVED
from corsa.errors import CorsaError
from corsa.experiments import runner
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Planner
from corsa.experiments.remaining import expected, left
from corsa.experiments.runner import launch
from corsa.experiments.so_far import so_far
from corsa.flow import Step, Store, run
from corsa.flow.step import topological
from corsa.flow.store import Record

TABLE = predictions(chains=6, rounds=1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def planned(store: Store, limit: int = 6, **more: object) -> tuple[Experiment, dict[str, Step]]:
    """A single update of LoRA and CoRSA with two seeds, and its steps by name."""
    experiment = SingleUpdate(
        model=ModelConfig(name="random:tiny-llama"),
        methods=("lora", "corsa"),
        seeds=(0, 1),
        limit=limit,
        storage=store.url,
        **more,  # type: ignore[arg-type]
    )
    steps = topological([single_update(Planner.of(experiment, "the command"))])
    return experiment, {step.name.removeprefix("world_facts/"): step for step in steps}


def finish(store: Store, step: Step, seconds: float, **tables: pd.DataFrame) -> Record:
    """Commits a step with some files and a count of edits."""
    output = store.workspace(step)
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pandas(table, preserve_index=False), output / f"{name}.parquet")
    return store.commit(step, output, {"edits": 6} if step.kind.name == "edits" else {}, seconds).record


def answers(method: str) -> pd.DataFrame:
    return TABLE[TABLE.method == method]


def begun(store: Store, steps: dict[str, Step], *done: str) -> list[Record]:
    """The records of the first steps and of the answers of `done`: a second for each fact and letter of the method."""
    edits = pd.DataFrame({"id": TABLE.edit.unique(), "case": ""})
    schedule = TABLE[["edit", "learnt", "part"]].drop_duplicates("edit")
    records = [
        finish(store, steps["edits/world_facts"], 1, edits=edits),
        finish(store, steps["reference/world_facts"], 12),
        finish(store, steps["schedule/world_facts"], 1, schedule=schedule),
    ]
    for name in done:
        method = name.partition("/")[0]
        records.append(finish(store, steps[name], 6.0 * len(method), predictions=answers(method)))
    return records


# How long it takes


def test_a_step_is_expected_to_take_as_long_as_one_like_it_did(store: Store) -> None:
    _, steps = planned(store)
    records = begun(store, steps, "base", "lora/seed0/round1")
    found = expected(steps.values(), records)
    assert found[steps["lora/seed1/round1"].fingerprint] == 24.0
    assert steps["corsa/seed0/round1"].fingerprint not in found
    pending = [step for name, step in steps.items() if "seed1" in name or "corsa" in name]
    assert left(pending, records) == "about 0:00:24 left and 2 steps of which nothing is known"
    assert left([steps["corsa/seed0/round1"]], records) == ""


def test_the_time_follows_the_facts_and_a_wider_likeness(store: Store) -> None:
    _, steps = planned(store)
    records = begun(store, steps, "base", "lora/seed0/round1")
    _, more = planned(store, limit=60, training={"learning_rate": 1e-3})  # type: ignore[arg-type]
    found = expected(more.values(), records)
    assert found[more["lora/seed0/round1"].fingerprint] == 240.0
    _, longer = planned(store, limit=60, training={"epochs": 40})  # type: ignore[arg-type]
    assert longer["lora/seed0/round1"].fingerprint not in expected(longer.values(), records)


def test_the_answers_of_a_server_are_no_likeness(store: Store) -> None:
    """Their configuration names the model by a text, and the time is the server's."""
    _, steps = planned(store)
    records = begun(store, steps, "base")
    served = ServedConfig(
        address="http://localhost:8000/v1",
        model="m",
        template="qa",
        evaluation=EvaluationConfig(),
        round=1,
        asked="now",
    )
    asked = Step("served", SERVED, served, {"edits": steps["edits/world_facts"]})
    assert left([steps["lora/seed0/round1"]], [*records, finish(store, asked, 1)]) == ""


def test_a_done_step_says_how_far_the_run_is(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = step("first", CLUSTER, log)
    second = step("second", CLUSTER, log, first)
    said = io.StringIO()

    def time_left(todo: Sequence[Step], finished: Sequence[Record]) -> str:
        return f"{len(todo)} to do after {[record.name for record in finished]}" if todo else ""

    run([second], store, lambda: None, lambda _: 1, Console(file=said, width=200), left=time_left)
    lines = [line for line in said.getvalue().splitlines() if line.startswith("done")]
    assert lines[0].endswith("s  (1 of 2 steps, 1 to do after ['first'])")
    assert lines[1].endswith("s  (2 of 2 steps)")


# What is done so far


def test_what_is_done_is_reported_as_partial(store: Store) -> None:
    experiment, steps = planned(store, so_far=True)
    begun(store, steps, "base", "lora/seed0/round1")
    said = io.StringIO()
    assert launch(experiment, steps["report/single update"], Console(file=said, width=200)) == 0, said.getvalue()
    place = Path(next(line for line in said.getvalue().splitlines() if line.endswith("metrics.json")))
    metrics = json.loads(place.read_text())
    assert [row["method"] for row in metrics["rows"]] == ["base", "lora"]
    about = json.loads((place.parent / "run.json").read_text())
    assert about["title"].endswith("(partial: 2 of 5 sets of answers)")
    assert "LoRA" in said.getvalue()


def test_a_whole_run_is_its_own_report_so_far(store: Store) -> None:
    _, steps = planned(store)
    report = steps["report/single update"]
    with pytest.raises(CorsaError, match="has nothing to report yet"):
        so_far(report, store)
    rounds = [f"{method}/seed{seed}/round1" for method in ("lora", "corsa") for seed in (0, 1)]
    begun(store, steps, "base")
    with pytest.raises(CorsaError, match="has nothing to report yet"):
        so_far(report, store)
    for name in rounds[:3]:
        finish(store, steps[name], 1, predictions=answers("lora"))
    assert so_far(report, store).fingerprint != report.fingerprint
    finish(store, steps[rounds[3]], 1, predictions=answers("lora"))
    assert so_far(report, store) is report


# Several models and protocols


def test_each_model_is_run_under_each_protocol() -> None:
    models = ("random:tiny-llama", "random:tiny-qwen3")
    experiment = paper_file.Paper(models=models, protocols=("full", "paper"), seeds=(0, 1), scenarios=("single",))
    found = paper_file.each(experiment)
    assert [(one.model.name, one.evaluation.protocol) for one in found] == [
        (name, protocol) for name in models for protocol in ("full", "paper")
    ]
    assert {(one.models, one.protocols, one.seeds) for one in found} == {((), (), (0, 1))}
    with pytest.raises(CorsaError, match="protocol authors asks in the chat template"):
        paper_file.each(paper_file.Paper(protocols=("full", "authors")))


def paper_of(experiment: paper_file.Paper) -> Step:
    return paper_file.paper(Planner.of(experiment, "c"))


def test_a_run_of_one_model_is_what_it_was() -> None:
    """Its identity has no new fields, and `--models` gives each model the same run as `--model`."""
    plain = paper_file.Paper(scenarios=("single",))
    assert not {"models", "protocols"} & plain.canonical().keys()
    (one,) = paper_file.each(plain)
    assert paper_of(one).fingerprint == paper_of(plain).fingerprint
    named = paper_file.Paper(models=("random:tiny-llama",), scenarios=("single",))
    alone = paper_file.Paper(model=ModelConfig(name="random:tiny-llama"), scenarios=("single",))
    assert paper_of(paper_file.each(named)[0]).fingerprint == paper_of(alone).fingerprint


def test_a_model_that_fails_stops_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def fake(experiment: Experiment, planned: Step, console: Console) -> int:
        ran.append((experiment.model.name, planned.config.command))  # type: ignore[attr-defined]
        if len(ran) == 1:
            raise CorsaError("too large")
        return 0

    monkeypatch.setattr(runner, "launch", fake)
    options = ["--models", "random:tiny-qwen3,random:tiny-llama", "--scenarios", "single", "--storage", store.url]
    monkeypatch.setattr(sys, "argv", ["pipelines/paper.py", *options])
    assert paper_file.main() == 1
    assert [name for name, _ in ran] == ["random:tiny-qwen3", "random:tiny-llama"]
    assert ran[1][1] == "python pipelines/paper.py --model random:tiny-llama --scenarios single"
    said = capsys.readouterr().out
    assert "run 1 of 2: random:tiny-qwen3, protocol full\nerror: too large\nrun 2 of 2: random:tiny-llama" in said
