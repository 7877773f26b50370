"""Answers of a model that routes each query to one of several adapters (paper, Table 8). The base is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corsa.data.edit import Edit
from corsa.data.splits import describe
from corsa.evaluation.predict import Predictor, Taught
from corsa.lora.attached import Change, attached
from corsa.lora.routing import EmbeddingRouter, PromptRouter
from corsa.training.worker_context import Loaded


def route(
    router: str,
    loaded: Loaded,
    predictor: Predictor,
    parts: Sequence[Sequence[Edit]],
    changes: Sequence[Change],
    taught: Sequence[Taught],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Route every prompt, then ask each adapter its prompts.

    Args:
        router: "prompt", "embedding" or "oracle".
        loaded: the base model, LoRA off.
        predictor: asks the model.
        parts: the edits taught to each adapter.
        changes: the adapters, in the order of the parts.
        taught: the edits to ask about.

    Returns:
        The rows of the predictions table, and one row per prompt: {prompt, part, chosen} (parts from 0).
    """
    home = {edit.id: number for number, part in enumerate(parts) for edit in part}
    prompts = {prompt: home[t.edit.id] for t in taught for probe in t.edit.probes for prompt in probe.prompts}
    if router == "oracle":
        chosen = dict(prompts)
    else:
        if router == "prompt":
            sends: Any = PromptRouter(loaded.model, loaded.encoder, [describe(part) for part in parts], predictor.batch)
        else:
            sends = EmbeddingRouter(
                loaded.model, loaded.encoder, [[e.prompt for e in part] for part in parts], predictor.batch
            )
        chosen = dict(zip(prompts, sends.route(list(prompts)), strict=True))
    rows: list[dict[str, Any]] = []
    for number, change in enumerate(changes):
        with attached(loaded.model, change):
            own = {prompt for prompt, part in chosen.items() if part == number}
            rows += predictor.ask(taught, only=own)
    return rows, [{"prompt": p, "part": part, "chosen": chosen[p]} for p, part in prompts.items()]
