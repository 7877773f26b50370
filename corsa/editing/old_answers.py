"""Asks the model, on the cluster, for the old answers that are missing in a file of facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from corsa.config import Placement
from corsa.config.steps import AskedFactsConfig
from corsa.data.benchmarks.file import drafts_of
from corsa.editing.history import unanswered
from corsa.editing.steps import line_edits, standing, write_edits
from corsa.evaluation.old_answers import old_answers
from corsa.flow.task import Task
from corsa.lora.attached import attached
from corsa.lora.peft_format import read_factors
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.training.resources import cpus_per_worker


def complete(task: Task) -> dict[str, Any]:
    """Step function: like `corsa.editing.steps.read_facts`, but asks the model for missing old answers.

    Raises:
        CorsaError: a fact is not valid, or the model answers it with the new answer only.
    """
    import ray

    placement: Placement = task.placement
    drafts = drafts_of(Path(task.placement.data))
    asked = unanswered(standing(line_edits(task)), drafts)
    change = read_factors(task.inputs["line"].local("adapter"))[0] if "line" in task.inputs else {}
    options: dict[str, Any] = {"num_cpus": cpus_per_worker(placement), "num_gpus": int(placement.gpu)}
    worker = ray.remote(_ask).options(**options, max_retries=placement.max_failures)
    missing = f"{len(asked)} missing old answer{'s' * (len(asked) > 1)}"
    task.progress.post({"chain": task.name, "phase": f"asking the model for {missing}"})
    answers, known = ray.get(worker.remote(task.config, placement, asked, change))
    task.progress.post({"chain": task.name, "phase": "done"})
    return write_edits(task, drafts, answers) | {"asked": len(asked), "known": len(known)}


def _ask(config: AskedFactsConfig, placement: Placement, drafts: Any, change: Any) -> tuple[dict[str, str], list[str]]:
    if placement.threads:
        torch.set_num_threads(placement.threads)
    device = torch.device("cuda" if placement.gpu else "cpu")
    encoder = Encoder(load_tokenizer(config.model), config.model.template)
    model = load_model(config.model, device)
    with attached(model, change):
        return old_answers(
            model, encoder, drafts, new_tokens=config.new_tokens, batch=placement.probe_batch, device=device
        )
