"""log p(y|x) of both answers of every edit, from logits at answer positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from corsa.algorithm.packing import Rows, Triplet, pack

Model = Callable[..., Any]
"""A causal language model of transformers (or a wrapper called like one)."""


def answer_logprobs(model: Model, rows: Sequence[Rows], edits: int) -> Tensor:
    """Sums of log p over the answer tokens, in nats: (2, E), new answers first, old ones second; float32.

    No logit of a prompt token is computed: the output head sees the kept positions alone.
    """
    total: Tensor | None = None
    for r in rows:
        logits = model(
            input_ids=r.input_ids,
            attention_mask=r.mask,
            position_ids=r.position_ids,
            logits_to_keep=r.keep,
            use_cache=False,
        ).logits.float()  # (n, V)
        logp = logits[r.index, r.target] - logits.logsumexp(-1)[r.index]  # (A,)
        start = logp.new_zeros(2 * edits) if total is None else total
        total = start.index_add(0, r.slot, logp)
    assert total is not None, "no rows"
    return total.view(2, edits)


@torch.no_grad()
def packing_is_exact(
    model: Model,
    triplets: Sequence[Triplet],
    dtype: torch.dtype,
    device: torch.device | str,
    tolerance: float | None = None,
) -> bool:
    """Whether this model family gives a packed row the log-probabilities of two plain rows.

    Architectures differ in how they treat a mask and position ids of one's own, so each is tried on its first batch.
    The tolerance is relative to |log p| (default: 1e-4 in float32, 3e-2 in bfloat16, where rounding alone moves it).
    """
    if tolerance is None:
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    packed, plain = (
        answer_logprobs(model, [r.to(device) for r in pack(triplets, dtype=dtype, packed=p)], len(triplets))
        for p in (True, False)
    )
    return bool(((packed - plain).abs() <= tolerance * (1.0 + plain.abs())).all())
