"""log p(y|x) of both answers of every edit, from logits at answer positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from corsa.algorithm.packing import Rows, Triplet, pack

Model = Callable[..., Any]
"""A causal language model of transformers, or a wrapper with the same call."""


PerToken = Callable[[Tensor, Rows], Tensor]
"""A number for each answer token of some rows, (A,) float32, from the logits (n, V) of their kept positions, which have
the model's data type."""

BLOCK = 256
"""Kept positions whose logits are float32 at once: 156 MB with a vocabulary of 151,936."""


def log_p(logits: Tensor, rows: Rows) -> Tensor:
    """Log p of each answer token in nats, (A,) float32."""
    return _LogP.apply(logits, rows.index, rows.target)


class _LogP(torch.autograd.Function):
    """`logits.float().log_softmax(-1)[index, target]`, in blocks of positions.

    Autograd alone would keep all logits in float32, and make several more tensors of this size for the gradients. Here
    the backward pass casts each block again. A block's gradient is rounded to the logits' data type as a whole: where
    p is near 1, the softmax and the 1 of the target nearly cancel.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, target: Tensor) -> Tensor:
        sums = torch.cat([block.float().logsumexp(-1) for block in logits.split(BLOCK)])
        ctx.save_for_backward(logits, sums, index, target)
        return logits[index, target].float() - sums[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        logits, sums, index, target = ctx.saved_tensors
        positions = torch.zeros_like(sums).index_add(0, index, -g)
        blocks, start = [], 0
        for block, of_softmax, total in zip(
            logits.split(BLOCK), positions.split(BLOCK), sums.split(BLOCK), strict=True
        ):
            softmax = of_softmax[:, None] * (block.float() - total[:, None]).exp()
            here = (index >= start) & (index < start + len(block))  # tokens of other blocks add 0 to its first logit
            at = torch.where(here, (index - start) * block.shape[1] + target, 0)
            own = sums.new_zeros(block.numel()).index_add(0, at, torch.where(here, g, 0.0))
            blocks.append((softmax + own.view(block.shape)).to(logits.dtype))
            start += len(block)
        return torch.cat(blocks), None, None


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
        ).logits  # (n, V)
        found = [read(logits, r) for read in per_token]
        totals = totals or [values.new_zeros(2 * edits, dtype=torch.float32) for values in found]
        totals = [total.index_add(0, r.answer, values) for total, values in zip(totals, found, strict=True)]
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
