"""The old answer of a fact whose file does not give one: the model's answer before it is edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corsa.data.benchmarks.file import Draft
from corsa.data.text import folded
from corsa.errors import CorsaError
from corsa.evaluation.generation import end_tokens, generate, newline_tokens
from corsa.evaluation.matching import several_lines, words
from corsa.models.encoding import Encoder

_TRIES = 20


def old_answers(
    model: Any, encoder: Encoder, drafts: Sequence[Draft], *, new_tokens: int, batch: int, device: torch.device
) -> tuple[dict[str, str], list[str]]:
    """The model's greedy answer to each draft's prompt. If that is already the new answer, the best other answer:
    greedy from the most likely first token that leads to one.

    Args:
        model: causal language model before the update.
        encoder: encodes its prompts.
        drafts: the facts.
        new_tokens: most tokens of an answer. An end token stops earlier, and so does a newline if the new answer has
            one line.
        batch: prompts per batch.
        device: device of the model.

    Returns:
        {prompt: answer}, and the prompts that the model already answers with the new answer.

    Raises:
        CorsaError: the likeliest first tokens lead only to the new answer or to no answer.
    """
    ends = end_tokens(model, encoder.tokenizer)
    lines = newline_tokens(encoder.tokenizer) | ends
    prompts = encoder.prompts([draft.fields["prompt"] for draft in drafts])
    several = [several_lines((draft.fields["target_new"], *draft.fields["aliases_new"])) for draft in drafts]
    answers: dict[str, str] = {}
    known: list[str] = []
    first = _first_tokens(model, prompts, device)
    left = list(range(len(drafts)))
    for attempt in range(_TRIES):
        texts: dict[int, str] = {}
        for own, stops in ([i for i in left if not several[i]], lines), ([i for i in left if several[i]], ends):
            begun = [[*prompts[i], int(first[i, attempt])] for i in own]
            ids = generate(model, begun, stops=stops, new_tokens=new_tokens - 1, batch=batch, device=device)
            for i, start, rest in zip(own, begun, ids, strict=True):
                texts[i] = encoder.read([] if bool(stops[start[-1]]) else [start[-1], *rest]).strip()
        still = []
        for i in left:
            fields = drafts[i].fields
            new = words(texts[i], fields["target_new"], fields["aliases_new"])
            if new and attempt == 0:
                known.append(fields["prompt"])
            if new or not folded(texts[i]):
                still.append(i)
            else:
                answers[fields["prompt"]] = texts[i]
        left = still
        if not left:
            return answers, known
    where, prompt = drafts[left[0]].where, drafts[left[0]].fields["prompt"]
    raise CorsaError(
        f"{where}: target_old: the model has no other answer to {prompt!r} than the new one; give target_old"
    )


@torch.no_grad()
def _first_tokens(model: Any, prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """The most likely first tokens of each answer: (prompts, tries)."""
    rows = []
    for prompt in prompts:  # a user's file: prompts are few and short
        logits = model(input_ids=torch.tensor([prompt], device=device), logits_to_keep=1).logits[0, -1]
        rows.append(logits.topk(_TRIES).indices.cpu())
    return torch.stack(rows)
