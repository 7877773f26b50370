"""What the metrics count: benchmarks without paraphrases, draws, displaced answers, forgetting of an update."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from synthetic_run import predictions

from corsa.editing.options import Gates
from corsa.editing.thresholds import judged
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.evaluation.prepared_predictions import check_columns
from corsa.report.facts import summary
from corsa.report.findings import findings
from corsa.report.paper_figures import differs
from corsa.report.update import told_forgotten
from corsa.report.update import update as told_update

PROBES = {"edit": 0, "paraphrase": 1, "neighbor": 2}


def table(lines: str, part: str = "update") -> pd.DataFrame:
    """One line is one wording: method, edit, chain, learnt, kind, and what the outputs match after rounds 1, 2, ...

    n = new answer, o = old answer, b = both, . = neither, - = not asked. The base model has one mark.
    """
    rows: list[dict[str, Any]] = []
    counts: dict[tuple[str, ...], int] = {}
    for line in lines.strip().splitlines():
        method, edit, chain, learnt, kind, *marks = line.split()
        key = (method, edit, kind)
        counts[key] = counts.get(key, -1) + 1
        for trained, mark in enumerate(marks, start=0 if method == "base" else 1):
            if mark == "-":
                continue
            given = {"new": mark in "nb", "old": mark in "ob"}
            rows.append(
                {"method": method, "seed": 0, "trained": trained, "edit": edit, "chain": chain, "learnt": int(learnt)}
                | {"part": part, "kind": kind, "probe": PROBES[kind], "wording": counts[key], "draw": 0}
                | {"prompt": "?", "answer": "new", "target_old": "old", "output": mark}
                | {"logp_new": None, "logp_old": None}
                | {f"{rule}_{which}": was for rule in ("words", "matched", "exact") for which, was in given.items()}
            )
    return pd.DataFrame(rows)


def values(result: dict[str, Any], method: str = "lora", number: int | None = None) -> dict[str, dict[str, Any]]:
    number = result["rounds"][-1] if number is None else number
    (row,) = [row for row in result["series"] if row["method"] == method and row["round"] == number]
    return row["metrics"]


# Benchmarks without paraphrases

INJECTED = """
lora known/1 known/1 1 edit       n n
lora known/1 known/1 1 paraphrase n .
lora known/2 known/2 1 edit       n n
lora known/2 known/2 1 paraphrase n n
lora facts/1 facts/1 2 edit       - n
lora facts/2 facts/2 2 edit       - .
"""


def test_a_benchmark_without_paraphrases_is_counted_on_its_edit_prompts() -> None:
    result = compute(table(INJECTED))
    found = values(result)
    assert found["efficacy"]["value"] == 1 / 2  # facts: one of its two edit prompts
    assert found["efficacy"]["reason"] is None
    assert found["forgetting"]["value"] == 1 / 2  # known: one of its two paraphrases, no edit prompt
    assert found["retention"]["probes"] == 4
    assert (result["probe_kind"], result["fallback"]) == ("paraphrase", ["facts"])
    assert "The edits facts/... have no paraphrases" in " ".join(findings(result))
    assert result["matrices"]["lora"][1][1] == {"value": 1 / 2, "edits": 2, "probes": 2}


def test_a_column_can_say_what_the_benchmarks_are() -> None:
    rows = table(INJECTED)
    one = compute(rows.assign(benchmark="all"))
    assert values(one)["efficacy"]["reason"] == "no fact was learnt in round 2"  # nothing of it has paraphrases
    assert one["fallback"] == []
    two = compute(rows.assign(benchmark=rows.edit.str[:5]))
    assert values(two)["efficacy"]["value"] == 1 / 2


def test_ids_without_a_benchmark_are_one() -> None:
    rows = table(INJECTED).assign(edit=lambda t: t.edit.str.replace("/", "-"))
    assert compute(rows)["fallback"] == []


def test_probes_that_were_not_asked_say_so() -> None:
    result = compute(table(INJECTED), protocol="paper", kinds=("edit", "paraphrase", "multihop"))
    assert "neighbor probes were not asked" in values(result)["neighborhood"]["reason"]
    assert values(result)["multihop"]["reason"] == "no multihop probes in this data"


def test_paraphrases_that_were_not_asked_are_not_said_to_be_missing() -> None:
    edits = table(INJECTED)
    edits = edits[edits.kind == "edit"]
    assert "This data has no paraphrases" in " ".join(findings(compute(edits)))
    said = " ".join(findings(compute(edits, kinds=("edit", "neighbor"))))
    assert "Paraphrases were not asked: the numbers are counted on the edit prompts" in said


# Draws


def test_draws_of_a_wording_are_repeated_measurements_of_it() -> None:
    first, second = table(INJECTED), table(INJECTED).assign(draw=1)
    changed = (second.edit == "known/2") & (second.kind == "paraphrase")
    for column in ("words_new", "matched_new", "exact_new"):
        second.loc[changed & (second.trained == 1), column] = False  # never right in its second draw
    drawn = compute(pd.concat([first, second]), protocol="authors")
    assert (drawn["draws"], compute(first)["draws"]) == (2, 1)
    found = values(drawn)
    once = values(compute(first, protocol="authors"))
    assert found["forgetting"]["value"] == pytest.approx(2 / 3)  # known/1 lost in both draws; known/2 kept in one
    assert found["generality"]["value"] == 1 / 2
    for name in ("generality", "efficacy"):
        assert found[name]["probes"] == once[name]["probes"]
        assert found[name]["edits"] == once[name]["edits"]


def test_identical_draws_change_neither_a_value_nor_its_interval() -> None:
    one = predictions(chains=12)
    four = pd.concat([one.assign(draw=n) for n in range(4)])
    alone, drawn = (values(compute(rows, protocol="authors")) for rows in (one, four))
    for name in ("generality", "forgetting", "efficacy", "retention"):
        for key in ("value", "low", "high", "edits", "probes"):
            assert drawn[name][key] == pytest.approx(alone[name][key]), (name, key)


# Old answers that were displaced

REVISED = """
lora t/A/1 t/A 1 edit       n - -
lora t/A/1 t/A 1 paraphrase n - -
lora t/A/1 t/A 1 paraphrase . - -
lora t/A/2 t/A 2 edit       - n n
lora t/A/2 t/A 2 paraphrase - n o
lora t/A/2 t/A 2 paraphrase - o n
lora t/B/1 t/B 1 edit       . - -
lora t/B/1 t/B 1 paraphrase . - -
lora t/B/2 t/B 2 edit       - n n
lora t/B/2 t/B 2 paraphrase - o o
"""

TAUGHT_ONCE = """
lora t/C/1 t/C 1 edit       n n o
lora t/C/1 t/C 1 paraphrase n o o
"""


def test_of_revised_facts_the_former_answer_is_the_displaced_one() -> None:
    """A's former answer was learnt in round 1. B's was not, so none of its answers was displaced."""
    result = compute(table(REVISED))
    assert values(result, number=1)["activation"]["reason"] == "no old answer had been displaced by round 1"
    second, third = values(result, number=2), values(result, number=3)
    assert (second["activation"]["value"], third["activation"]["value"]) == (1 / 2, 1 / 2)
    assert (second["activation_of_right"]["value"], third["activation_of_right"]["value"]) == (0, 1)
    assert (third["activation"]["edits"], third["activation"]["probes"]) == (1, 2)


def test_facts_that_were_never_overwritten_do_not_count_among_revised_ones() -> None:
    both = pd.concat([table(REVISED), table(TAUGHT_ONCE, part="evaluation")])
    assert values(compute(both))["activation"] == values(compute(table(REVISED)))["activation"]
    assert values(compute(both))["forgetting"]["value"] == 1  # these are the current answers


def test_without_revised_facts_those_count_whose_new_answer_took() -> None:
    never = "lora t/D/1 t/D 1 edit o o o\nlora t/D/1 t/D 1 paraphrase o o o"
    undecided = "lora t/E/1 t/E 1 edit b o o\nlora t/E/1 t/E 1 paraphrase . o o"
    more = "lora t/F/1 t/F 1 edit n n n\nlora t/F/1 t/F 1 paraphrase . . n"
    result = compute(table("\n".join([TAUGHT_ONCE.strip(), never, undecided, more])))
    assert values(result, number=1)["activation"]["value"] is None
    second = values(result, number=2)
    assert (second["activation"]["value"], second["activation"]["edits"]) == (1 / 2, 2)  # C and F
    assert (second["activation_of_right"]["value"], second["activation_of_right"]["edits"]) == (1, 1)
    assert values(compute(table(INJECTED)))["activation"]["value"] == 0


def test_the_base_model_has_nothing_displaced() -> None:
    result = compute(pd.concat([table(REVISED), table("base t/A/2 t/A 2 paraphrase o")]))
    assert values(result, "base")["activation"]["reason"] == "the base model is taught nothing"


# Forgetting of an update of `corsa edit`


def update() -> pd.DataFrame:
    """8 current facts: 15 questions were right when taught (8 as taught, 7 in other wordings); 11 of them are lost."""
    lines = []
    for fact in range(8):
        lines.append(f"corsa 1/f/{fact} 1/f/{fact} 1 edit n {'.' if fact < 5 else 'n'}")
        if fact < 7:
            lines.append(f"corsa 1/f/{fact} 1/f/{fact} 1 paraphrase n {'.' if fact < 6 else 'n'}")
    lines += [
        "corsa 1/f/7 1/f/7 1 paraphrase . n",
        "corsa 2/g/1 2/g/1 2 edit - n",
        "corsa 2/g/1 2/g/1 2 paraphrase - n",
    ]
    return table("\n".join(lines))


def test_an_update_counts_taught_questions_and_other_wordings_and_names_both() -> None:
    result = compute(update(), rule="words", taught_questions=True)
    entry = values(result, "corsa")["forgetting"]
    assert (entry["value"], entry["edits"], entry["probes"]) == (pytest.approx(11 / 15), 8, 15)
    counts = {"facts": 8, "taught": {"right": 8, "lost": 5}, "other": {"right": 7, "lost": 6}}
    assert result["forgotten"] == {"corsa": counts}
    (sentence,) = told_forgotten(result)
    for part in ("11 of 15", "73 %", "5 of 8 to questions as taught", "6 of 7 to other wordings", "8 facts"):
        assert part in sentence
    found = told_update(result, update())
    assert sentence in summary(result, found)
    assert "11 of 15 earlier answers lost" in found["headline"]
    assert "questions as taught" in result["definitions"]["forgetting"]["text"]
    (verdict,) = judged(Gates(max_forgetting=0.73), result)
    assert not verdict.passed
    (verdict,) = judged(Gates(max_forgetting=0.74), result)
    assert verdict.passed


def test_the_paper_s_scenarios_count_other_wordings_alone() -> None:
    result = compute(update(), rule="words")
    entry = values(result, "corsa")["forgetting"]
    assert (entry["value"], entry["probes"]) == (pytest.approx(6 / 7), 7)
    assert result["forgotten"] == {}
    assert list(told_forgotten(result)) == []
    assert "as taught" not in result["definitions"]["forgetting"]["text"]


# Rules and protocols of a table


def test_each_rule_reads_its_own_columns() -> None:
    rows = table(INJECTED).assign(words_new=False, exact_new=True)
    assert [values(compute(rows, rule=rule))["edit_success"]["value"] for rule in ("words", "contains", "exact")] == [
        0,
        3 / 4,
        1,
    ]


@pytest.mark.parametrize("column", ["words_new", "words_old", "draw"])
def test_a_table_of_an_earlier_version_is_named_as_such(column: str) -> None:
    old = table(INJECTED).drop(columns=column)
    with pytest.raises(CorsaError, match=f"lacks the columns {column}: an earlier version wrote it"):
        compute(old)
    with pytest.raises(CorsaError, match=f"adapters/a lacks the columns {column}"):
        check_columns(old.columns, "adapters/a")


def test_two_empty_answers_do_not_agree() -> None:
    rows = table(
        "base f/1 f/1 1 neighbor n\nlora f/1 f/1 1 neighbor n\nbase f/2 f/2 1 neighbor .\nlora f/2 f/2 1 neighbor ."
    )
    assert values(compute(rows))["agreement"]["value"] == 1
    silent = rows.assign(output="")
    assert values(compute(silent))["agreement"]["value"] is None
    half = rows.assign(output=rows.output.where(rows.edit == "f/1", ""))
    assert (values(compute(half))["agreement"]["value"], values(compute(half))["agreement"]["probes"]) == (1, 1)


def test_the_page_says_what_differs_from_the_paper_s_protocol() -> None:
    authors = compute(table(INJECTED), rule="contains", protocol="authors")
    assert differs(authors) == ""
    for other in (
        compute(table(INJECTED), rule="words"),
        compute(table(INJECTED), rule="contains", protocol="paper"),
        compute(table(INJECTED), rule="exact", protocol="authors"),
    ):
        assert f"protocol “{other['protocol']}” and the rule “{other['rule']}”" in differs(other)
