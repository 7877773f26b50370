"""Predictors for answers that another engine generates: one scores and generates nothing, one records what is to be
generated, one reads what was generated. All three ask in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

import pyarrow as pa
import torch

from corsa.config import EvaluationConfig
from corsa.evaluation.generation import newline_tokens
from corsa.evaluation.predict import Predictor, Taught
from corsa.models.encoding import Encoder

REQUESTS = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),  # of the prompt
        ("new_tokens", pa.int32()),  # most that are generated
        ("lines", pa.bool_()),  # a newline does not end the answer
        ("seed", pa.int64()),  # of a sampled answer; null: greedy
    ]
)
"""The continuations to generate, one a row. In a large run there are millions, so they are columns."""

Scores = Mapping[tuple[str, int, int], tuple[float, float]]
"""Log p of the new and the old answer (nats), by edit, probe and wording."""


class Scorer(Predictor):
    """Measures log-probabilities. Its answers are empty."""

    def _continued(self, prompts: Sequence[Sequence[int]], *args: Any) -> list[list[int]]:
        return [[] for _ in prompts]


class Recorder(Scorer):
    """Records the requests. It needs no model; its answers are empty."""

    def __init__(self, encoder: Encoder, config: EvaluationConfig, seed: int) -> None:
        super().__init__(None, encoder, config, torch.device("cpu"), batch=1, seed=seed)
        self._requests: list[pa.RecordBatch] = []

    @property
    def requests(self) -> pa.Table:
        """What was recorded so far (`REQUESTS`)."""
        return pa.Table.from_batches(self._requests, REQUESTS)

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        lines: bool,
        seeds: Sequence[tuple[int, int, int]] | None,
        told: Callable[[int], None],
    ) -> list[list[int]]:
        same = [[new_tokens] * len(prompts), [lines] * len(prompts)]
        drawn = [zlib.crc32(repr(seed).encode()) for seed in seeds] if seeds else [None] * len(prompts)
        columns = [list(map(list, prompts)), *same, drawn]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, REQUESTS, strict=True)]
        self._requests.append(pa.record_batch(arrays, schema=REQUESTS))
        return [[] for _ in prompts]

    def _scores(self, wordings: Sequence[tuple[Taught, int, int]]) -> dict[tuple[str, int, int], tuple[float, float]]:
        return {}


class Reader(Predictor):
    """Takes the continuations, token ids, in the order in which a `Recorder` recorded them. An answer ends before the
    first of `ends`, or with its line, as in `corsa.evaluation.generation`.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: EvaluationConfig,
        seed: int,
        found: pa.ChunkedArray,
        scores: Scores,
        ends: Iterable[int],
    ) -> None:
        super().__init__(None, encoder, config, torch.device("cpu"), batch=1, seed=seed)
        self._found, self._known = _lists(found), scores
        lines = newline_tokens(encoder.tokenizer)
        several = torch.zeros_like(lines)
        several[list(ends)] = True
        self._stops = (lines | several, several)

    def _continued(self, prompts: Sequence[Sequence[int]], new_tokens: int, lines: bool, *args: Any) -> list[list[int]]:
        stops = self.stops(lines).tolist()
        found = islice(self._found, len(prompts))
        return [list(takewhile(lambda token: not stops[token], answer)) for answer in found]

    def _scores(self, wordings: Sequence[tuple[Taught, int, int]]) -> dict[tuple[str, int, int], tuple[float, float]]:
        asked = [(t.edit.id, p, w) for t, p, w in wordings]
        return {key: self._known[key] for key in asked if key in self._known}


def _lists(column: pa.ChunkedArray) -> Iterator[list[int]]:
    """The values of a column of lists, of which few are Python objects at a time."""
    return (row for start in range(0, len(column), 4096) for row in column.slice(start, 4096).to_pylist())
