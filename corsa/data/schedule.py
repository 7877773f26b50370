"""Assigns edits to rounds: the temporal scenario (paper, Section 4.3).

Chains of successive updates are split into an update set and an evaluation set. Round 1 teaches the first update of
both. Later rounds revise only the update set, so losses in the evaluation set are forgetting. The edits of a benchmark
without chains are divided over the rounds: each round teaches new facts, and losses in the earlier ones are forgetting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from corsa.config.evaluation import RecheckConfig
from corsa.config.steps import RoundsConfig
from corsa.data.edit import Edit
from corsa.errors import CorsaError

ROUNDS = pa.schema([("edit", pa.string()), ("chain", pa.string()), ("learnt", pa.int32()), ("part", pa.string())])
"""The schedule: one row per taught edit. `learnt` is its round, `part` is "update" or "evaluation"."""


class Placed(NamedTuple):
    """What decides about the round of an edit (`corsa.data.edit.Edit`)."""

    id: str
    chain: str
    round: int
    case: str


PLACED = Placed._fields
"""The columns of a table of edits that `placed` reads."""


def placed(edits: pa.Table) -> list[Placed]:
    """The rows of a table of edits."""
    return [Placed(*row) for row in zip(*(edits[name].to_pylist() for name in PLACED), strict=True)]


def assign(edits: Sequence[Edit | Placed], config: RoundsConfig) -> pa.Table:
    """The schedule (`ROUNDS`) of these edits. Each round keeps the order of the benchmark.

    Raises:
        CorsaError: there are fewer facts than rounds, and each round needs its own facts.
    """
    temporal = any(e.round > 1 for e in edits)
    rows = _temporal(edits, config) if temporal else _divided(edits, config)
    for row in rows:
        row["learnt"] += config.first - 1
    return pa.Table.from_pylist(rows, schema=ROUNDS)


def _temporal(edits: Sequence[Edit | Placed], config: RoundsConfig) -> list[dict[str, Any]]:
    chains = list(dict.fromkeys(e.chain for e in edits))
    order = [chains[i] for i in np.random.default_rng(config.split_seed).permutation(len(chains))]
    count = round(len(chains) * config.update_share)
    if 0 < config.update_share < 1 and len(chains) > 1:  # neither set may be empty
        count = min(max(count, 1), len(chains) - 1)
    update = set(order[:count])
    revised = set(order[: round(count * config.fraction)])
    return [
        {"edit": e.id, "chain": e.chain, "learnt": e.round, "part": "update" if e.chain in update else "evaluation"}
        for e in edits
        if e.round == 1 or (e.round <= config.rounds and e.chain in revised)
    ]


def _divided(edits: Sequence[Edit | Placed], config: RoundsConfig) -> list[dict[str, Any]]:
    cases: dict[str, list[Edit | Placed]] = {}  # edits of a case are taught together, so a case is never split
    for edit in edits:
        cases.setdefault(edit.case or edit.chain, []).append(edit)
    if len(cases) < config.rounds:
        raise CorsaError(
            f"{len(cases)} edits cannot be divided over {config.rounds} rounds: "
            f"set --rounds {len(cases)} or less, or raise --limit"
        )
    parts = np.array_split(np.arange(len(cases)), config.rounds)
    listed = list(cases.values())
    return [
        {"edit": edit.id, "chain": edit.chain, "learnt": r + 1, "part": "update"}
        for r, part in enumerate(parts)
        for i in part
        for edit in listed[i]
    ]


def taught_in(schedule: pa.Table, round_: int) -> list[str]:
    """Ids of the edits that a round teaches."""
    return [row["edit"] for row in schedule.to_pylist() if row["learnt"] == round_]


def held_before(schedule: pa.Table, round_: int) -> list[dict[str, Any]]:
    """The facts that earlier rounds taught and that a round does not revise: what it must not lose."""
    return [row for row in valid_after(schedule, round_) if row["learnt"] < round_]


def valid_after(schedule: pa.Table, round_: int) -> list[dict[str, Any]]:
    """The facts that are valid after a round: for each chain, the row of its latest edit so far."""
    latest: dict[str, dict[str, Any]] = {}
    for row in schedule.to_pylist():
        if row["learnt"] <= round_ and row["learnt"] >= latest.setdefault(row["chain"], row)["learnt"]:
            latest[row["chain"]] = row
    return list(latest.values())


def rechecked(
    facts: Sequence[dict[str, Any]], round_: int, recheck: RecheckConfig | None
) -> list[tuple[dict[str, Any], float]]:
    """The facts that are asked after a round, each with the number of facts that it stands for.

    Those that the round teaches are all asked. Of the earlier ones a simple random sample without replacement is, which
    depends on the seed, the round and the chains, and on nothing else.

    Args:
        facts: that are valid after the round (`valid_after`).
        round_: the round.
        recheck: the sample; None: all facts are asked.
    """
    earlier = sorted(fact["chain"] for fact in facts if fact["learnt"] < round_)
    if recheck is None or len(earlier) <= recheck.facts:
        return [(fact, 1.0) for fact in facts]
    drawn = np.random.default_rng([recheck.seed, round_]).choice(len(earlier), recheck.facts, replace=False)
    weights = dict.fromkeys((earlier[i] for i in drawn), len(earlier) / recheck.facts)
    weights |= {fact["chain"]: 1.0 for fact in facts if fact["learnt"] == round_}
    return [(fact, weights[fact["chain"]]) for fact in facts if fact["chain"] in weights]
