"""Splits a benchmark into parts, one per adapter, and describes each part in words (paper, Table 8)."""

from __future__ import annotations

from collections.abc import Sequence

from corsa.data.edit import Edit
from corsa.errors import CorsaError

_LONGEST = 240
"""Maximum characters of a description, so that ten descriptions fit into one prompt of a small model."""


def split(edits: Sequence[Edit], parts: int) -> list[list[Edit]]:
    """Split edits into `parts` parts of about equal size. Edits of one relation stay together where possible, so that
    parts differ in content. A chain is never split. Within a part the edits keep their order.

    Raises:
        CorsaError: fewer chains than parts, or fewer than two parts.
    """
    chains: dict[str, list[Edit]] = {}
    for edit in edits:
        chains.setdefault(edit.chain, []).append(edit)
    if not 2 <= parts <= len(chains):
        raise CorsaError(f"{len(chains)} facts cannot be split in {parts} parts: give --parts 2 to {len(chains)}")
    relations: dict[str, list[list[Edit]]] = {}
    for chain in chains.values():
        relations.setdefault(chain[0].relation, []).append(chain)
    ordered = [chain for group in relations.values() for chain in group]
    bounds = [round(i * len(ordered) / parts) for i in range(parts + 1)]
    homes = {chain[0].chain: p for p in range(parts) for chain in ordered[bounds[p] : bounds[p + 1]]}
    found: list[list[Edit]] = [[] for _ in range(parts)]
    for edit in edits:
        found[homes[edit.chain]].append(edit)
    return found


def describe(edits: Sequence[Edit]) -> str:
    """One line about a part, made without a model: its relations, if they are words, and some subjects of each."""
    subjects: dict[str, list[str]] = {}
    for edit in edits:
        if edit.subject:
            subjects.setdefault(edit.relation, []).append(edit.subject)
    clauses = []
    for relation, named in subjects.items():
        some = ", ".join(list(dict.fromkeys(named))[:4])
        words = relation.replace("_", " ") if relation and not any(c.isdigit() for c in relation) else "questions"
        clauses.append(f"{words} about {some}")
    text = "; ".join(clauses) or "; ".join(dict.fromkeys(edit.prompt for edit in edits))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3].rstrip() + "..."
