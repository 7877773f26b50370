"""Retrieval: facts that stand before each question, instead of a change of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.lora.routing import EmbeddingRouter
from corsa.models.encoding import Encoder

FACTS = "facts.parquet"
"""The file of a memory, among those of a round."""


class Fact(NamedTuple):
    """A fact in a memory: the id of its chain, its question and its answer."""

    chain: str
    question: str
    answer: str


@dataclass(frozen=True)
class Memory:
    """Facts that still hold, with one question each, from the oldest to the newest. `count`: how many of them stand
    before a question.
    """

    facts: tuple[Fact, ...]
    count: int

    def updated(self, facts: Sequence[Fact]) -> Memory:
        """With these facts added. A fact replaces an earlier one of its chain, and one with its question."""
        found: dict[str, Fact] = {}  # by chain
        for fact in [*self.facts, *facts]:
            found.pop(fact.chain, None)
            found[fact.chain] = fact
        latest = {fact.question: fact for fact in found.values()}
        return Memory(tuple(fact for fact in found.values() if latest[fact.question] is fact), self.count)

    def save(self, path: Path) -> None:
        """Write as Parquet, with `count` in the metadata of its schema."""
        table = pa.Table.from_pylist([fact._asdict() for fact in self.facts], _SCHEMA)
        pq.write_table(table.replace_schema_metadata({"count": json.dumps(self.count)}), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote."""
        table = pq.read_table(path)
        count = json.loads(table.schema.metadata[b"count"])
        return cls(tuple(Fact(**row) for row in table.to_pylist()), count)


_SCHEMA = pa.schema([(name, pa.string()) for name in Fact._fields])


class Retrieval:
    """Puts the nearest facts of a memory before questions: those whose questions have the largest cosine with it, by
    the embeddings of `EmbeddingRouter`. The nearest one comes last.

    Args:
        memory: the facts.
        model: the model that embeds questions, unedited.
        encoder: its tokenizer and template.
        batch: questions embedded together.
    """

    def __init__(self, memory: Memory, model: Any, encoder: Encoder, batch: int) -> None:
        self._memory, self._model, self._encoder, self._batch = memory, model, encoder, batch
        self._found: dict[str, str] = {}

    @cached_property
    def _router(self) -> EmbeddingRouter:
        asked = [[fact.question] for fact in self._memory.facts]  # one part for each fact
        return EmbeddingRouter(self._model, self._encoder, asked, self._batch)

    def __call__(self, questions: Sequence[str]) -> list[str]:
        """Each question with the nearest facts before it."""
        new = [question for question in dict.fromkeys(questions) if question not in self._found]
        if new and self._memory.facts:
            count = min(self._memory.count, len(self._memory.facts))
            nearest = self._router.scores(new).topk(count, dim=1).indices.tolist()  # (Q, count)
            for question, chosen in zip(new, nearest, strict=True):
                self._found[question] = self._text(question, [self._memory.facts[i] for i in reversed(chosen)])
        return [self._found.get(question, question) for question in questions]

    def _text(self, question: str, facts: Sequence[Fact]) -> str:
        """The text in place of the question. In the paper's template each fact is a pair of lines like the question's
        own; in a chat the facts stand before it in one turn.
        """
        if self._encoder.template == "qa":
            return "\nQ: ".join([*(f"{fact.question}\nA: {fact.answer}" for fact in facts), question])
        known = "\n".join(f"{fact.question} {fact.answer}" for fact in facts)
        return f"Facts:\n{known}\n\n{question}"
