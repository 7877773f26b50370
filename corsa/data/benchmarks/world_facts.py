"""`world_facts`: real facts, each with four successive values, in wordings of this project. It ships as
`world_facts.yaml`.

A fact becomes a chain of three updates (value i-1 -> value i). Its neighbors are two other subjects of the same
relation whose answer does not change, taken from the relation's pool by the fact's position.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise, zip_longest

import yaml
from pydantic import Field, ValidationError, field_validator

from corsa.config import Frozen
from corsa.config.bounded_yaml import read_yaml
from corsa.data.benchmarks import BadRecord, Source
from corsa.data.edit import Edit, FieldError, Question, Text, field_error
from corsa.data.text import folded
from corsa.errors import CorsaError


class Value(Frozen):
    """A value and its other names; a plain string in the file if it has none."""

    name: Text
    aliases: tuple[Text, ...] = ()


class Neighbor(Frozen):
    """A subject of the relation that no fact changes."""

    subject: Text
    answer: Text
    aliases: tuple[Text, ...] = ()


class Fact(Frozen):
    """A subject and its values, oldest first."""

    subject: Text
    values: tuple[Value, ...] = Field(min_length=4, max_length=4)

    @field_validator("values", mode="before")
    @classmethod
    def _named(cls, values: object) -> object:
        return (
            [{"name": item} if isinstance(item, str) else item for item in values]
            if isinstance(values, list)
            else values
        )


class Relation(Frozen):
    """A relation: its wordings, each with {} for the subject, and its facts."""

    name: Text
    prompt: Text
    paraphrases: tuple[Text, ...] = Field(min_length=1)
    neighbors: tuple[Neighbor, ...] = Field(min_length=2)
    facts: tuple[Fact, ...] = Field(min_length=1)

    @field_validator("prompt", "paraphrases")
    @classmethod
    def _has_place(cls, wordings: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for wording in (wordings,) if isinstance(wordings, str) else wordings:
            if wording.count("{}") != 1:
                raise ValueError(f"needs {{}} once, for the subject: {wording!r}")
        return wordings


class File(Frozen):
    """The whole file."""

    relations: tuple[Relation, ...] = Field(min_length=1)


def facts(source: Source, rounds: int | None = None) -> Iterator[list[Edit] | BadRecord]:
    """The facts, alternating between the relations, so that a small limit covers many relations.

    Raises CorsaError if the file does not have the format described here.
    """
    relations = _load(source).relations
    seen: set[str] = set()
    turns = zip_longest(*([(relation, i) for i in range(len(relation.facts))] for relation in relations))
    for relation, position in (item for turn in turns for item in turn if item is not None):
        fact = relation.facts[position]
        where = f"relation {relation.name}, fact [{position}] ({fact.subject})"
        chain = f"{source.prefix}/{relation.name}/{slug(fact.subject)}"
        if chain in seen:
            yield BadRecord(where, "subject", f"an earlier fact has the id {chain!r} too")
            continue
        seen.add(chain)
        try:
            edits = _chain(relation, position, chain)
            yield edits[:rounds] if rounds is None or len(edits) >= rounds else []
        except FieldError as error:
            yield BadRecord(where, error.field, error.reason)


def _load(source: Source) -> File:
    assert source.path is not None, "world_facts is always a file"
    try:
        return File.model_validate(read_yaml(source.path))
    except OSError as error:
        raise CorsaError(f"{source} cannot be read: {error.strerror}; is the installation whole?") from error
    except yaml.YAMLError as error:
        raise CorsaError(f"{source} is not YAML: {error}") from error
    except ValidationError as error:
        raise CorsaError(f"{source} is not a file of world facts: {field_error(error)}") from None


def _chain(relation: Relation, position: int, chain: str) -> list[Edit]:
    fact = relation.facts[position]
    neighbors = _neighbors(relation, position)
    return [
        Edit.build(
            id=f"{chain}/{round_}",
            chain=chain,
            round=round_,
            prompt=relation.prompt.replace("{}", fact.subject),
            subject=fact.subject,
            relation=relation.name,
            target_new=new.name,
            target_old=old.name,
            aliases_new=new.aliases,
            aliases_old=old.aliases,
            paraphrases=[wording.replace("{}", fact.subject) for wording in relation.paraphrases],
            neighbors=neighbors,
        )
        for round_, (old, new) in enumerate(pairwise(fact.values), start=1)
    ]


def _neighbors(relation: Relation, position: int) -> list[Question]:
    subject = folded(relation.facts[position].subject)
    pool = [neighbor for neighbor in relation.neighbors if folded(neighbor.subject) != subject]
    chosen = [pool[(2 * position + i) % len(pool)] for i in range(min(2, len(pool)))]
    return [(relation.prompt.replace("{}", item.subject), item.answer, item.aliases) for item in chosen]


def slug(text: str) -> str:
    """The text as a part of an id.

    >>> slug("São Paulo FC (men)")
    'sao-paulo-fc-men'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
