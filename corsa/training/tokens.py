"""The token table: each edit as token ids with its reference log-probabilities, and the order of training."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from corsa.algorithm.packing import Triplet
from corsa.models.encoding import Encoder

REFERENCE = pa.schema(
    [
        ("id", pa.string()),
        *((name, pa.list_(pa.int32())) for name in ("prompt", "new", "old")),
        ("reference_new", pa.float64()),
        ("reference_old", pa.float64()),
    ]
)
"""The reference table: token ids of every edit, and the base model's log-probabilities of both answers (nats)."""


class TokenTable:
    """Token ids and reference column of all edits in flat arrays (a few bytes a token), looked up by edit id."""

    def __init__(self, batches: Iterable[pa.RecordBatch | pa.Table]) -> None:
        parts = [pa.Table.from_batches([b]) if isinstance(b, pa.RecordBatch) else b for b in batches]
        table = pa.concat_tables(parts).combine_chunks() if parts else REFERENCE.empty_table()
        self._tokens: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in ("prompt", "new", "old"):
            column = table.column(name).combine_chunks()
            array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            self._tokens[name] = (array.flatten().to_numpy(), array.offsets.to_numpy() - array.offsets[0].as_py())
        self._reference = np.stack([table.column(f"reference_{side}").to_numpy() for side in ("new", "old")], axis=1)
        self._at = {id_: i for i, id_ in enumerate(table.column("id").to_pylist())}

    def __len__(self) -> int:
        return len(self._at)

    @property
    def bytes(self) -> int:
        """Memory in bytes: token ids, offsets, reference, and the index of ids."""
        arrays = [self._reference, *(array for pair in self._tokens.values() for array in pair)]
        index = sys.getsizeof(self._at) + sum(sys.getsizeof(id_) + sys.getsizeof(i) for id_, i in self._at.items())
        return sum(array.nbytes for array in arrays) + index

    def __contains__(self, id_: str) -> bool:
        return id_ in self._at

    def longest(self, ids: list[str], count: int) -> list[str]:
        """The edits with the most tokens, in rising order; of equal ones, the last."""
        at = np.array([self._at[id_] for id_ in ids], dtype=np.int64)
        sizes = sum((np.diff(offsets)[at] for _, offsets in self._tokens.values()), np.zeros(len(at), dtype=np.int64))
        return [ids[i] for i in np.argsort(sizes, kind="stable")[-count:]]

    def triplet(self, id_: str) -> Triplet:
        """The edit `id_` as token ids with its reference log-probabilities."""
        i = self._at[id_]
        prompt, new, old = (tokens[offsets[i] : offsets[i + 1]].tolist() for tokens, offsets in self._tokens.values())
        return Triplet(prompt, new, old, (float(self._reference[i, 0]), float(self._reference[i, 1])))


def batch_order(edits: int, batch: int, *, seed: int, round_: int, epoch: int) -> list[np.ndarray]:
    """Positions of the edits in each global batch of an epoch. Every edit occurs once, so the last batch may be
    smaller.

    The permutation depends only on (seed, round, epoch). So batches do not depend on the number of workers, and
    resuming is index arithmetic.
    """
    order = np.random.default_rng([seed, round_, epoch]).permutation(edits)
    return [order[i : i + batch] for i in range(0, edits, batch)]


def token_rows(encoder: Encoder, edits: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The token ids of rows of the `Edit` table (without the reference)."""
    prompts = encoder.prompts([edit["prompt"] for edit in edits])
    new, old = (encoder.answers([edit[f"target_{side}"] for edit in edits]) for side in ("new", "old"))
    return [
        {"id": edit["id"], "prompt": x, "new": n, "old": o if edit["target_old"] else []}
        for edit, x, n, o in zip(edits, prompts, new, old, strict=True)
    ]


def without_tokens(row: Mapping[str, Sequence[int]], end: int = 1) -> str | None:
    """The field of an answer that has only its end (`end` tokens) and so teaches nothing; None if there is none."""
    if len(row["new"]) <= end:
        return "target_new"
    return "target_old" if 0 < len(row["old"]) <= end else None  # 0 tokens: the edit has no old answer
