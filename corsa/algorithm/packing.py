"""The packed triplet: one row `[x | y_new | y_old]`, so the prompt of an edit is computed once for both answers.

A tree attention mask hides y_new from y_old, and the positions of y_old continue from the end of x. So each answer sees
the same tokens as in a row of its own. Several edits share a row, masked from each other, to make rows about equally
long. Rows are padded on the right, where the causal mask hides the padding from every answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SAVING = 0.2
"""If a packed row saves less than this share of the tokens, the edit runs as two plain causal rows: with long answers
(code) the dense mask costs more than packing saves."""

PADDING = 1.05
"""More edits are put into each packed row until tokens processed / tokens needed is at most this."""

WIDEST = 2048
"""Most tokens in a row of several edits: the size of its mask is quadratic in them."""


NO_OLD_ANSWER = float("inf")
"""The reference log-probability of an edit without an old answer. It makes L_DPO's margin infinite, so the log sigmoid
and its gradient are exactly 0: L_SFT alone teaches the edit."""

TAUGHT = 0
"""The role of the edits that the round teaches. Edits of another role are read by objectives of that role."""

EARLIER, ANCHOR = 1, 2
"""The roles of earlier rounds' facts and of everyday questions where they are objectives of their own."""


@dataclass(frozen=True)
class Triplet:
    """One edit as token ids (DESIGN: (x, y_old, y_new)) with its reference log-probabilities in nats.

    Answers end with the tokenizer's end-of-text token. `reference` is (logp_ref(y_new|x), logp_ref(y_old|x)).
    `kept`: the new answer is the base model's own, taught so that it stays; nothing has to be learnt.
    `role` says which objectives read the edit (`corsa.algorithm.objectives`).
    """

    prompt: Sequence[int]
    new: Sequence[int]
    old: Sequence[int]
    reference: tuple[float, float] = (0.0, 0.0)
    kept: bool = False
    role: int = TAUGHT

    def __len__(self) -> int:
        """Tokens of the packed row."""
        return len(self.prompt) + len(self.new) + len(self.old)

    @property
    def packs(self) -> bool:
        """Whether packing saves at least `SAVING` of the tokens of two separate rows."""
        return len(self.prompt) >= SAVING * (2 * len(self.prompt) + len(self.new) + len(self.old))


@dataclass(frozen=True)
class Rows:
    """Padded rows for one forward pass, and the positions that predict the answer tokens.

    input_ids, position_ids: (R, T). mask: (R, 1, T, T) additive, or None for plain causal rows. keep: (R, T) bool, the
    positions whose logits are needed (n of them). For each answer token, A in all: `index` into the n kept positions,
    `target` token id, and `answer` in 0..2E-1: the answer's index among E new answers followed by E old ones.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    keep: Tensor
    index: Tensor
    target: Tensor
    answer: Tensor

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows(*(None if t is None else t.to(device) for t in vars(self).values()))  # type: ignore[arg-type]


_PROMPT, _NEW, _OLD, _PADDING = range(4)


@dataclass(frozen=True)
class _Piece:
    """A run of tokens that stays in one row: a packed edit, or a prompt with one of its answers.

    `positions` are the position ids. `parts` gives the part of each token: prompt, new answer or old answer.
    `answers` are (index of the answer, index of its first token, token ids). The last prompt token predicts the first
    answer token.
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

    A packed row holds several edits, masked from each other, so that rows are about equally long and need little
    padding. An answer without tokens gets no row, and its log-probability is 0.

    Args:
        triplets: E edits. With several adapters, the same number for each, grouped by adapter.
        dtype: dtype of the additive mask (the model's dtype).
        packed: False runs every edit as two plain rows (for model families whose packed log-probabilities differ).
        adapters: number of adapters. All get the same number of rows, in adapter order; blank rows fill up.
    """
    whole: list[list[_Piece]] = [[] for _ in range(adapters)]
    plain: list[list[_Piece]] = [[] for _ in range(adapters)]
    for i, t in enumerate(triplets):
        x, n, o = len(t.prompt), len(t.new), len(t.old)
        old_answer, of = len(triplets) + i, i * adapters // len(triplets)
        if packed and t.packs:
            tokens = [*t.prompt, *t.new, *t.old]
            positions = [*range(x + n), *range(x, x + o)]
            parts = [_PROMPT] * x + [_NEW] * n + [_OLD] * o
            whole[of].append(_Piece(tokens, positions, parts, x, [(i, x, t.new), (old_answer, x + n, t.old)]))
        else:
            for number, answer in ((i, t.new), (old_answer, t.old)):
                tokens = [*t.prompt, *answer]
                if answer:  # an empty answer gets no row
                    plain[of].append(_Piece(tokens, list(range(len(tokens))), [], x, [(number, x, answer)]))
    rows = []
    if any(whole):
        rows.append(_lay_out(_side_by_side(whole), dtype, tree=True))
    if any(plain):
        rows.append(_lay_out(_one_each(plain), dtype, tree=False))
    return rows


def blank(device: torch.device | str) -> Rows:
    """One row of one token without an answer: a pass over it adds nothing to the losses."""
    one, none = torch.zeros(1, 1, dtype=torch.long, device=device), torch.empty(0, dtype=torch.long, device=device)
    return Rows(one, one, None, torch.ones_like(one, dtype=torch.bool), none, none, none)


def _side_by_side(pieces: Sequence[Sequence[_Piece]]) -> list[list[_Piece]]:
    """Each adapter's pieces in as few rows as `PADDING` requires, the same number of rows for each adapter."""
    needed = sum(len(piece) for own in pieces for piece in own)
    count = max(map(len, pieces))
    while True:
        rows = [row for own in pieces for row in _even(own, count)]
        widest = max(sum(map(len, row)) for row in rows)
        if count == 1 or 2 * widest > WIDEST or len(rows) * widest <= PADDING * needed:
            return rows
        count = (count + 1) // 2


def _even(pieces: Sequence[_Piece], count: int) -> list[list[_Piece]]:
    """The pieces in `count` rows of about equal length: the longest remaining piece goes to the shortest row."""
    rows: list[list[_Piece]] = [[] for _ in range(count)]
    lengths = [(0, r) for r in range(count)]  # a heap
    for piece in sorted(pieces, key=len, reverse=True):
        length, r = lengths[0]
        rows[r].append(piece)
        heapq.heapreplace(lengths, (length + len(piece), r))
    return rows


def _one_each(pieces: Sequence[Sequence[_Piece]]) -> list[list[_Piece]]:
    """One row per piece, and blank rows for adapters that have fewer pieces."""
    most = max(map(len, pieces))
    return [row for own in pieces for row in [*([piece] for piece in own), *[[]] * (most - len(own))]]


def _lay_out(rows: Sequence[Sequence[_Piece]], dtype: torch.dtype, *, tree: bool) -> Rows:
    width = max(sum(map(len, row)) for row in rows)
    size = len(rows) * width
    input_ids = np.zeros(size, dtype=np.int64)
    # ids count on through the padding: if they restarted, transformers would build a dense mask for plain rows too
    position_ids = np.tile(np.arange(width), len(rows))
    edit, part = np.full(size, -1), np.full(size, _PADDING)  # per token; both decide what it may see
    at, target, answer = [], [], []  # the position that predicts each answer token
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
                answer += [s] * len(tokens)
            start += len(piece)
    keep = np.zeros(size, dtype=bool)
    keep[at] = True
    index = (keep.cumsum() - 1)[at]  # flat position -> its place among the kept ones
    shape = (len(rows), width)
    mask = _tree_mask(edit.reshape(shape), part.reshape(shape), dtype) if tree else None
    ids, positions, kept = (torch.from_numpy(a.reshape(shape)) for a in (input_ids, position_ids, keep))
    return Rows(ids, positions, mask, kept, torch.from_numpy(index), torch.tensor(target), torch.tensor(answer))


def _tree_mask(edit: np.ndarray, part: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Additive mask (R, 1, T, T): causal within an edit, and y_old does not see y_new."""
    width = edit.shape[1]
    same_edit = edit[:, :, None] == edit[:, None, :]
    on_the_way = (part[:, None, :] == _PROMPT) | (part[:, :, None] == part[:, None, :])
    allowed = np.tri(width, dtype=bool) & same_edit & on_the_way
    mask = torch.zeros(allowed.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~allowed), torch.finfo(dtype).min)[:, None]
