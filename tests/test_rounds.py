"""Which round teaches which edit, and which facts must be known after each round."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from corsa.config.steps import RoundsConfig
from corsa.data.edit import Edit
from corsa.data.schedule import ROUNDS, assign, taught_in, valid_after
from corsa.errors import CorsaError


def chains(count: int, updates: int = 3) -> list[Edit]:
    """Chains of updates, one after the other."""
    return [
        Edit.build(
            id=f"c{c}/{r}", chain=f"c{c}", round=r, prompt=f"Who leads {c}?", target_new=f"v{r}", target_old=f"v{r - 1}"
        )
        for c in range(count)
        for r in range(1, updates + 1)
    ]


def facts(count: int) -> list[Edit]:
    return [Edit.build(id=f"f{i}", prompt=f"Who leads {i}?", target_new="a", target_old="b") for i in range(count)]


def rows(edits: list[Edit], **fields: Any) -> list[dict[str, Any]]:
    table = assign(edits, RoundsConfig(**fields))
    assert table.schema == ROUNDS
    return table.to_pylist()


def parts(found: list[dict[str, Any]]) -> dict[str, str]:
    """Chain -> part; no chain is in two parts."""
    assert len({(row["chain"], row["part"]) for row in found}) == len({row["chain"] for row in found})
    return {row["chain"]: row["part"] for row in found}


def test_round_1_teaches_all_and_later_rounds_revise_the_update_set() -> None:
    found = rows(chains(10), rounds=3)
    part = parts(found)
    assert Counter(part.values()) == {"update": 5, "evaluation": 5}
    for round_ in (1, 2, 3):
        taught = [row for row in found if row["learnt"] == round_]
        assert {row["chain"] for row in taught} == {c for c, p in part.items() if round_ == 1 or p == "update"}
        assert all(row["edit"] == f"{row['chain']}/{round_}" for row in taught)
    assert [row["edit"] for row in found] == [e.id for e in chains(10) if e.id in {row["edit"] for row in found}]


def test_the_split_follows_from_its_seed() -> None:
    assert rows(chains(10)) == rows(chains(10))
    splits = {tuple(parts(rows(chains(10), split_seed=seed)).items()) for seed in range(5)}
    assert len(splits) > 1


def test_the_split_does_not_depend_on_how_many_rounds_are_taken() -> None:
    assert parts(rows(chains(10), rounds=2)) == parts(rows(chains(10), rounds=3))
    assert {row["learnt"] for row in rows(chains(10), rounds=2)} == {1, 2}


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.3, 3), (0.01, 1), (0.99, 9), (0.0, 0), (1.0, 10)])
def test_both_sets_hold_something_unless_one_is_asked_to_be_empty(share: float, expected: int) -> None:
    assert Counter(parts(rows(chains(10), update_share=share)).values())["update"] == expected


def test_a_fraction_of_the_update_set_is_revised() -> None:
    found = rows(chains(20), fraction=0.3)
    part = parts(found)
    revised = {row["chain"] for row in found if row["learnt"] == 2}
    assert len(revised) == 3
    assert {row["chain"] for row in found if row["learnt"] == 3} == revised
    assert all(part[c] == "update" for c in revised)
    assert Counter(part.values()) == {"update": 10, "evaluation": 10}
    assert revised < {row["chain"] for row in rows(chains(20), fraction=0.8) if row["learnt"] == 2}
    assert not [row for row in rows(chains(20), fraction=0.0) if row["learnt"] > 1]


def test_facts_without_chains_are_divided_over_the_rounds() -> None:
    found = rows(facts(10), rounds=3)
    assert [row["edit"] for row in found] == [f"f{i}" for i in range(10)]
    assert [row["learnt"] for row in found] == [1] * 4 + [2] * 3 + [3] * 3
    assert {row["part"] for row in found} == {"update"}


def test_one_round_teaches_everything() -> None:
    assert [row["learnt"] for row in rows(facts(5), rounds=1)] == [1] * 5
    first = [e for e in chains(5) if e.round == 1]  # a chain benchmark, read for one round
    assert [row["edit"] for row in rows(first, rounds=1)] == [e.id for e in first]


def test_fewer_facts_than_rounds_are_refused() -> None:
    with pytest.raises(CorsaError, match="2 edits cannot be divided over 3 rounds: set --rounds 2 or less"):
        assign(facts(2), RoundsConfig(rounds=3))
    assert len(rows(facts(3), rounds=3)) == 3


def test_taught_in_names_a_round_s_edits_in_the_benchmark_s_order() -> None:
    schedule = assign(chains(4), RoundsConfig())
    everything = [taught_in(schedule, r) for r in (1, 2, 3)]
    assert everything[0] == ["c0/1", "c1/1", "c2/1", "c3/1"]
    assert [len(ids) for ids in everything] == [4, 2, 2]
    assert sorted(itertools.chain(*everything)) == sorted(schedule["edit"].to_pylist())
    assert taught_in(schedule, 4) == []


def test_a_fact_stands_as_it_was_last_taught() -> None:
    schedule = assign(chains(4), RoundsConfig())
    part = parts(schedule.to_pylist())
    for round_ in (1, 2, 3):
        standing = {row["chain"]: row for row in valid_after(schedule, round_)}
        assert set(standing) == set(part), "no fact is left out"
        for c, row in standing.items():
            expected = round_ if part[c] == "update" else 1
            assert (row["learnt"], row["edit"], row["part"]) == (expected, f"{c}/{expected}", part[c])
    assert valid_after(schedule, 0) == []


def test_facts_not_taught_yet_do_not_stand() -> None:
    schedule = assign(facts(6), RoundsConfig(rounds=3))
    assert [[row["edit"] for row in valid_after(schedule, r)] for r in (1, 2, 3)] == [
        ["f0", "f1"],
        ["f0", "f1", "f2", "f3"],
        ["f0", "f1", "f2", "f3", "f4", "f5"],
    ]


def test_what_stands_does_not_depend_on_the_order_of_the_rows() -> None:
    schedule = assign(chains(4), RoundsConfig())
    backwards = schedule.take(list(range(len(schedule)))[::-1])
    assert {row["edit"] for row in valid_after(backwards, 2)} == {row["edit"] for row in valid_after(schedule, 2)}
