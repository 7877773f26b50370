"""The base model's programs before any update (y_old of the code domain): greedy generation on Ray Data."""

from __future__ import annotations

import os
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch

from corsa.config import ModelConfig, Placement
from corsa.config.code_steps import OldAnswersConfig
from corsa.evaluation.generation import end_tokens, generate
from corsa.evaluation.programs import PROGRAMS
from corsa.flow.ray_data import as_dataset, map_with_model, retried
from corsa.flow.task import Task
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer

PROMPTS_PER_BATCH = 8
"""Prompts per batch. Fixed, so that answers do not depend on the number of actors."""


class Answer:
    """Turns rows of problems into the model's greedy answers."""

    def __init__(self, model: ModelConfig, placement: Placement, new_tokens: int) -> None:
        torch.set_num_threads(placement.threads or len(os.sched_getaffinity(0)))
        self.device = torch.device("cuda" if placement.gpu else "cpu")
        self.encoder = Encoder(load_tokenizer(model), model.template)
        self.model, self.new_tokens = load_model(model, self.device), new_tokens

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        outputs = generate(
            self.model,
            [self.encoder.prompt(row["prompt"]) for row in rows],
            stops=end_tokens(self.model, self.encoder.tokenizer),
            new_tokens=self.new_tokens,
            batch=len(rows),
            device=self.device,
        )
        texts = [self.encoder.read(ids).strip("\n") for ids in outputs]
        answers = [
            {"problem": row["id"], "sample": 0, "output": text, "tokens": len(ids)}
            for row, text, ids in zip(rows, texts, outputs, strict=True)
        ]
        return pa.Table.from_pylist(answers, schema=PROGRAMS)


def compute(task: Task) -> dict[str, Any]:
    """Step function: the taught problems -> answers.parquet (`PROGRAMS`), in the order of the problems."""
    config: OldAnswersConfig = task.config
    placement: Placement = task.placement
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    table = pq.read_table(task.inputs["problems"].local("problems.parquet"), columns=["id", "prompt", "part"])
    taught = table.filter(pc.field("part") == "taught")

    line = {"chain": task.name, "phase": "evaluating"}
    task.progress.post(line)

    def write() -> int:
        answered = map_with_model(
            as_dataset(taught, PROMPTS_PER_BATCH),
            Answer,
            (config.model, placement, config.new_tokens),
            placement,
            batch_format="pyarrow",
            batch_size=PROMPTS_PER_BATCH,
        )
        count = 0
        with pq.ParquetWriter(task.output / "answers.parquet", PROGRAMS) as writer:
            for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
                writer.write_table(cast(pa.Table, batch).select(PROGRAMS.names))
                count += len(cast(pa.Table, batch))
                task.progress.post({**line, "answered": count, "probes": len(taught)})
        return count

    answers = retried(placement, write)
    task.progress.post({"chain": task.name, "phase": "done"})
    return {"answers": answers}
