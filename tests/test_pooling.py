"""`corsa report RUN RUN`: seeds and runs pooled into one page."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from synthetic_run import RUN, curves, predictions

from corsa.cli.main import main
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.report.page import Scenario
from corsa.report.pooling import pooled


def of(table: pd.DataFrame, rule: str = "contains", **about: Any) -> Scenario:
    run = RUN | {"config": {"model": {"name": "tiny"}}} | about
    return Scenario(compute(table, rule=rule), table, curves(), run)


def test_runs_with_other_seeds_are_the_run_with_all_seeds() -> None:
    whole = predictions(chains=8, seeds=3)
    base = whole.method == "base"
    parts = {f"run{n}": of(whole[base | (whole.seed == n)]) for n in range(3)}
    for number, part in enumerate(parts.values()):
        part.metrics["cost"] = {"lora": 10.0 + number, "corsa": 40.0}
    found = pooled(parts)
    assert found.metrics == compute(whole) | {"looks_back": [], "cost": {"lora": 11.0, "corsa": 40.0}}
    assert found.metrics["seeds"] == [0, 1, 2]
    assert len(found.predictions) == len(whole)


def test_runs_of_the_same_method_and_seed_stay_apart() -> None:
    one, other = predictions(chains=8, methods=("lora",)), predictions(chains=8, methods=("lora", "corsa"), seed=5)
    found = pooled({"aaa": of(one), "bbb": of(other)})
    assert found.metrics["methods"] == ["base", "lora aaa", "lora bbb", "corsa"]
    values = {row["method"]: row["metrics"]["efficacy"]["value"] for row in found.metrics["rows"]}
    for name, table in (("lora aaa", one), ("lora bbb", other)):
        (row,) = [row for row in compute(table)["rows"] if row["method"] == "lora"]
        assert values[name] == row["metrics"]["efficacy"]["value"]
    assert set(found.curves.method) == {"lora aaa", "lora bbb", "corsa aaa", "corsa bbb"} - {
        "corsa aaa",
        "corsa bbb",
    } | {"corsa"}
    assert any("Run bbb: CoRSA (seed 0), LoRA (seed 0)" in note for note in found.run["notes"])


def test_runs_that_were_asked_differently_are_not_pooled() -> None:
    table = predictions(chains=8)
    with pytest.raises(CorsaError, match="run b has the rule 'words', the first run 'contains'"):
        pooled({"a": of(table), "b": of(table, "words")})
    with pytest.raises(CorsaError, match="run b is of model other"):
        pooled({"a": of(table), "b": of(table, config={"model": {"name": "other"}})})


def test_the_page_of_several_runs_needs_a_place(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "one", "two", "--storage", str(tmp_path)]) == 2
    assert "give --output DIR" in capsys.readouterr().err
