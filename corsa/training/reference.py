"""The reference column: log p of both answers under the base model. Ray Data computes it once per (model, template, end
of an answer, edits).

No training step runs the reference model: every method, trial and round reads this column.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
import torch

from corsa.algorithm.logprobs import answer_logprobs, packing_is_exact
from corsa.algorithm.packing import NO_OLD_ANSWER, Triplet, pack
from corsa.config import AnswerEnd, ModelConfig, Placement
from corsa.config.steps import ReferenceConfig
from corsa.errors import CorsaError
from corsa.flow.ray_data import as_dataset, map_with_model, retried
from corsa.flow.task import Task
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.training.start_group import in_group
from corsa.training.tokens import REFERENCE, token_rows, without_tokens
from corsa.training.worker_group import WorkerGroup

EDITS_PER_BATCH = 32
"""Edits per forward pass. Fixed, so that values do not depend on the number of actors."""


COLUMNS = ["id", "prompt", "target_new", "target_old"]
"""The columns of the edits that are read."""

MARKED = REFERENCE.append(pa.field("bad", pa.string())).append(pa.field("reason", pa.string()))
"""The reference table with two more columns for unusable rows: the bad field and the reason."""


class Score:
    """Turns edit rows into token ids with the reference column. Marks, but does not drop, rows whose answer has no
    tokens or that do not fit into the model's context.
    """

    context: int | None = None
    """Positions of the model; None if its architecture sets no limit."""

    def __init__(
        self, model: ModelConfig, placement: Placement, answer_end: AnswerEnd, group: WorkerGroup | None = None
    ) -> None:
        if group is None:
            torch.set_num_threads(placement.threads or len(os.sched_getaffinity(0)))
        self.device = group.device if group else torch.device("cuda" if placement.gpu else "cpu")
        self.encoder = Encoder(load_tokenizer(model), model.template, answer_end)
        self.model = group.place(model) if group else load_model(model, self.device)
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.packed, self.longest = True, 0

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = token_rows(self.encoder, batch.to_pylist())
        for row in rows:
            row["bad"], row["reason"] = without_tokens(row, len(self.encoder.end)), "has no tokens"
            tokens = len(row["prompt"]) + max(len(row["new"]), len(row["old"]))
            if row["bad"] is None and self.context is not None and tokens > self.context:
                row["bad"] = "prompt"
                row["reason"] = f"and its answer have {tokens} tokens, and the model's context holds {self.context}"
        good = [row for row in rows if row["bad"] is None]
        if good:
            logp = self.score([Triplet(row["prompt"], row["new"], row["old"]) for row in good])
            for row, new, old in zip(good, *logp.tolist(), strict=True):
                row["reference_new"], row["reference_old"] = new, old if row["old"] else NO_OLD_ANSWER
        return pa.Table.from_pylist(rows, schema=MARKED)

    @torch.no_grad()
    def score(self, triplets: list[Triplet]) -> np.ndarray:
        """(2, E): log p of the new and of the old answers."""
        dtype = self.model.dtype
        longest = max(triplets, key=len)
        if self.packed and len(longest) > self.longest:  # a sliding window affects only longer rows
            self.longest = len(longest)
            self.packed = packing_is_exact(self.model, [longest, *triplets[:4]], dtype, self.device)
        rows = [r.to(self.device) for r in pack(triplets, dtype=dtype, packed=self.packed)]
        return answer_logprobs(self.model, rows, len(triplets)).double().cpu().numpy()


def compute(task: Task) -> dict[str, Any]:
    """Step function: edits.parquet -> reference.parquet (`REFERENCE`), in the order of the edits.

    Raises:
        CorsaError: an answer has no tokens or exceeds the context (unless skipped), or no edit is left.
    """
    config: ReferenceConfig = task.config
    placement: Placement = task.placement
    if placement.sharding.zero_stage == 3:  # the base may not fit into one actor
        tables = in_group(score_in_step, {"task": task}, placement, task.store.url, {})
        kept, bad = _write(task, tables)
    else:
        kept, bad = retried(placement, lambda: _write(task, _scored(task, config, placement)))
    if bad and config.on_bad_record == "stop":
        raise CorsaError(
            f"{bad[0]['where']}: {bad[0]['field']} {bad[0]['reason']} under the tokenizer of {config.model.name} "
            f"({len(bad)} such in all): correct the answer, or pass --on-bad-record skip"
        )
    if not kept:
        raise CorsaError("no edit is left: every answer has no tokens under this tokenizer, or is beyond the context")
    (task.output / "skipped.json").write_text(json.dumps(bad))
    return {"edits": kept, "skipped": len(bad), "reference_forwards": kept}


def _scored(task: Task, config: ReferenceConfig, placement: Placement) -> Iterator[pa.Table]:
    """The rows of `MARKED` in the order of the edits, from actors that each hold the base."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # in the order of the edits
    scored = map_with_model(
        as_dataset(_edits(task), EDITS_PER_BATCH),
        Score,
        (config.model, placement, config.answer_end),
        placement,
        batch_size=EDITS_PER_BATCH,
        batch_format="pyarrow",
    )
    for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield cast(pa.Table, batch)


def _edits(task: Task) -> pa.Table:
    return pq.read_table(task.inputs["edits"].local("edits.parquet"), columns=COLUMNS)


def score_in_step(config: dict[str, Any]) -> list[pa.Table]:
    """Score this worker's share of the batches, in a group that shards the base. The leader returns all tables."""
    task: Task = config["task"]
    group = WorkerGroup.join(task.placement)
    edits = _edits(task)
    score = Score(task.config.model, task.placement, task.config.answer_end, group)
    with group.in_step(score.model):
        starts = range(group.rank * EDITS_PER_BATCH, len(edits), group.size * EDITS_PER_BATCH)
        own = [(start, score(edits.slice(start, EDITS_PER_BATCH))) for start in starts]
    return [table for _, table in sorted(group.collect(own), key=lambda pair: pair[0])]


def _write(task: Task, scored: Iterable[pa.Table]) -> tuple[int, list[dict[str, str]]]:
    """Write reference.parquet. Returns the number of edits in it, and the edits left out."""
    bad: list[dict[str, str]] = []
    kept = done = 0
    edits = len(_edits(task))
    with pq.ParquetWriter(task.output / "reference.parquet", REFERENCE) as writer:
        for table in scored:
            done += len(table)
            task.progress.post({"chain": task.name, "phase": "scoring", "edit": done, "edits": edits})
            bad += [{"where": r["id"], "field": r["bad"], "reason": r["reason"]} for r in table.to_pylist() if r["bad"]]
            good = table.filter(pc.field("bad").is_null()).select(REFERENCE.names)
            kept += len(good)
            writer.write_table(good)
    task.progress.post({"chain": task.name, "phase": "done"})
    return kept, bad
