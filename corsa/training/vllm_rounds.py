"""Rounds whose probes vLLM answers (`--placement.engine vllm`).

A worker group trains the rounds that can start, scores both answers, saves the adapters and ends. Then vLLM has the
GPUs, answers for all of these adapters at once, and the rounds are committed. The rounds after them follow in the same
way. What a group has finished is kept if the answers fail.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config import ModelConfig
from corsa.config.steps import PredictionConfig, RoutingConfig
from corsa.evaluation.deferred_predictor import Reader, Recorder, Scores
from corsa.evaluation.predict import Taught
from corsa.flow.store import Artifact
from corsa.flow.task import Progress, Task
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer
from corsa.training.prediction_tasks import ENDS, predictions_file, predictions_table, written
from corsa.training.task_inputs import AskedFacts, ProbedEdits, asked_facts
from corsa.training.unanswered import Unanswered
from corsa.training.vllm_engine import Asked, continuations

PREDICTIONS_FILE = "predictions.parquet"

InGroup = Callable[[Sequence[Task], Progress], dict[str, str]]


def run_with_vllm(tasks: Sequence[Task], progress: Progress, in_one_group: InGroup) -> dict[str, str]:
    """Train and ask the steps, in their order. Returns {fingerprint: cause} of failures.

    Args:
        tasks: topologically ordered steps of one placement.
        progress: where it is reported.
        in_one_group: runs steps on one worker group, as `corsa.training.rounds.run`.

    Raises:
        CorsaError: the group or vLLM failed; what was finished is kept.
    """
    failed: dict[str, str] = {}
    waiting = [task for task in tasks if task.finished is None]
    while waiting:
        missing = {task.fingerprint for task in waiting}
        ready = [task for task in waiting if not any(n.fingerprint in missing for n in task.step.inputs.values())]
        waiting = [task for task in waiting if task not in ready]
        own: list[Task] = []
        for task in ready:
            if before := [needed.name for needed in task.step.inputs.values() if needed.fingerprint in failed]:
                failed[task.fingerprint] = f"not run: {before[0]} failed"
            else:
                own.append(Unanswered(task.step, task.store, task.progress) if _asks(task) else task)
        if unfinished := [task for task in own if task.finished is None]:
            failed |= in_one_group(unfinished, progress)
        _answer([t for t in own if isinstance(t, Unanswered) and t.fingerprint not in failed], progress)
    return failed


def _asks(task: Task) -> bool:
    """Whether the step asks the probes of facts of one model. A router needs the model at hand."""
    return isinstance(task.config, PredictionConfig) and not isinstance(task.config, RoutingConfig)


def _answer(tasks: Sequence[Unanswered], progress: Progress) -> None:
    """Answer the probes of these steps, with one start of vLLM for each base, and commit them."""
    together: dict[tuple[ModelConfig, bool], list[Unanswered]] = {}
    for task in tasks:
        # Not the unedited base beside adapters: vLLM 0.32 for CPUs gave it an adapter of the same batch.
        together.setdefault((task.config.model, _adapter(task) is None), []).append(task)
    for (model, _), own in together.items():
        _answer_together(own, model, progress)


def _answer_together(tasks: Sequence[Unanswered], model: ModelConfig, progress: Progress) -> None:
    began, line = time.monotonic(), {"chain": f"{tasks[0].name} by vLLM", "phase": "evaluating"}
    encoder = Encoder(load_tokenizer(model), model.template)
    facts = [_facts(task) for task in tasks]
    asked = [Asked(_adapter(task), _recorded(task, known, encoder)) for task, known in zip(tasks, facts, strict=True)]
    total = sum(len(one.requests) for one in asked)

    def told(done: int) -> None:
        progress.post({**line, "answered": done, "probes": total})

    told(0)
    ends = tasks[0].left.metrics[ENDS]
    found = continuations(asked, model, ends, tasks[0].placement, told)
    seconds = (time.monotonic() - began) / len(tasks)
    for task, known, answers in zip(tasks, facts, found, strict=True):
        _commit(task, known, encoder, answers, seconds)
    progress.post({**line, "phase": "done"})


def _facts(task: Task) -> AskedFacts:
    """The facts that the step asks."""
    known = set(pq.read_table(task.inputs["reference"].local("reference.parquet"), columns=["id"])["id"].to_pylist())
    edits = pq.read_table(task.inputs["edits"].local("edits.parquet"))
    with_schedule = "schedule" in task.step.inputs
    schedule = pq.read_table(task.inputs["schedule"].local("schedule.parquet")) if with_schedule else None
    return asked_facts(ProbedEdits.of(edits, known, task.config), schedule, task.config)


def _pieces(facts: AskedFacts) -> Iterator[list[Taught]]:
    return (facts.share(0, 1, piece) for piece in range(facts.pieces))


def _recorded(task: Task, facts: AskedFacts, encoder: Encoder) -> pa.Table:
    """What is to be generated for the step."""
    recorder = Recorder(encoder, task.config.evaluation, task.config.seed)
    for piece in _pieces(facts):
        recorder.ask(piece)
    return recorder.requests


def _adapter(task: Unanswered) -> Artifact | None:
    """The result that has the adapter of the model that is asked: of the step itself, or of its input."""
    if "adapter" in task.step.inputs:
        return task.inputs["adapter"]
    left = task.left
    return left if any(Path(file).parts[0] == "adapter" for file in left.record.files) else None


def _commit(task: Unanswered, facts: AskedFacts, encoder: Encoder, answers: pa.ChunkedArray, seconds: float) -> None:
    """Commit the step: what its group left, with the answers."""
    done, left = Task(task.step, task.store, task.progress), task.left
    for file in left.record.files:
        if file != PREDICTIONS_FILE:
            (done.output / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(left.local(file), done.output / file)
    reader = Reader(
        encoder,
        task.config.evaluation,
        task.config.seed,
        answers,
        _scores(pq.read_table(left.local(PREDICTIONS_FILE))),
        left.metrics[ENDS],
    )
    with predictions_file(done) as write:
        for piece in _pieces(facts):
            write([predictions_table(reader.ask(piece), done)])
    metrics = {name: value for name, value in left.metrics.items() if name != ENDS}
    metrics |= {"probes": written(done), "evaluation_s": round(metrics["evaluation_s"] + seconds, 3), "engine": "vllm"}
    done.commit(metrics, left.record.seconds + seconds)


def _scores(rows: pa.Table) -> Scores:
    """The log-probabilities that the worker group measured."""
    known = rows.filter(rows["logp_new"].is_valid()).select(["edit", "probe", "wording", "logp_new", "logp_old"])
    columns = [column.to_pylist() for column in known.columns]
    return {(e, p, w): (new, old) for e, p, w, new, old in zip(*columns, strict=True)}
