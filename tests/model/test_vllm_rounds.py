"""Rounds that another engine answers after their training: the same table as if the group had answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from one_worker import MODEL, taken
from peft import PeftModel

from corsa.config import EvaluationConfig, ModelConfig, Placement, TrainingConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Step, Store
from corsa.flow.garbage_collection import waste
from corsa.flow.lease import Leases
from corsa.flow.task import Silent, Task
from corsa.models.loading import load_model, load_tokenizer
from corsa.training import vllm_rounds
from corsa.training.resources import refuse_what_cannot_fit, trials_at_once
from corsa.training.rounds import take_rounds
from corsa.training.vllm_engine import Asked
from corsa.training.vllm_rounds import run_with_vllm
from corsa.training.worker_context import WorkerContext

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::FutureWarning")]  # PEFT: old names of transformers


def transformers_and_peft(asked: Sequence[Asked], model: ModelConfig, ends: Sequence[int], *rest: Any) -> Any:
    """The continuations by the libraries alone, from the saved adapters; one prompt at a time."""
    found = []
    end = load_tokenizer(model).eos_token_id
    for one in asked:
        edited: Any = load_model(model)
        if one.adapter:
            edited = PeftModel.from_pretrained(edited, str(one.adapter.local("adapter"))).eval()
        own = []
        for request in one.requests.to_pylist():
            assert request["seed"] is None
            prompt = torch.tensor([request["tokens"]])
            how: dict[str, Any] = {"do_sample": False, "max_new_tokens": request["new_tokens"], "pad_token_id": end}
            with torch.no_grad():
                ids = edited.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=list(ends), **how)
            own.append(ids[0, prompt.shape[1] :].tolist())
        found.append(pa.chunked_array([own], pa.list_(pa.int32())))
    return found


def steps_of(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
    """Two rounds of two seeds, the base, an edited model that is asked by another step, and everyday questions."""
    chains = [planner.chain("corsa", seed, taught, schedule, rounds=(1, 2)) for seed in (0, 1)]
    last = chains[0][-1]
    others = [planner.answers("again", taught, schedule, last, round_=2), planner.everyday_answers(last)]
    return [planner.base(taught), *chains[0], *chains[1], *others]


class Groups:
    """Takes rounds as `corsa.training.rounds.run` does with vLLM; counts the steps of each group."""

    def __init__(self) -> None:
        self.taken: list[list[str]] = []

    def __call__(self, tasks: list[Task], context: WorkerContext) -> dict[str, str]:
        def in_one_group(some: Sequence[Task], progress: Any) -> dict[str, str]:
            self.taken.append([task.name for task in some])
            return take_rounds(some, context, progress)

        return run_with_vllm(tasks, Silent(), in_one_group)


def tables(store: Store, steps: Sequence[Step], name: str = "predictions.parquet") -> dict[str, pa.Table]:
    found = {step.name: store.artifact(step.fingerprint) for step in steps}
    return {n: pq.read_table(artifact.local(name)) for n, artifact in found.items() if name in artifact.record.files}


@pytest.fixture
def settings() -> dict[str, Any]:
    """At this rate the answers of a small model differ from question to question."""
    training = TrainingConfig(epochs=20, batch=3, learning_rate=0.01)
    evaluation = EvaluationConfig(new_tokens=6)
    return {"training": training, "evaluation": evaluation, "placement": Placement(threads=1, pack=2)}


def test_the_tables_are_those_of_a_group_that_answers_itself(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_rounds, "continuations", transformers_and_peft)
    groups = Groups()
    here, steps, failed = taken(tmp_path / "here", steps_of, **settings)
    there, same, failed_there = taken(tmp_path / "there", steps_of, take=groups, **settings)
    assert (failed, failed_there) == ({}, {})
    assert [step.fingerprint for step in steps] == [step.fingerprint for step in same]
    expected, found = tables(here, steps), tables(there, same)
    assert len(expected) == 6
    for name, table in expected.items():
        assert found[name].equals(table), name
    assert {len(set(found[step.name]["output"].to_pylist())) > 3 for step in same[1:6]} == {True}
    assert tables(there, same, "answers.parquet").keys() == tables(here, steps, "answers.parquet").keys() != set()
    rounds = there.artifact(same[1].fingerprint)
    assert (rounds.metrics["engine"], rounds.metrics["packed"]) == ("vllm", 2)
    assert {"adapter/adapter_model.safetensors", "curves.parquet"} <= rounds.record.files.keys()
    assert [len(group) for group in groups.taken] == [3, 2, 2]  # what can start, then the rounds after it
    assert {record.kind for record in there.records()} == {record.kind for record in here.records()}


def test_what_was_trained_is_kept_when_the_answers_fail(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, store = Groups(), []

    def fail(*args: Any) -> None:
        raise CorsaError("vLLM did not answer: no memory")

    def again(tasks: list[Task], context: WorkerContext) -> dict[str, str]:
        store.append(tasks[0].store)
        monkeypatch.setattr(vllm_rounds, "continuations", fail)
        with pytest.raises(CorsaError, match="no memory"):
            groups(tasks, context)
        leases = Leases(store[0])
        leases.protect([tasks[0].step], [tasks[0].step])
        assert [one.path for one in waste(store[0], [], 0)[0] if one.path.startswith("partial/")] == []
        leases.close()
        monkeypatch.setattr(vllm_rounds, "continuations", transformers_and_peft)
        return groups(tasks, context)

    def one_round(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
        return [planner.round("lora", 0, taught, schedule)]

    _, steps, failed = taken(tmp_path, one_round, take=again, **settings)
    assert failed == {}
    assert groups.taken == [[steps[0].name]]
    assert len(tables(store[0], steps)) == 1
    assert store[0].files.names(f"partial/{steps[0].fingerprint[:16]}") == []


def refusal(settings: dict[str, Any], method: str = "lora", **model: Any) -> Callable[[], object]:
    experiment = Experiment(model=ModelConfig(**model), placement=Placement(engine="vllm", **settings))

    def plan() -> object:
        planner = Planner.of(experiment, "")
        taught = planner.facts()
        return planner.round(method, 0, taught, planner.schedule(taught))

    return plan


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (refusal({}, name=MODEL.name), "random weights have none"),
        (refusal({"gpu": True}, dtype="nf4"), "base in 4 bits: leave it or --dtype nf4 out"),
        (refusal({}, "memit"), "MEMIT leaves a dense change of the weights, no adapter: leave memit or the engine out"),
        (lambda: refuse_what_cannot_fit(Placement(engine="vllm")), "vLLM is not installed here. docs/performance.md"),
        (lambda: trials_at_once(Placement(engine="vllm")), "the trials of a sweep are asked inside of their groups"),
    ],
)
def test_what_vllm_cannot_do_is_said_before_the_run(make: Callable[[], object], told: str) -> None:
    with pytest.raises(CorsaError, match=told):
        make()
