"""The packed triplet: one row `[x | y_new | y_old]`, so the prompt of an edit is computed once for both answers.

A tree attention mask hides y_new from y_old, and y_old counts its positions from the end of x, so each answer sees what
it would see in a row of its own. Several edits share a row, out of each other's sight, so that rows are of about equal
length. They are padded on the right: causality alone keeps padding out of every answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SAVING = 0.2
"""An edit whose packed row saves less than this share of the tokens runs as two plain causal rows instead: with long
answers (code) the dense mask costs more than the prompt it saves."""

PADDING = 1.05
"""Packed rows are made longer, by more edits each, until tokens processed / tokens needed is at most this."""

WIDEST = 2048
"""Tokens in a row of several edits at most: its mask takes the square of them."""


NO_OLD_ANSWER = float("inf")
"""The reference of an old answer that is not there: as if the base model could not but give it. Then L_DPO's margin is
infinite, its log sigmoid and the gradient exactly 0: the edit is taught by L_SFT alone."""


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


_PROMPT, _NEW, _OLD, _PADDING = range(4)


@dataclass(frozen=True)
class _Piece:
    """A run of tokens that is not cut: an edit packed, or one of its answers after its prompt.

    `positions` are those of the model; `parts` say of each token whether it is of the prompt or of which answer.
    `answers` are (slot, first token, token ids); what predicts the first token is the last one of the prompt.
    """

    tokens: list[int]
    positions: list[int]
    parts: list[int]
    prompt: int
    answers: list[tuple[int, int, Sequence[int]]]

    def __len__(self) -> int:
        return len(self.tokens)


def pack(
    triplets: Sequence[Triplet], *, dtype: torch.dtype = torch.float32, packed: bool = True, adapters: int = 1
) -> list[Rows]:
    """Rows for the forward passes over `triplets`: at most one packed and one plain (see `SAVING`).

    Packed rows hold several edits each, out of each other's sight, so that all are about equally long and next to
    nothing is padded. An answer without tokens takes none, and its log-probability is 0.

    Args:
        triplets: E edits; of several adapters as many for each, one adapter's after the other's.
        dtype: of the additive mask, the model's own.
        packed: False runs every edit as two plain rows (for model families whose packed log-probabilities differ).
        adapters: each has as many rows, in its turn; blank ones stand in where its edits have fewer.
    """
    whole: list[list[_Piece]] = [[] for _ in range(adapters)]
    plain: list[list[_Piece]] = [[] for _ in range(adapters)]
    for i, t in enumerate(triplets):
        x, n, o = len(t.prompt), len(t.new), len(t.old)
        old_slot, of = len(triplets) + i, i * adapters // len(triplets)
        if packed and t.packs:
            tokens = [*t.prompt, *t.new, *t.old]
            positions = [*range(x + n), *range(x, x + o)]
            parts = [_PROMPT] * x + [_NEW] * n + [_OLD] * o
            whole[of].append(_Piece(tokens, positions, parts, x, [(i, x, t.new), (old_slot, x + n, t.old)]))
        else:
            for slot, answer in ((i, t.new), (old_slot, t.old)):
                tokens = [*t.prompt, *answer]
                if answer:  # no row for one that is not there
                    plain[of].append(_Piece(tokens, list(range(len(tokens))), [], x, [(slot, x, answer)]))
    rows = []
    if any(whole):
        rows.append(_lay_out(_side_by_side(whole), dtype, tree=True))
    if any(plain):
        rows.append(_lay_out(_one_each(plain), dtype, tree=False))
    return rows


def blank(device: torch.device | str) -> Rows:
    """One row of one token without an answer: a pass over it counts for nothing."""
    one, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.empty(0, dtype=torch.long, device=device)
    return Rows(one, one, None, torch.ones_like(one, dtype=torch.bool), none, none, none)


def _side_by_side(pieces: Sequence[Sequence[_Piece]]) -> list[list[_Piece]]:
    """Each adapter's pieces in as few rows as `PADDING` asks for, as many for each adapter."""
    needed = sum(len(piece) for own in pieces for piece in own)
    count = max(map(len, pieces))
    while True:
        rows = [row for own in pieces for row in _even(own, count)]
        widest = max(sum(map(len, row)) for row in rows)
        if count == 1 or 2 * widest > WIDEST or len(rows) * widest <= PADDING * needed:
            return rows
        count = (count + 1) // 2


def _even(pieces: Sequence[_Piece], count: int) -> list[list[_Piece]]:
    """The pieces in `count` rows of about equal length: the longest that is left goes to the shortest row."""
    rows: list[list[_Piece]] = [[] for _ in range(count)]
    lengths = [(0, r) for r in range(count)]  # a heap
    for piece in sorted(pieces, key=len, reverse=True):
        length, r = lengths[0]
        rows[r].append(piece)
        heapq.heapreplace(lengths, (length + len(piece), r))
    return rows


def _one_each(pieces: Sequence[Sequence[_Piece]]) -> list[list[_Piece]]:
    """A row for each piece, and blank ones where an adapter has fewer than another."""
    most = max(map(len, pieces))
    return [row for own in pieces for row in [*([piece] for piece in own), *[[]] * (most - len(own))]]


def _lay_out(rows: Sequence[Sequence[_Piece]], dtype: torch.dtype, *, tree: bool) -> Rows:
    width = max(sum(map(len, row)) for row in rows)
    size = len(rows) * width
    input_ids = np.zeros(size, dtype=np.int64)
    # counted on through the padding: ids that start anew would make transformers build a dense mask for plain rows too
    position_ids = np.tile(np.arange(width), len(rows))
    edit, part = np.full(size, -1), np.full(size, _PADDING)  # of each token: what it may see depends on both
    at, target, slot = [], [], []  # the position that predicts each answer token
    for r, row in enumerate(rows):
        start = r * width
        for e, piece in enumerate(row):
            here = slice(start, start + len(piece))
            input_ids[here], position_ids[here] = piece.tokens, piece.positions
            if tree:
                edit[here], part[here] = e, piece.parts
            for s, first, tokens in piece.answers:
                at += [start + c for c in (piece.prompt - 1, *range(first, first + len(tokens) - 1))[: len(tokens)]]
                target += tokens
                slot += [s] * len(tokens)
            start += len(piece)
    keep = np.zeros(size, dtype=bool)
    keep[at] = True
    index = (keep.cumsum() - 1)[at]  # flat position -> its place among the kept ones
    shape = (len(rows), width)
    mask = _tree_mask(edit.reshape(shape), part.reshape(shape), dtype) if tree else None
    ids, positions, kept = (torch.from_numpy(a.reshape(shape)) for a in (input_ids, position_ids, keep))
    return Rows(ids, positions, mask, kept, torch.from_numpy(index), torch.tensor(target), torch.tensor(slot))


def _tree_mask(edit: np.ndarray, part: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Additive mask (R, 1, T, T): causal within an edit, and y_old does not see y_new."""
    width = edit.shape[1]
    same_edit = edit[:, :, None] == edit[:, None, :]
    on_the_way = (part[:, None, :] == _PROMPT) | (part[:, :, None] == part[:, None, :])
    allowed = np.tri(width, dtype=bool) & same_edit & on_the_way
    mask = torch.zeros(allowed.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(dtype).min)[:, None]
