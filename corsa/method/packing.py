"""The packed triplet: one row `[x | y_new | y_old]`, so the prompt of an edit is computed once for both answers.

A tree attention mask hides y_new from y_old, and y_old counts its positions from the end of x, so each answer sees what
it would see in a row of its own. Rows are padded on the right: causality alone keeps padding out of every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAVING = 0.2
"""An edit whose packed row saves less than this share of the tokens runs as two plain causal rows instead: with long
answers (code) the dense mask costs more than the prompt it saves."""


@dataclass(frozen=True)
class Triplet:
    """One edit as token ids (DESIGN: (x, y_old, y_new)) with its reference log-probabilities in nats.

    Answers end with the tokenizer's end-of-text token. `reference` is (logp_ref(y_new|x), logp_ref(y_old|x)).
    """

    prompt: Sequence[int]
    new: Sequence[int]
    old: Sequence[int]
    reference: tuple[float, float] = (0.0, 0.0)

    def __len__(self) -> int:
        """Tokens of the packed row."""
        return len(self.prompt) + len(self.new) + len(self.old)

    @property
    def packs(self) -> bool:
        """Whether packing saves at least `SAVING` of the tokens of two separate rows."""
        return len(self.prompt) >= SAVING * (2 * len(self.prompt) + len(self.new) + len(self.old))


@dataclass(frozen=True)
class Rows:
    """Padded rows for one forward pass, and where their answers' tokens are predicted.

    input_ids, position_ids: (R, T). mask: (R, 1, T, T) additive, or None for plain causal rows. keep: (R, T) bool, the
    positions whose logits are needed (n of them). For each answer token, A in all: `index` into the n kept positions,
    `target` token id, and `slot` in 0..2E-1: the edit's place among E new answers followed by E old ones.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    keep: Tensor
    index: Tensor
    target: Tensor
    slot: Tensor

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows(*(None if t is None else t.to(device) for t in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Row:
    """One row before padding; `answers` are (slot, first position, token ids, position that predicts the first)."""

    tokens: list[int]
    positions: list[int]
    answers: list[tuple[int, int, Sequence[int], int]]


def pack(triplets: Sequence[Triplet], *, dtype: torch.dtype = torch.float32, packed: bool = True) -> list[Rows]:
    """Rows for the forward passes over `triplets`: at most one packed and one plain (see `SAVING`).

    Args:
        triplets: E edits.
        dtype: of the additive mask, the model's own.
        packed: False runs every edit as two plain rows (for model families whose packed log-probabilities differ).
    """
    whole, plain = [], []
    for i, t in enumerate(triplets):
        x, n, old_slot = len(t.prompt), len(t.new), len(triplets) + i
        if packed and t.packs:
            whole.append(
                _Row(
                    [*t.prompt, *t.new, *t.old],
                    [*range(x + n), *range(x, x + len(t.old))],
                    [(i, x, t.new, x - 1), (old_slot, x + n, t.old, x - 1)],
                )
            )
        else:
            for slot, answer in ((i, t.new), (old_slot, t.old)):
                row = [*t.prompt, *answer]
                plain.append(_Row(row, list(range(len(row))), [(slot, x, answer, x - 1)]))
    return [_pad(rows, dtype, tree) for rows, tree in ((whole, True), (plain, False)) if rows]


def blank(device: torch.device | str) -> Rows:
    """One row of one token without an answer: a pass over it counts for nothing."""
    one, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.empty(0, dtype=torch.long, device=device)
    return Rows(one, one, None, torch.ones_like(one, dtype=torch.bool), none, none, none)


def _pad(rows: list[_Row], dtype: torch.dtype, tree: bool) -> Rows:
    width = max(len(r.tokens) for r in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    # counted on through the padding: ids that start anew would make transformers build a dense mask for plain rows too
    position_ids = torch.arange(width).repeat(len(rows), 1)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    at, target, slot = [], [], []  # flat position (row * width + column) that predicts each answer token
    for r, row in enumerate(rows):
        input_ids[r, : len(row.tokens)] = torch.tensor(row.tokens)
        position_ids[r, : len(row.positions)] = torch.tensor(row.positions)
        for s, first, tokens, before in row.answers:
            at += [r * width + c for c in (before, *range(first, first + len(tokens) - 1))]
            target += tokens
            slot += [s] * len(tokens)
    where = torch.tensor(at)
    keep.view(-1)[where] = True
    rank = keep.view(-1).cumsum(0) - 1  # flat position -> its place among the kept ones
    mask = _tree_mask(rows, width, dtype) if tree else None
    return Rows(input_ids, position_ids, mask, keep, rank[where], torch.tensor(target), torch.tensor(slot))


def _tree_mask(rows: list[_Row], width: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (R, 1, T, T): causal, and y_old does not see y_new."""
    allowed = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
    for r, row in enumerate(rows):
        (_, new, tokens, _), (_, old, _, _) = row.answers
        allowed[r, old:, new : new + len(tokens)] = False
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
