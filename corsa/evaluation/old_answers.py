"""The old answer of a fact whose file does not give it: what the model says before it is edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corsa.data.benchmarks.file import Draft
from corsa.data.edit import normalise
from corsa.errors import CorsaError
from corsa.evaluation.generation import generate, newline_tokens
from corsa.evaluation.matching import contains
from corsa.models.encoding import Encoder

_TRIES = 20


def old_answers(
    model: Any, encoder: Encoder, drafts: Sequence[Draft], *, new_tokens: int, batch: int, device: torch.device
) -> tuple[dict[str, str], list[str]]:
    """What the model answers, greedily, to each draft's prompt; where that is the new answer already, the best answer
    that is not: greedily on from the most likely first token that leads to one.

    Args:
        model: causal language model, as it is before the update.
        encoder: how it is asked.
        drafts: the facts.
        new_tokens: bound on an answer's length, tokens; a newline or the end token stops earlier.
        batch: prompts asked together.
        device: where the model is.

    Returns:
        {prompt: answer}, and the prompts to which the model gave the new answer.

    Raises:
        CorsaError: no other answer than the new one, or none at all, begins with one of the likeliest tokens.
    """
    stops = newline_tokens(encoder.tokenizer)
    stops[encoder.tokenizer.eos_token_id] = True
    prompts = [encoder.prompt(draft.fields["prompt"]) for draft in drafts]
    answers: dict[str, str] = {}
    known: list[str] = []
    first = _first_tokens(model, prompts, device)
    left = list(range(len(drafts)))
    for attempt in range(_TRIES):
        begun = [[*prompts[i], int(first[i, attempt])] for i in left]
        ids = generate(model, begun, stops=stops, new_tokens=new_tokens - 1, batch=batch, device=device)
        still = []
        for i, start, rest in zip(left, begun, ids, strict=True):
            begin = [] if bool(stops[start[-1]]) else [start[-1], *rest]
            text = encoder.tokenizer.decode(begin, skip_special_tokens=True).strip()
            fields = drafts[i].fields
            new = contains(text, fields["target_new"], fields["aliases_new"])
            if new and attempt == 0:
                known.append(fields["prompt"])
            if new or not normalise(text):
                still.append(i)
            else:
                answers[fields["prompt"]] = text
        left = still
        if not left:
            return answers, known
    where, prompt = drafts[left[0]].where, drafts[left[0]].fields["prompt"]
    raise CorsaError(
        f"{where}: target_old: the model has no other answer to {prompt!r} than the new one; give target_old"
    )


@torch.no_grad()
def _first_tokens(model: Any, prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """The likeliest first tokens of each answer: (prompts, tries)."""
    rows = []
    for prompt in prompts:  # a user's file: prompts are few and short
        logits = model(input_ids=torch.tensor([prompt], device=device), logits_to_keep=1).logits[0, -1]
        rows.append(logits.topk(_TRIES).indices.cpu())
    return torch.stack(rows)
