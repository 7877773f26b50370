"""log p(y|x) of both answers of every edit, from logits at answer positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from corsa.algorithm.packing import Rows, Triplet, pack

Model = Callable[..., Any]
"""A causal language model of transformers, or a wrapper with the same call."""


PerToken = Callable[[Tensor, Rows], Tensor]
"""A number for each answer token of some rows, (A,), from the logits (n, V) of their kept positions."""


def log_p(logits: Tensor, rows: Rows) -> Tensor:
    """Log p of each answer token in nats, (A,)."""
    return logits[rows.index, rows.target] - logits.logsumexp(-1)[rows.index]


def answer_sums(model: Model, rows: Sequence[Rows], edits: int, per_token: Sequence[PerToken]) -> list[Tensor]:
    """For each function of the logits, its sums over the tokens of each answer: (2, E), new answers first; float32.

    The output head runs only on the kept positions, so no logits of prompt tokens are computed.
    """
    totals: list[Tensor] = []
    for r in rows:
        logits = model(
            input_ids=r.input_ids,
            attention_mask=r.mask,
            position_ids=r.position_ids,
            logits_to_keep=r.keep,
            use_cache=False,
        ).logits.float()  # (n, V)
        found = [read(logits, r) for read in per_token]
        totals = totals or [values.new_zeros(2 * edits) for values in found]
        totals = [total.index_add(0, r.slot, values) for total, values in zip(totals, found, strict=True)]
    assert totals, "no rows"
    return [total.view(2, edits) for total in totals]


def answer_logprobs(model: Model, rows: Sequence[Rows], edits: int) -> Tensor:
    """Sums of log p over the answer tokens, in nats: (2, E), new answers first, old ones second; float32."""
    (logp,) = answer_sums(model, rows, edits, [log_p])
    return logp


@torch.no_grad()
def packing_is_exact(
    model: Model,
    triplets: Sequence[Triplet],
    dtype: torch.dtype,
    device: torch.device | str,
    tolerance: float | None = None,
) -> bool:
    """Whether this model gives the same log-probabilities for a packed row as for two plain rows.

    Architectures treat custom masks and position ids differently, so each model is tested on its first batch.
    `tolerance` is relative to 1 + |log p| (default: 1e-4 in float32, else 3e-2: bfloat16 rounding causes such errors).
    """
    if tolerance is None:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    packed, plain = (
        answer_logprobs(model, [r.to(device) for r in pack(triplets, dtype=dtype, packed=p)], len(triplets))
        for p in (True, False)
    )
    return bool(((packed - plain).abs() <= tolerance * (1.0 + plain.abs())).all())
