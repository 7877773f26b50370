"""The metrics on a table small enough to count by hand, and their uncertainty compared with scipy."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from synthetic_run import predictions

from corsa.config.evaluation import SHALLOW
from corsa.errors import CorsaError
from corsa.evaluation.metrics import METRICS, compute
from corsa.evaluation.uncertainty import Sums, interval
from corsa.report.findings import findings

# One line is one probe: kind, wording, then what the outputs match after each round it is asked in.
# n = new answer, o = old answer, b = both, . = neither.
HAND = """
method chain round part        kind        base | after
lora   A     1     evaluation  edit        .      n  n
lora   A     1     evaluation  paraphrase  .      n  o
lora   A     1     evaluation  paraphrase  o      n  n
lora   B     1     evaluation  paraphrase  .      n  .
lora   B     1     evaluation  paraphrase  .      .  n
lora   B     1     evaluation  neighbor    n      n  .
lora   C     1     update      edit        .      n
lora   C     1     update      paraphrase  o      o
lora   C     2     update      edit        .         n
lora   C     2     update      paraphrase  .         n
lora   C     2     update      paraphrase  o         b
"""


def hand(*, both: bool = False) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    counts: dict[tuple, int] = {}

    def add(method: str, trained: int, chain: str, learnt: int, part: str, kind: str, wording: int, mark: str) -> None:
        rows.append(
            {
                "method": method,
                "seed": 0,
                "trained": trained,
                "edit": f"{chain}/{learnt}",
                "chain": chain,
                "learnt": learnt,
                "part": part,
                "kind": kind,
                "probe": {"edit": 0, "paraphrase": 1, "neighbor": 2}[kind],
                "wording": wording,
                "draw": 0,
                "prompt": "?",
                "answer": "new",
                "target_old": "old",
                "output": {"n": "new", "o": "old", "b": "new old", ".": "other"}[mark],
                "logp_new": None if kind == "neighbor" else -1.0 if mark in "nb" else -5.0,
                "logp_old": None if kind == "neighbor" else -4.0,
                "words_new": mark in "nb",
                "words_old": mark in "ob",
                "matched_new": mark in "nb",
                "matched_old": mark in "ob",
                "exact_new": mark == "n",
                "exact_old": mark == "o",
            }
        )

    for line in HAND.strip().splitlines()[1:]:
        method, chain, learnt, part, kind, base, *after = line.split()
        key = (chain, learnt, kind)
        wording = counts[key] = counts.get(key, -1) + 1
        add("base", 0, chain, int(learnt), part, kind, wording, base)
        for trained, mark in enumerate(after, start=int(learnt)):
            for name in (method, "corsa") if both else (method,):
                add(name, trained, chain, int(learnt), part, kind, wording, mark)
    return pd.DataFrame(rows)


def values(result: dict[str, Any], method: str, number: int) -> dict[str, dict[str, Any]]:
    (row,) = [row for row in result["series"] if row["method"] == method and row["round"] == number]
    return row["metrics"]


def test_hand_made_table_after_the_last_round() -> None:
    result = compute(hand())
    lora = {name: entry["value"] for name, entry in values(result, "lora", 2).items()}
    assert lora == pytest.approx(
        {
            "edit_success": 1.0,  # A, C
            "generality": 4 / 6,  # A: o n, B: . n, C: n b
            "efficacy": 1.0,  # C: n b
            "forgetting": 2 / 3,  # of A n n, B n: A's first and B's first are lost
            "forgetting_relative": 1 / 3,  # 3 right, then 2 right
            "forgetting_points": 1 / 4,
            "retention": 2 / 6,  # A: o, C: b
            "activation": 1 / 2,  # C was revised, and its former answer was learnt (on the edit prompt): n b
            "activation_of_right": None,  # that answer was not given to the wording
            "multihop": None,  # none in the table
            "neighborhood": 0.0,
            "agreement": 0.0,
            "margin": (4 * 3 + 2 * -1) / 6,
            "logp_new": (4 * -1 + 2 * -5) / 6,
            "logp_old": -4.0,
            **dict.fromkeys(SHALLOW),  # none in the table
        }
    )
    counted = values(result, "lora", 2)
    assert (counted["generality"]["edits"], counted["generality"]["probes"]) == (3, 6)
    assert (counted["forgetting"]["edits"], counted["forgetting"]["probes"]) == (2, 3)
    assert counted["generality"]["rule"] == "contains"
    assert counted["margin"]["rule"] is None
    assert result["standing"] == "evaluation"
    assert result["rounds"] == [1, 2]
    assert [row["method"] for row in result["rows"]] == ["base", "lora"]
    assert {row["round"] for row in result["rows"]} == {2}


def test_after_the_first_round_nothing_can_be_forgotten() -> None:
    first = values(compute(hand()), "lora", 1)
    assert first["generality"]["value"] == pytest.approx(3 / 5)
    assert first["efficacy"]["value"] == first["generality"]["value"]
    assert first["forgetting"]["value"] is None
    assert first["forgetting"]["reason"] == "no fact learnt before round 1 is still valid"


def test_the_base_model_answers_the_facts_that_are_valid_after_each_round() -> None:
    result = compute(hand())
    first, last = values(result, "base", 1), values(result, "base", 2)
    assert first["retention"]["value"] == pytest.approx(2 / 5)  # A: o, C/1: o
    assert last["retention"]["value"] == pytest.approx(2 / 6)  # A: o, C/2: o
    assert last["neighborhood"]["value"] == 1.0
    assert last["forgetting"]["reason"] == "the base model is taught nothing"
    assert last["agreement"]["reason"] == "this is the base model"


def test_the_exact_rule_and_the_papers_protocol() -> None:
    strict = values(compute(hand(), rule="exact"), "lora", 2)
    assert strict["efficacy"]["value"] == 1 / 2
    assert strict["efficacy"]["rule"] == "exact"
    paper = values(compute(hand(), protocol="paper"), "lora", 2)
    assert paper["generality"]["value"] == pytest.approx(1 / 3)  # only the first wordings: o . n
    assert paper["forgetting"]["value"] == 1.0


def test_without_an_evaluation_set_every_earlier_fact_is_standing() -> None:
    table = hand().assign(part="update")
    result = compute(table)
    assert result["standing"] == "earlier"
    assert values(result, "lora", 2)["forgetting"]["value"] == pytest.approx(2 / 3)


def test_without_paraphrases_the_edit_prompts_are_counted() -> None:
    table = hand()
    result = compute(table[table.kind == "edit"])
    assert result["probe_kind"] == "edit"
    lora = values(result, "lora", 2)
    assert lora["efficacy"]["value"] == 1.0
    assert lora["forgetting"]["value"] == 0.0
    assert lora["generality"]["reason"] == "no paraphrase probes in this data"
    assert lora["neighborhood"]["reason"] == "no neighbor probes in this data"


def test_methods_with_the_same_answers_cannot_be_told_apart() -> None:
    result = compute(hand(both=True))
    assert {entry["metric"] for entry in result["comparisons"]} == set(METRICS) - {
        "multihop",
        "activation_of_right",
        *SHALLOW,
    }
    for entry in result["comparisons"]:
        assert (entry["difference"], entry["distinguishable"], entry["better"]) == (0.0, False, None)


def test_a_real_difference_is_told_and_attributed() -> None:
    names = ("forgetting", "efficacy")
    result = compute(predictions(chains=60, wordings=4, seeds=5), primary=names)
    found = {entry["metric"]: entry for entry in result["comparisons"]}
    assert {name for name, entry in found.items() if entry["primary"]} == set(names)
    assert (found["forgetting"]["a"], found["forgetting"]["b"]) == ("lora", "corsa")
    assert found["forgetting"]["difference"] > 0
    assert found["forgetting"]["better"] == "corsa"
    assert found["forgetting"]["low"] > 0
    assert found["forgetting"]["corrected"] < 0.05
    assert not found["efficacy"]["distinguishable"]
    assert 0 < found["efficacy"]["detectable"] < 0.5
    assert found["generality"]["high"] < 0  # equally certain, but not declared beforehand as a primary metric
    assert (found["generality"]["better"], found["generality"]["corrected"]) == (None, None)


def test_one_seed_compares_adapters_and_not_methods() -> None:
    result = compute(predictions(chains=60, wordings=4), primary=("forgetting",))
    for entry in result["comparisons"]:
        assert (entry["p"], entry["corrected"], entry["better"]) == (None, None, None)
    assert values(result, "lora", 3)["generality"]["interval"] == "facts"
    said = " ".join(findings(result))
    assert "compares these two adapters, not the methods" in said
    assert "better" not in said


def test_an_unknown_primary_metric_is_refused() -> None:
    with pytest.raises(CorsaError, match="did you mean 'forgetting'"):
        compute(hand(both=True), primary=("forgeting",))


def test_a_case_is_what_an_interval_takes_as_drawn() -> None:
    """All edits of a case get the same result here: counted separately they would look more certain than they are."""
    table = predictions(chains=40, rounds=1, methods=("lora",))
    by_fact = compute(table)
    copies = [
        table.assign(edit=table.edit + name, chain=table.chain + name, case=table.chain) for name in ("", "/b", "/c")
    ]
    by_case = compute(pd.concat(copies, ignore_index=True))
    blind = compute(pd.concat(copies, ignore_index=True).drop(columns="case"))
    fact, case, all_apart = (values(found, "lora", 1)["generality"] for found in (by_fact, by_case, blind))
    assert (case["low"], case["high"]) == pytest.approx((fact["low"], fact["high"]))
    assert (case["edits"], by_case["over"], by_fact["over"]) == (40, "cases", "facts")
    assert all_apart["high"] - all_apart["low"] < 0.7 * (fact["high"] - fact["low"])


def test_the_same_answers_under_another_seed_add_nothing() -> None:
    table = predictions(chains=12)
    twice = pd.concat([table, table[table.method != "base"].assign(seed=1)])
    once, pooled = (values(compute(data), "lora", 3)["generality"] for data in (table, twice))
    same = ("value", "low", "high", "edits")
    assert [pooled[name] for name in same] == pytest.approx([once[name] for name in same])
    assert (once["interval"], pooled["interval"]) == ("facts", "facts and seeds")
    assert once["seeds"] is None
    assert pooled["seeds"] == {"values": {"0": once["value"], "1": once["value"]}, "spread": 0.0}


def test_the_order_of_rows_does_not_matter_and_the_result_is_json() -> None:
    table = predictions(chains=8, seeds=2)
    result = compute(table)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    shuffled = compute(table.sample(frac=1, random_state=3))
    by_method = lambda result: sorted(result["series"], key=lambda row: (row["method"], row["round"]))  # noqa: E731
    assert by_method(shuffled) == by_method(result)


def test_a_method_that_stopped_early_is_null_with_a_reason() -> None:
    table = predictions(chains=6)
    result = compute(table[~((table.method == "lora") & (table.trained == 3))])
    assert values(result, "lora", 3)["generality"]["reason"] == "not asked after round 3"
    assert result["comparisons"] == []


def test_the_base_model_alone() -> None:
    table = predictions(chains=6, methods=())
    result = compute(table)
    assert result["methods"] == ["base"]
    assert values(result, "base", 3)["generality"]["value"] is not None


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (hand().iloc[:0], {}, "is empty"),
        (hand().drop(columns="learnt"), {}, "lacks the columns learnt"),
        (hand(), {"rule": "contain"}, "did you mean 'contains'"),
        (hand(), {"protocol": "papers"}, "did you mean 'paper'"),
    ],
)
def test_bad_input(table: pd.DataFrame, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CorsaError, match=message):
        compute(table, **options)


def test_intervals_agree_with_scipys_bootstrap() -> None:
    random = np.random.default_rng(5)
    asked = random.integers(1, 6, size=80).astype(float)
    right = random.binomial(asked.astype(int), 0.6).astype(float)
    ours = interval(Sums(right, asked), share=True)
    theirs = stats.bootstrap(
        (right, asked),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert ours.source == "facts"


def test_where_all_facts_agree_the_interval_is_the_exact_binomial_one() -> None:
    eight = Sums(np.full(8, 3.0), np.full(8, 3.0))
    assert interval(eight, share=True) == pytest.approx((0.025 ** (1 / 8), 1.0, "exact"))
    assert interval(eight, share=False) == (None, None, None)
    assert interval(Sums(np.array([1.0]), np.array([3.0])), share=True) == (None, None, None)
    assert interval(Sums(np.zeros(4), np.zeros(4)), share=True) == (None, None, None)


def test_fifty_thousand_rows_take_seconds() -> None:
    table = predictions(chains=1050, wordings=4)
    assert len(table) > 50_000
    started = time.perf_counter()
    compute(table)
    assert time.perf_counter() - started < 8  # 1.6 s on a quiet 2-core machine; the margin is for a busy one


def test_a_case_counts_if_any_wording_of_its_multi_hop_question_is_right() -> None:
    table = hand()
    template = table[(table.kind == "edit") & (table.trained == 1) & (table.chain == "A")].iloc[0]
    marks = {("A", 3): (False, True, False), ("B", 3): (False, False), ("B", 4): (True, True)}  # (chain, probe)
    rows = [
        template.to_dict()
        | {"chain": chain, "edit": f"{chain}/1", "kind": "multihop", "probe": probe, "wording": wording, "trained": 2}
        | {"matched_new": right, "logp_new": None, "logp_old": None}
        for (chain, probe), answers in marks.items()
        for wording, right in enumerate(answers)
    ]
    before = compute(table)["rows"]
    after = compute(pd.concat([table, pd.DataFrame(rows)], ignore_index=True))["rows"]
    (found,) = [row["metrics"] for row in after if row["method"] == "lora"]
    assert found["multihop"]["value"] == pytest.approx(2 / 3)  # two of three cases
    (known,) = [row["metrics"] for row in before if row["method"] == "lora"]
    assert known["multihop"]["reason"] == "no multihop probes in this data"
    for name in METRICS.keys() - {"multihop"}:  # nothing else counts them
        assert found[name]["value"] == known[name]["value"], name
