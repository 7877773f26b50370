"""Steps that ask a model and train nothing, and the questions that a round asks after its training."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config import EvaluationConfig
from corsa.config.code_steps import SamplesConfig
from corsa.config.steps import (
    AnchorsConfig,
    PerplexityConfig,
    PredictionConfig,
    RoutingConfig,
    SanityQuestionsConfig,
    SpecificityConfig,
)
from corsa.data.benchmarks.code_prompt import prompt_of
from corsa.data.edit import from_table
from corsa.evaluation.anchor_questions import anchor_questions
from corsa.evaluation.capability import MEASURED, PERPLEXITY
from corsa.evaluation.deferred_predictor import Scorer
from corsa.evaluation.generation import end_tokens, sample
from corsa.evaluation.mmlu import from_questions_table
from corsa.evaluation.multiple_choice import ANSWERS, MultipleChoice
from corsa.evaluation.perplexity import text_logprobs
from corsa.evaluation.predict import PREDICTIONS, Predictor
from corsa.evaluation.prepared_predictions import ROW_GROUP
from corsa.evaluation.programs import PROGRAMS
from corsa.evaluation.retrieval import Memory, Retrieval
from corsa.evaluation.sanity_questions import judged, sanity_questions
from corsa.flow.task import Task
from corsa.methods.memit.corpora import NEUTRAL, corpus_texts
from corsa.training.routing import route
from corsa.training.task_inputs import StepFacts, change_of, edited, memory_of, open_step, shared_table
from corsa.training.unanswered import Unanswered
from corsa.training.worker_context import Loaded, Post, WorkerContext


def _ask_only(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers of the unedited model, or of a model edited by another step."""
    facts, loaded = open_step(task, context)
    with edited(task, loaded, context.group):
        return ask(task, facts, loaded, context, post, memory_of(task, "adapter", context.group))


def _answer_questions(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers to MMLU. The workers share the subjects."""
    group = context.group
    questions = from_questions_table(shared_table(task, "questions", group))
    loaded = context.open(task.config, ())
    post({"phase": "evaluating"})
    predictor = MultipleChoice(loaded.model, loaded.encoder.tokenizer, group.device, context.placement.probe_batch)
    with edited(task, loaded, group):
        with group.in_step(loaded.model):
            own = list(predictor.answers(questions.share(group.rank, group.size)))
        rows = group.collect(own)
    if not group.leads:
        return {}
    rows.sort(key=lambda row: (row["subject"], row["index"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWERS), task.output / "answers.parquet")
    return {"questions": len(rows), "accuracy": sum(row["correct"] for row in rows) / len(rows)}


def _ask_sanity_questions(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers to the everyday questions. There are few, so every worker answers all of them."""
    config: SanityQuestionsConfig = task.config
    loaded = context.open(config, ())
    post({"phase": "evaluating"})
    evaluation = EvaluationConfig(new_tokens=config.new_tokens)
    predictor = Predictor(
        loaded.model,
        loaded.encoder,
        evaluation,
        context.group.device,
        context.placement.probe_batch,
        loaded.packed,
        told=lambda done, of: post({"answered": done, "probes": of}),
    )
    with edited(task, loaded, context.group), context.group.in_step(loaded.model):
        rows = judged(predictor.answers([entry.question for entry in sanity_questions()]))
    if not context.group.leads:
        return {}
    pq.write_table(pa.Table.from_pylist(rows), task.output / "answers.parquet")
    return {"questions": len(rows), "right": sum(row["right"] for row in rows)}


def _ask_anchors(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The base model's answers to the anchor questions."""
    config: AnchorsConfig = task.config
    loaded, group = context.open(config, ()), context.group
    post({"phase": "evaluating"})
    evaluation = EvaluationConfig(new_tokens=config.new_tokens)
    batch = context.placement.probe_batch
    predictor = Predictor(loaded.model, loaded.encoder, evaluation, group.device, batch, loaded.packed)
    predictor.told = lambda done, of: post({"answered": done, "probes": of})
    questions = anchor_questions()
    with loaded.lora.off(), group.in_step(loaded.model):
        outputs = predictor.answers(questions)
    if not group.leads:
        return {}
    pq.write_table(pa.table({"question": list(questions), "output": outputs}), task.output / "answers.parquet")
    return {"questions": len(questions)}


def _measure_perplexity(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The log-probabilities of the neutral text. The workers share the passages."""
    config: PerplexityConfig = task.config
    loaded, group = context.open(config, ()), context.group
    post({"phase": "evaluating"})
    texts = list(islice(corpus_texts(NEUTRAL), config.passages))
    with edited(task, loaded, group):
        own = range(group.rank, len(texts), group.size)
        with group.in_step(loaded.model):
            found = text_logprobs(loaded.model, loaded.encoder, [texts[i] for i in own], group.device)
        rows = group.collect([(i, *measured) for i, measured in zip(own, found, strict=True)])
    if not group.leads:
        return {}
    table = [
        {"measure": PERPLEXITY, "item": str(i), "numerator": nats, "denominator": tokens, "higher_is_better": False}
        for i, nats, tokens in sorted(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=MEASURED), task.output / "measured.parquet")
    return {"passages": len(table), "tokens": sum(tokens for _, _, tokens in rows)}


def _route(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """The answers of a model that routes each query to one of several adapters."""
    group, parts = (
        context.group,
        [name.removeprefix("adapter") for name in task.step.inputs if "adapter" in name],
    )
    facts, loaded = open_step(task, context)
    splits = [from_table(shared_table(task, f"edits{part}", group, "edits")) for part in parts]
    changes = [change_of(task, f"adapter{part}", group) for part in parts]
    post({"phase": "evaluating"})
    predictor = predictor_of(task.config, loaded, context)
    with loaded.lora.off(), group.in_step(loaded.model):
        rows, chosen = route(task.config.router, loaded, predictor, splits, changes, facts.asked.own(group))
    tables, chosen = group.collect([predictions_table(rows, task)]), group.collect(chosen)
    if not group.leads:
        return {}
    pq.write_table(pa.Table.from_pylist(chosen), task.output / "routes.parquet")
    right = sum(row["chosen"] == row["part"] for row in chosen) / len(chosen)
    with predictions_file(task) as write:
        write(tables)
    return {"routing_accuracy": right, "probes": written(task)}


def _write_programs(task: Task, context: WorkerContext, post: Post) -> dict[str, Any]:
    """Sample programs for the asked problems. The workers share the samples."""
    config: SamplesConfig = task.config
    group, how = context.group, config.sampling
    table = shared_table(task, "problems", group)
    problems = [row for row in table.to_pylist() if row["part"] == "asked"]
    loaded = context.open(config, ())
    post({"phase": "evaluating"})
    every = [(i, n) for i in range(len(problems)) for n in range(how.samples)]
    share = -(-len(every) // group.size)  # contiguous: samples of one problem share their prompt
    own = every[group.rank * share :][:share]
    told = {"described": config.described, "implementation": config.implementation}
    prompts = [prompt_of(problem, **told) for problem in problems]
    with edited(task, loaded, group), group.in_step(loaded.model):
        outputs = sample(
            loaded.model,
            [loaded.encoder.prompt(prompts[i]) for i, _ in own],
            seeds=[(config.seed, zlib.crc32(problems[i]["id"].encode()), n) for i, n in own],
            temperature=how.temperature,
            top_p=how.top_p,
            stops=end_tokens(loaded.model, loaded.encoder.tokenizer),
            new_tokens=how.new_tokens,
            batch=max(1, context.placement.probe_batch // 8),  # programs are longer than answers
            device=group.device,
            told=lambda done: post({"answered": done, "probes": len(own)}),
        )
    texts = (loaded.encoder.read(ids).strip("\n") for ids in outputs)
    rows = group.collect(
        [
            {"problem": problems[i]["id"], "sample": n, "output": text, "tokens": len(ids)}
            for (i, n), text, ids in zip(own, texts, outputs, strict=True)
        ]
    )
    if not group.leads:
        return {}
    rows.sort(key=lambda row: (row["problem"], row["sample"]))
    pq.write_table(pa.Table.from_pylist(rows, schema=PROGRAMS), task.output / "answers.parquet")
    return {"programs": len(rows), "cut_off": sum(row["tokens"] == how.new_tokens for row in rows)}


PREDICTIONS_OF: dict[type, Callable[[Task, WorkerContext, Post], dict[str, Any]]] = {
    PredictionConfig: _ask_only,
    SpecificityConfig: _answer_questions,
    SanityQuestionsConfig: _ask_sanity_questions,
    AnchorsConfig: _ask_anchors,
    PerplexityConfig: _measure_perplexity,
    RoutingConfig: _route,
    SamplesConfig: _write_programs,
}


ENDS = "end_tokens"
"""Metric of a step that is answered later: the tokens that end an answer."""


def predictor_of(
    config: PredictionConfig, loaded: Loaded, context: WorkerContext, kind: type[Predictor] = Predictor
) -> Predictor:
    batch = context.placement.probe_batch
    device = context.group.device
    return kind(loaded.model, loaded.encoder, config.evaluation, device, batch, loaded.packed, config.seed)


def ask(
    task: Task,
    facts: StepFacts,
    loaded: Loaded,
    context: WorkerContext,
    post: Post,
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Ask the model in its current state, and write the answers. Facts of the memory stand before each question."""
    group = context.group
    post({"phase": "evaluating"})
    began = time.monotonic()
    later = isinstance(task, Unanswered)
    predictor = predictor_of(task.config, loaded, context, Scorer if later else Predictor)
    if memory:
        predictor.context = Retrieval(memory, loaded.model, loaded.encoder, predictor.batch)
    asked, answered = facts.asked, 0
    with predictions_file(task) if group.leads else nullcontext() as write:
        for piece in range(asked.pieces):
            pieces_left = asked.pieces - piece

            def told(done: int, of: int, before: int = answered, pieces_left: int = pieces_left) -> None:
                post({"answered": before + done, "probes": before + of * pieces_left})

            with group.in_step(loaded.model):
                rows = replace(predictor, told=told).ask(asked.own(group, piece))
            tables = group.collect([predictions_table(rows, task)])
            answered += len(rows)
            if write:
                write(tables)
    post({"probes": None})
    if not group.leads:
        return {}
    ends = {ENDS: predictor.stops(lines=True).nonzero().flatten().tolist()} if later else {}
    return {"evaluation_s": round(time.monotonic() - began, 3), "probes": written(task)} | ends


def predictions_table(rows: Sequence[dict[str, Any]], task: Task) -> pa.Table:
    """A worker's rows of the predictions table."""
    return rows_table(rows, seed=task.config.seed, trained=task.config.round)


def rows_table(rows: Sequence[dict[str, Any]], **labels: int) -> pa.Table:
    """Rows with the labels that they share, as a table: it takes a tenth of their memory."""
    return pa.Table.from_pylist([{**labels, **row} for row in rows], schema=PREDICTIONS)


@contextmanager
def predictions_file(task: Task) -> Iterator[Callable[[Sequence[pa.Table]], None]]:
    """A block that writes predictions.parquet. Each call of its function writes the tables of all workers."""
    with pq.ParquetWriter(task.output / "predictions.parquet", PREDICTIONS) as writer:
        yield lambda tables: write_sorted(writer, tables)


def write_sorted(writer: pq.ParquetWriter, tables: Sequence[pa.Table]) -> None:
    """Write the rows of some tables, sorted, as row groups."""
    writer.write_table(pa.concat_tables(tables).sort_by([(name, "ascending") for name in _ORDER]), ROW_GROUP)


def written(task: Task) -> int:
    """The rows of predictions.parquet."""
    return pq.read_metadata(task.output / "predictions.parquet").num_rows


_ORDER = ("edit", "probe", "wording", "draw")
