"""A sample of the earlier facts instead of all: which are asked, and what it says about those that are not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy import stats
from test_update_plan import ACME, OLD, adapter, drafts, facts_file, options

from corsa.config.evaluation import RecheckConfig
from corsa.config.steps import RoundConfig, Shown
from corsa.data.schedule import ROUNDS, rechecked
from corsa.editing.history import join
from corsa.editing.options import EvaluateOptions, Gates, differences
from corsa.editing.plan import plan_edit, plan_evaluation
from corsa.editing.thresholds import judged
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.evaluation.predict import PREDICTIONS
from corsa.evaluation.uncertainty import Sums, interval, sample_interval
from corsa.experiments.reported import reported
from corsa.report.update import told_forgotten

EARLIER, NEW = 300, 20
NOTHING = Sums(np.zeros(0), np.zeros(0))


def standing(earlier: int = EARLIER, new: int = NEW) -> list[dict[str, Any]]:
    """Facts of two rounds, in the form of the schedule."""
    return [
        {"edit": f"e{i}", "chain": f"c{i}", "learnt": 1 if i < earlier else 2, "part": "update"}
        for i in range(earlier + new)
    ]


def test_new_facts_are_all_asked_and_a_sample_of_the_earlier_ones_stands_for_the_rest() -> None:
    found = rechecked(standing(), 2, RecheckConfig(facts=40))
    assert [f["chain"] for f, weight in found if weight == 1.0] == [f"c{i}" for i in range(EARLIER, EARLIER + NEW)]
    assert [weight for _, weight in found if weight != 1.0] == [EARLIER / 40] * 40
    for all_of_them in (None, RecheckConfig(facts=EARLIER)):
        assert rechecked(standing(), 2, all_of_them) == [(fact, 1.0) for fact in standing()]


def test_the_draw_follows_from_seed_and_round_and_not_from_the_order() -> None:
    def drawn(round_: int = 2, seed: int = 0, backwards: bool = False) -> set[str]:
        facts = standing()[:: -1 if backwards else 1]
        return {f["chain"] for f, weight in rechecked(facts, round_, RecheckConfig(facts=40, seed=seed)) if weight > 1}

    assert drawn() == drawn(backwards=True)
    assert len({frozenset(drawn(seed=seed)) for seed in range(5)}) == 5
    assert drawn(round_=3) != drawn()  # each update draws anew
    often = Counter(chain for seed in range(400) for chain in drawn(seed=seed))
    low, high = stats.binom.interval(1 - 1e-6, 400, 40 / EARLIER)
    assert len(often) == EARLIER
    assert low <= min(often.values()) <= max(often.values()) <= high


@pytest.mark.parametrize(("wrong", "of", "drawn"), [(0, 600, 60), (0, 90, 80), (600, 600, 60)])
def test_where_the_sample_agrees_the_bound_is_the_exact_one(wrong: int, of: int, drawn: int) -> None:
    value = np.full(drawn, float(wrong > 0))
    found = sample_interval(NOTHING, Sums(value, np.ones(drawn)), of / drawn, share=True)
    assert found.source == "sample"
    assert found.low is not None
    assert found.high is not None
    most = round((found.high if not wrong else 1 - found.low) * of)
    # with one more that differs, the chance that none of them is drawn falls below 2.5 %
    assert stats.hypergeom.cdf(0, of, most, drawn) >= 0.025 > stats.hypergeom.cdf(0, of, most + 1, drawn)


@pytest.mark.parametrize(("share", "drawn"), [(0.01, 100), (0.03, 200), (0.1, 100), (0.1, 400), (0.5, 60)])
def test_the_interval_covers_what_asking_all_would_give(share: float, drawn: int) -> None:
    """Facts of four wordings, which are lost together more often than apart; 600 of them are earlier."""
    of, times, random = 600, 1500, np.random.default_rng(drawn)
    level = random.beta(share, 1 - share, of)
    lost, right = random.binomial(4, level).astype(float), np.full(of, 4.0)
    truth = lost.sum() / right.sum()
    missed = {"low": 0, "high": 0}
    for _ in range(times):
        chosen = random.choice(of, drawn, replace=False)
        found = sample_interval(NOTHING, Sums(lost[chosen], right[chosen]), of / drawn, share=True)
        assert found.low is not None
        assert found.high is not None
        missed["low"] += truth < found.low
        missed["high"] += truth > found.high
    assert sum(missed.values()) / times < 0.07
    assert missed["high"] / times < 0.04  # the end that --max-forgetting judges


def test_it_is_narrower_than_the_interval_over_facts_the_more_of_them_are_asked() -> None:
    lost = np.array([1.0, 0, 0, 0, 1, 0, 0, 0, 0, 0] * 10)
    sums = Sums(lost, np.ones(100))
    facts = interval(sums, share=True)
    widths = [
        found.high - found.low
        for weight in (1.1, 2.0, 10.0, 1e6)
        if (found := sample_interval(NOTHING, sums, weight, share=True)).high is not None and found.low is not None
    ]
    assert widths == sorted(widths)
    assert facts.high is not None
    assert facts.low is not None
    assert widths[-1] == pytest.approx(facts.high - facts.low, rel=1e-4)


def table(recheck: RecheckConfig | None = None) -> pd.DataFrame:
    """Two rounds. All facts are right when learnt; every eighth earlier one is wrong now, and every second new one."""
    rows = []

    def ask(method: str, trained: int, fact: dict[str, Any], right: bool, weight: float) -> None:
        for kind, wordings in (("edit", 1), ("paraphrase", 2)):
            for wording in range(wordings):
                rows.append(
                    {"method": method, "seed": 0, "trained": trained, "kind": kind, "probe": wordings - 1}
                    | {"edit": fact["edit"], "chain": fact["chain"], "learnt": fact["learnt"], "part": "update"}
                    | {"wording": wording, "draw": 0, "prompt": "?", "answer": "new", "target_old": "old"}
                    | {"output": "new" if right else "x", "logp_new": -1.0, "logp_old": -2.0, "weight": weight}
                    | dict.fromkeys(("words_new", "matched_new", "exact_new"), right)
                    | dict.fromkeys(("words_old", "matched_old", "exact_old"), False)
                )

    for fact in standing():
        if fact["learnt"] == 1:
            ask("lora", 1, fact, right=True, weight=1.0)
    for fact, weight in rechecked(standing(), 2, recheck):
        number = int(fact["chain"][1:])
        ask("base", 0, fact, right=False, weight=weight)
        ask("lora", 2, fact, right=bool(number % 8 if fact["learnt"] == 1 else number % 2), weight=weight)
    return pd.DataFrame(rows)


def measured(recheck: RecheckConfig | None = None) -> dict[str, Any]:
    return compute(table(recheck), rule="words", taught_questions=True)


def test_values_over_all_facts_are_estimated_from_the_sample() -> None:
    """Against the values of the same table with every fact asked."""
    whole = measured()
    true = {name: entry["value"] for name, entry in whole["rows"][-1]["metrics"].items()}
    assert (whole["recheck"], whole["rows"][-1]["metrics"]["forgetting"]["interval"]) == (None, "facts")
    assert true["edit_success"] == pytest.approx(1 - (38 + 10) / 320)  # 38 of 300, 10 of 20
    drawn: dict[str, list[dict[str, Any]]] = {}
    for seed in range(60):
        found = measured(RecheckConfig(facts=60, seed=seed))
        assert found["recheck"] == {"asked": 60, "of": 300}
        for name in ("edit_success", "generality", "forgetting"):
            drawn.setdefault(name, []).append(found["rows"][-1]["metrics"][name])
    for name, entries in drawn.items():
        assert all(entry["interval"] == "sample" for entry in entries)
        assert np.mean([entry["value"] for entry in entries]) == pytest.approx(true[name], abs=0.012)
        assert sum(entry["low"] <= true[name] <= entry["high"] for entry in entries) >= 54
    plain = compute(table(RecheckConfig(facts=60)).drop(columns="weight"), rule="words")  # new facts count too much
    assert plain["rows"][-1]["metrics"]["edit_success"]["value"] < true["edit_success"] - 0.03


def test_the_report_says_how_far_all_facts_can_be() -> None:
    metrics = measured(RecheckConfig(facts=60))
    counts, sample = told_forgotten(metrics)
    entry = metrics["rows"][-1]["metrics"]["forgetting"]
    assert "(60 facts)" in counts
    assert "Of 300 earlier facts a random sample of 60 was asked." in sample
    assert f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f} %" in sample
    assert len(list(told_forgotten(measured()))) == 1
    last = {row["method"]: row["metrics"]["edit_success"] for row in metrics["rows"]}
    assert (last["base"]["value"], last["base"]["interval"]) == (0.0, "sample")
    before = next(row for row in metrics["series"] if (row["method"], row["round"]) == ("base", 1))
    assert before["metrics"]["edit_success"]["reason"] == "not asked after round 1"


def test_gates_judge_the_worse_end_of_the_interval() -> None:
    entry = {"value": 0.08, "low": 0.05, "high": 0.12, "interval": "sample"}
    success = {"value": 0.9, "low": 0.86, "high": 0.93, "interval": "sample"}
    metrics = {"rows": [{"metrics": {"forgetting": entry, "edit_success": success, "generality": success}}]}

    def passed(**gates: float) -> bool:
        (verdict,) = judged(Gates.model_validate(gates), metrics)
        return verdict.passed

    assert [passed(max_forgetting=bound) for bound in (0.1, 0.119, 0.12)] == [False, False, True]
    assert [passed(min_success=bound) for bound in (0.86, 0.87, 0.9)] == [True, False, False]
    (verdict,) = judged(Gates(max_forgetting=0.1), metrics)
    assert str(verdict) == ("--max-forgetting 0.1: NOT PASSED (8.0 % by a sample, over all facts at most 12.0 %)")
    entry["interval"] = "facts"  # all facts asked: their value decides, as before
    assert passed(max_forgetting=0.1)


def test_the_sample_is_part_of_the_identity_and_the_base_model_is_asked_the_same(tmp_path: Path) -> None:
    before = join([], drafts(tmp_path, OLD, {**OLD, "prompt": "Who leads Oz?"}), 1, {})
    line = adapter(tmp_path / "january", *before)
    facts_file(tmp_path, {**ACME, "prompt": "Who leads Initech?", "target_old": "x"})

    def planned(**more: Any) -> Any:
        return plan_edit(options(tmp_path, adapter=str(line), **more))

    plain, sample, other = planned(), planned(recheck=1), planned(recheck=1, recheck_seed=1)
    assert len({one.round.fingerprint for one in (plain, sample, other)}) == 3
    assert planned(recheck=1).report.fingerprint == sample.report.fingerprint
    assert "recheck" not in plain.round.config.canonical()
    assert isinstance(sample.round.config, RoundConfig)
    base = sample.report.inputs[sample.report.config.canonical()["shown"][0]["answers"]]
    assert base.config.canonical()["recheck"] == sample.round.config.canonical()["recheck"] == {"facts": 1, "seed": 0}
    assert (base.config.canonical()["round"], base.inputs["schedule"]) == (2, sample.round.inputs["schedule"])
    assert "--recheck 1" in sample.report.config.canonical()["command"]
    words = " ".join(differences(options(tmp_path, recheck=3, recheck_seed=2)))
    assert "--recheck 3 --recheck-seed 2" in words


def test_only_what_an_adapter_was_taught_can_be_sampled(tmp_path: Path) -> None:
    path = str(facts_file(tmp_path, OLD))
    with pytest.raises(CorsaError, match="--recheck draws among the facts that an adapter was taught"):
        plan_evaluation(EvaluateOptions(edits=path, recheck=5))
    line = adapter(tmp_path / "january", *join([], drafts(tmp_path, OLD), 1, {}))
    _, report = plan_evaluation(EvaluateOptions(adapter=str(line), recheck=5))
    assert any(step.config.canonical().get("recheck") for step in report.inputs.values())


def test_answers_of_an_earlier_version_are_reported_beside_those_of_a_sample(tmp_path: Path) -> None:
    rows = pa.Table.from_pandas(table(RecheckConfig(facts=60))[list(PREDICTIONS.names)], schema=PREDICTIONS)
    edited = rows.filter(pc.field("method") == "lora")
    pq.write_table(edited.filter(pc.field("trained") == 1).drop_columns("weight"), tmp_path / "then.parquet")
    pq.write_table(edited.filter(pc.field("trained") == 2), tmp_path / "now.parquet")
    schedule = pa.Table.from_pylist(standing(), schema=ROUNDS)
    shown = [(tmp_path / f"{name}.parquet", Shown(answers=name, method="lora")) for name in ("then", "now")]
    found = reported(shown, schedule, None).to_pandas()
    assert found.weight.isna().sum() == 900
    metrics = compute(found, rule="words", taught_questions=True)
    theirs = measured(RecheckConfig(facts=60))["rows"][-1]["metrics"]["forgetting"]
    assert metrics["rows"][-1]["metrics"]["forgetting"]["value"] == theirs["value"]
