"""The report page and the terminal table, on a made-up run."""

from __future__ import annotations

import base64
import gzip
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs_version
from rich.console import Console
from synthetic_run import RUN, curves, predictions

from corsa.config import ModelConfig
from corsa.config.steps import JoinedConfig
from corsa.evaluation.metrics import compute
from corsa.evaluation.specificity import everyday
from corsa.experiments.kinds import PAPER, REPORT
from corsa.experiments.steps import join_reports
from corsa.flow import Step, Store
from corsa.flow.task import Task
from corsa.methods import METHODS
from corsa.report.answers import folded_answers
from corsa.report.dag import Dag
from corsa.report.figures import LOOKS
from corsa.report.findings import findings, shown, summary
from corsa.report.layout import write_page
from corsa.report.page import Scenario, write_paper, write_report
from corsa.report.tables import summary_table
from corsa.report.training import told_perturbation

PRIMARY = ("efficacy", "forgetting")
EVIL = "<script>alert('x')</script> & <b>bold</b>"


@cache
def five_seeds() -> pd.DataFrame:
    """LoRA and CoRSA. LoRA forgets more, with enough facts and seeds to show it."""
    return predictions(chains=60, seeds=5)


class Page(HTMLParser):
    """Checks that tags nest, and keeps the parts that the tests need."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.open, self.scripts = "", [], [], {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self.tags[-1][1].get("id")] = data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def unfolded(self, id_: str) -> str:
        return gzip.decompress(base64.b64decode(self.scripts[id_])).decode()

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    table = predictions(chains=8)
    table["output"] = EVIL
    run = RUN | {"title": f"run {EVIL}", "skipped": [{"record": EVIL, "reason": "<i>"}]}
    directory = tmp_path_factory.mktemp("page") / "new"
    return Page(
        write_report(directory, metrics=compute(predictions(chains=8)), predictions=table, curves=curves(), run=run)
    )


def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), f"<{tag} {name}={value!r}>"
    (style,) = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    assert "@import" not in style
    assert "url(" not in style
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_what_a_model_says_is_escaped(page: Page) -> None:
    assert EVIL not in page.source
    assert EVIL in page.text  # shown as it is
    assert not page.all("b")
    assert page.source.index("<script") > page.source.index("</main>")
    assert "onerror" not in page.source


def test_every_method_and_figure_is_there(page: Page) -> None:
    for method in ("base", "LoRA", "CoRSA"):
        assert method in page.text
    plots = json.loads(page.unfolded("plots"))
    counts = {"learning": 2, "tradeoff": 2, "rounds": 3, "diagnostics": 3}
    assert set(plots) == {f"{figure}-{index}" for figure, count in counts.items() for index in range(count)}
    drawn = {div["id"]: div for div in page.all("div") if div.get("role") == "img"}
    assert set(drawn) == set(plots)
    assert all(len(div["aria-label"]) > 60 for div in drawn.values())
    assert {trace["name"] for trace in plots["rounds-0"]["data"]} == {"base", "LoRA", "CoRSA"}
    for number in (0, 1):  # efficacy and generality
        assert {trace["name"] for trace in plots[f"tradeoff-{number}"]["data"]} == {"LoRA", "CoRSA"}


def test_a_point_is_as_large_as_its_method_is_costly(tmp_path: Path) -> None:
    table = predictions()
    metrics = compute(table) | {"cost": {"lora": 10.0, "corsa": 40.0}}
    page = Page(write_report(tmp_path, metrics=metrics, predictions=table, curves=pd.DataFrame(), run={}))
    traces = {trace["name"]: trace for trace in json.loads(page.unfolded("plots"))["tradeoff-0"]["data"]}
    areas = {name: trace["marker"]["size"] ** 2 for name, trace in traces.items()}
    assert areas["CoRSA"] == pytest.approx(4 * areas["LoRA"])
    assert "training: 40 s" in traces["CoRSA"]["hovertemplate"]
    assert "The area of a point is the time that training took." in page.text
    assert re.search(r"training time.{0,120}10 s.{0,40}40 s", page.text, re.DOTALL)


def test_tables_have_scoped_headers_and_sections_are_linked(page: Page) -> None:
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.all("a")} <= targets


def test_how_to_repeat_the_run_is_there(page: Page) -> None:
    assert RUN["command"] in page.text
    assert "rho: 0.05" in page.text
    assert "2.13.0" in page.text
    assert "corsa/seed0/round1" in page.text
    assert "2 min 10 s" in page.text
    assert "1 record of the data could not be used" in page.text


def test_the_drawing_of_the_steps_shows_times_and_the_slowest_way(page: Page) -> None:
    dag = Dag.of(RUN["steps"])
    assert {node.name for node in dag.nodes if node.critical} == {"edits", "reference", "corsa/seed0/round1", "metrics"}
    assert dag.longest == pytest.approx(0.4 + 21 + 130.2 + 1.2)
    places = {node.name: node for node in dag.nodes}
    for node in dag.nodes:
        assert all(places[needed].x + dag.box < node.x for needed in node.inputs)
        assert all(len(line) <= 23 for line in node.lines)
        assert node.x + dag.box <= dag.width
        assert node.y + 48 <= dag.height
    assert len({(node.x, node.y) for node in dag.nodes}) == len(dag.nodes)
    assert len(dag.edges) == 5
    assert len([tag for tag, _ in page.tags if tag == "path"]) == 5


def test_a_long_name_keeps_its_end() -> None:
    (node,) = Dag.of([{"name": "counterfact-x3/corsa-no-pcgrad-revised0.25/seed0/round3", "seconds": None}]).nodes
    assert node.lines[1] == "seed0/round3"
    assert node.lines[0].startswith("…")
    assert node.lines[0].endswith("-revised0.25/")


def test_what_follows_from_other_lines_gets_none() -> None:
    steps = [{"name": name, "seconds": 1, "inputs": needs} for name, needs in (("a", ""), ("b", "a"), ("c", "ab"))]
    assert len(Dag.of(steps).edges) == 2


def test_every_answer_is_on_the_page_with_its_outcome() -> None:
    table = predictions(chains=8)
    folded = folded_answers({"": (table, "contains")})
    assert folded["rows"] == (table.method != "base").sum()
    columns = {name: [column["values"][code] for code in column["codes"]] for name, column in folded["columns"].items()}
    rows = pd.DataFrame(columns)
    asked = table[table.method != "base"].reset_index(drop=True)
    neighbor = asked.kind == "neighbor"
    assert rows.question.tolist() == asked.prompt.tolist()
    assert rows.outcome.eq("took").tolist() == (asked.matched_new & ~neighbor).tolist()
    assert rows.outcome.eq("reverted").tolist() == (~asked.matched_new & asked.matched_old & ~neighbor).tolist()
    assert set(rows.outcome[neighbor]) == {"changed", "unchanged"}
    assert (rows.output[rows.outcome == "unchanged"] == rows.base[rows.outcome == "unchanged"]).all()
    lost = rows[rows.forgotten]
    assert len(lost) > 0
    assert (lost.trained > lost.learnt).all()
    assert not lost.outcome.isin(["took"]).any()


def test_without_edited_models_the_base_model_is_listed() -> None:
    table = predictions(chains=2)
    folded = folded_answers({"": (table[table.method == "base"], "contains")})
    assert folded["columns"]["method"]["values"] == ["base"]
    assert "changed" not in folded["columns"]["outcome"]["values"]


def test_matrices_say_what_each_round_knows_of_each(page: Page) -> None:
    table = predictions(chains=8)
    matrix = compute(table)["matrices"]["corsa"]
    rows = table[(table.method == "corsa") & (table.kind == "paraphrase")]
    first = rows[(rows.trained == 3) & (rows.learnt == 1)]
    assert matrix[2][0] == {"value": first.matched_new.mean(), "edits": 4, "probes": 12}
    assert matrix[0][1] is None
    assert matrix[2][1] is None  # all facts of round 2 were revised in round 3
    assert len([table for table in page.all("table") if table.get("class") == "matrix"]) == 3


def test_several_scenarios_share_one_page(tmp_path: Path) -> None:
    table = predictions(chains=4)
    one = Scenario(compute(table), table, curves(), RUN)
    page = Page(write_paper(tmp_path, {"first": one, "second": one}, RUN))
    plots = json.loads(page.unfolded("plots"))
    assert {name.split("-")[0] for name in plots} == {"s1", "s2"}
    drawn = {div["id"] for div in page.all("div") if div.get("class") == "plot"}
    assert drawn == set(plots)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert json.loads(page.unfolded("answers-data"))["columns"]["scenario"]["values"] == ["first", "second"]


def test_reports_of_scenarios_are_joined_from_what_they_stored(tmp_path: Path) -> None:
    store, table = Store(tmp_path), predictions(chains=4)
    reports = {}
    for name in ("single", "continual"):
        step = Step(f"report/{name}", REPORT, JoinedConfig(title=name, command="", experiment={}))
        reports[step.name] = step
        output = store.workspace(step)
        table.to_parquet(output / "predictions.parquet")
        curves().to_parquet(output / "curves.parquet")
        (output / "metrics.json").write_text(json.dumps(compute(table)))
        (output / "run.json").write_text(json.dumps(RUN | {"title": name}))
        store.commit(step, output, {}, 2.0)
    task = Task(Step("report/paper", PAPER, JoinedConfig(title="All", command="c", experiment={}), reports), store)
    assert join_reports(task) == {"scenarios": 2}
    assert set(json.loads((task.output / "metrics.json").read_text())) == {"single", "continual"}
    answers = json.loads(Page(task.output / "report.html").unfolded("answers-data"))
    assert answers["columns"]["scenario"]["values"] == ["single", "continual"]
    assert answers["rows"] == 2 * (table.method != "base").sum()


def test_a_page_of_ones_own_extends_the_layout(tmp_path: Path) -> None:
    own = tmp_path / "own.html"
    own.write_text(
        "{% extends 'layout.html' %}{% block main %}<p>{{ words }}</p><div class='plot' id='one'></div>{% endblock %}"
    )
    basic = write_page(tmp_path / "a", own, title="T", plots={"one": go.Figure(go.Scatter(y=[1]))}, words="<b>")
    whole = write_page(tmp_path / "b", own, title="T", plots={"one": go.Figure(go.Heatmap(z=[[1]]))}, words="<b>")
    page = Page(basic)
    assert "<b>" in page.text
    assert f"plotly.js (basic - minified) v{get_plotlyjs_version()}" in page.unfolded("plotly")[:100]
    assert f"plotly.js v{get_plotlyjs_version()}" in Page(whole).unfolded("plotly")[:100]


def test_a_poor_run_still_makes_a_page(tmp_path: Path) -> None:
    table = predictions(chains=1, rounds=1, methods=("lora",))
    page = Page(write_report(tmp_path, metrics=compute(table), predictions=table, curves=pd.DataFrame(), run={}))
    assert "No training curves were recorded." in page.text
    assert "Plain LoRA computes neither" in page.text
    assert "no fact learnt before round 1 is still valid" in page.text


def test_curves_of_one_epoch_are_drawn_by_step_and_skipped_steps_left_out(tmp_path: Path) -> None:
    table = predictions(chains=2, rounds=1)
    steps = curves(rounds=1, epochs=1, batches=5)
    steps.loc[steps.step == 2, "logp_new"] = None
    page = Page(write_report(tmp_path, metrics=compute(table), predictions=table, curves=steps, run={}))
    assert "one point an optimizer step" in page.text


def rendered(metrics: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(summary_table(metrics))
    return captured.get()


def test_the_terminal_table_fits_eighty_columns() -> None:
    text = rendered(compute(predictions(chains=16)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "rule 'contains'" in text
    for heading in ("efficacy", "forgetting", "generality", "retention", "activation"):
        assert heading in text
    for method in ("base", "LoRA", "CoRSA"):
        assert any(line.strip().startswith(method) for line in lines)
    assert "…" not in text


def test_a_long_name_of_a_method_cuts_nothing_off() -> None:
    lines = rendered(compute(predictions(chains=16, methods=("lora", "replay-pcgrad")))).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "activation" in text
    assert "higher is better, ↓ lower is better." in text


def test_it_is_said_plainly_when_corsa_does_not_beat_lora() -> None:
    table = predictions(chains=8, seeds=3)
    same = pd.concat([table[table.method != "corsa"], table[table.method == "lora"].assign(method="corsa")])
    sentences = " ".join(findings(compute(same, primary=PRIMARY)))
    assert "CoRSA does not beat LoRA here: no primary metric shows a difference." in sentences
    assert "LoRA and CoRSA cannot be told apart on update efficacy (too few facts to show any difference)" in sentences
    assert "better" not in sentences

    swapped = five_seeds().replace({"method": {"lora": "corsa", "corsa": "lora"}})
    sentences = " ".join(findings(compute(swapped, primary=PRIMARY)))
    assert "CoRSA does not beat LoRA here: it is worse on forgetting (" in sentences


def test_a_real_gain_is_reported_with_its_numbers() -> None:
    metrics = compute(five_seeds(), primary=PRIMARY)
    (better, alike, verdicts) = findings(metrics)
    assert re.match(r"CoRSA is better than LoRA on forgetting \([\d.]+ % against [\d.]+ %, corrected p = ", better)
    assert re.match(r".* on update efficacy \(a true difference of [\d.]+ pt would have shown with 80 % power\)", alike)
    assert verdicts.startswith("Verdicts: 2 tests of primary metrics, over facts and seeds, corrected")
    assert summary(metrics).startswith(
        "60 facts were taught over 3 rounds of edits, with 5 seeds, and paraphrases of them were asked"
    )


def test_only_primary_metrics_get_a_verdict_on_the_page(tmp_path: Path) -> None:
    table = five_seeds()
    metrics = compute(table, primary=("forgetting",))
    page = Page(write_report(tmp_path, metrics=metrics, predictions=table, curves=pd.DataFrame(), run={}))
    assert page.text.count("CoRSA is better") == 2  # the sentence, and the line of the table
    assert page.text.count("corrected p = ") == 2
    assert len(re.findall(r"\bexploratory\b", page.text)) >= len(metrics["comparisons"]) - 1
    assert "intervals over facts and seeds" in page.text
    assert "beyond chance" not in page.text


def test_everyday_questions_have_a_table(tmp_path: Path) -> None:
    table = predictions()
    rows = [{"question": str(i), "output": str(i), "right": i < 3} for i in range(4)]
    found = {"base": everyday({0: rows}), "lora": everyday({0: rows, 1: rows}, rows)}
    metrics = compute(table) | {"everyday": found}
    page = Page(write_report(tmp_path, metrics=metrics, predictions=table, curves=pd.DataFrame(), run={}))
    assert re.search(r"answered right.{0,80}75\.0 %.{0,200}75\.0 %", page.text, re.DOTALL)
    assert re.search(r"as before, or still right.{0,80}–.{0,80}100\.0 %", page.text, re.DOTALL)
    assert "right (as before or still right): base 75.0 %, LoRA 75.0 % (100.0 %)." in " ".join(
        rendered(metrics).split()
    )


def test_a_page_of_one_seed_says_that_it_compares_adapters(tmp_path: Path) -> None:
    table = predictions(chains=60)
    metrics = compute(table, primary=PRIMARY)
    page = Page(write_report(tmp_path, metrics=metrics, predictions=table, curves=pd.DataFrame(), run={}))
    assert "compares these two adapters, not the methods" in page.text
    assert "These two adapters, CoRSA minus LoRA: update efficacy " in page.text
    assert "none: one seed" in page.text
    assert not re.search(r"is better than|p = ", page.text)


def test_a_page_without_primary_metrics_is_exploratory() -> None:
    (only,) = findings(compute(predictions(chains=8, seeds=3)))
    assert only.startswith("This report is exploratory")


def test_an_interval_never_begins_at_minus_zero() -> None:
    assert shown({"value": 0.1, "low": -1e-17, "high": 0.2}, "points") == ("10.0 pt", "0.0–20.0")
    assert shown({"value": -1e-17, "low": -0.2, "high": 0.1}, "points") == ("0.0 pt", "-20.0 to 10.0")


@pytest.mark.parametrize(("protocol", "rule", "said"), [("full", "words", True), ("authors", "contains", False)])
def test_figures_of_the_paper_stand_beside_another_protocol_with_what_differs(
    tmp_path: Path, protocol: str, rule: str, said: bool
) -> None:
    table = predictions(chains=4)
    metrics = compute(table, rule=rule, protocol=protocol) | {"published": ["Table 1"], "draws": 1 if said else 3}
    page = Page(write_report(tmp_path, metrics=metrics, predictions=table, curves=curves(), run=RUN))
    assert "+12.42 points" in page.text
    assert ("which is another measure" in page.text) is said
    assert f"protocol: {protocol}{'' if said else ', 3 draws'}" in page.text


@pytest.mark.parametrize(
    ("dtype", "change", "told"),
    [("bfloat16", 0.0048, True), ("bfloat16", 0.03, False), ("float32", 0.0048, False), ("bfloat16", None, False)],
)
def test_a_perturbation_that_drowns_in_rounding_is_told(dtype: Any, change: float | None, told: bool) -> None:
    found = list(told_perturbation(ModelConfig(dtype=dtype), {} if change is None else {"gradient_change": change}))
    assert len(found) == told
    if told:
        assert "changed the gradient by 0.48 % of its length" in found[0]
        assert "--dtype float32" in found[0]


def test_no_two_methods_look_the_same() -> None:
    assert set(LOOKS) == {"base", *METHODS}
    assert len(set(LOOKS.values())) == len(LOOKS)
