"""What the base model writes before any update, y_old of the code domain: greedy generation on Ray Data."""

from __future__ import annotations

import os
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch

from corsa.config import ModelConfig, Placement
from corsa.config.steps import OldAnswersConfig
from corsa.evaluation.generation import end_alone, generate
from corsa.evaluation.programs import PROGRAMS
from corsa.flow.task import Task
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.training.ray_data_stages import map_with_model, retried

PROMPTS_PER_BATCH = 8
"""Prompts answered together; fixed, so that an answer does not depend on how many actors share the work."""


class Answer:
    """Turns rows of problems into the model's greedy answers."""

    def __init__(self, model: ModelConfig, placement: Placement, new_tokens: int) -> None:
        torch.set_num_threads(placement.threads or len(os.sched_getaffinity(0)))
        self.device = torch.device("cuda" if placement.gpu else "cpu")
        self.encoder = Encoder(load_tokenizer(model), model.template)
        self.model, self.new_tokens = load_model(model, self.device), new_tokens

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows, tokenizer = batch.to_pylist(), self.encoder.tokenizer
        outputs = generate(
            self.model,
            [self.encoder.prompt(row["prompt"]) for row in rows],
            stops=end_alone(tokenizer),
            new_tokens=self.new_tokens,
            batch=len(rows),
            device=self.device,
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip("\n") for ids in outputs]
        answers = [
            {"problem": row["id"], "sample": 0, "output": text, "tokens": len(ids)}
            for row, text, ids in zip(rows, texts, outputs, strict=True)
        ]
        return pa.Table.from_pylist(answers, schema=PROGRAMS)


def compute(task: Task) -> dict[str, Any]:
    """Step function: the problems that are taught -> answers.parquet (`PROGRAMS`), in their order."""
    config: OldAnswersConfig = task.config
    placement: Placement = task.placement
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    table = pq.read_table(task.inputs["problems"].local("problems.parquet"), columns=["id", "prompt", "part"])
    taught = table.filter(pc.field("part") == "taught")

    def write() -> int:
        answered = map_with_model(
            ray.data.from_arrow(taught),
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
        return count

    return {"answers": retried(placement, write)}
