"""Records of runs that are published, and the tables of docs/results.md, which are made from them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT
from synthetic_run import RUN, predictions

from corsa.cli.main import main
from corsa.config.steps import JoinedConfig
from corsa.errors import CorsaError
from corsa.evaluation.metrics import compute
from corsa.evaluation.specificity import everyday
from corsa.experiments.report_spec import PAPER
from corsa.flow import Step, Store
from corsa.report.publishing import filled, markdown, record

RESULTS = ROOT / "docs" / "results.md"
WITH = RUN | {"commits": ["0123456789ab"], "hardware": {"processor": "EPYC", "cores": 2, "memory_gib": 23.6}}


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    """Of a made-up run with five seeds, in which LoRA forgets more."""
    return compute(predictions(chains=60, seeds=5), primary=("efficacy", "forgetting"))


def test_a_table_has_every_method_with_intervals(metrics: dict[str, Any]) -> None:
    made = markdown(record(WITH, metrics))
    answers = predictions(chains=60, seeds=5)
    asked = answers[(answers.kind == "paraphrase") & (answers.method == "lora") & (answers.trained == 3)]
    last = asked[asked.learnt == 3]
    efficacy = f"{100 * last.words_new.mean():.1f} %"
    (row,) = [line for line in made.splitlines() if line.startswith("| LoRA |")]
    assert re.fullmatch(rf"\| LoRA \| {efficacy} \(\d+\.\d–\d+\.\d\) \|( [^|]+ \|)+", row)
    assert [line.split(" | ")[0] for line in made.splitlines() if line.startswith("| ")] == [
        "| ",
        "| ---",
        "| base",
        "| LoRA",
        "| CoRSA",
    ]
    assert "| update efficacy ↑ | forgetting ↓ |" in made


def test_a_table_says_how_it_was_measured_and_what_it_shows(metrics: dict[str, Any]) -> None:
    made = markdown(record(WITH, metrics))
    assert made.startswith(
        "`smollm2-135m`, 60 facts, 5 seeds, protocol `full`, rule `contains`, 95 % intervals over facts and seeds, "
        "EPYC, 2 cores, 24 GiB, 2026-03-01, commit 0123456789ab:\n\n"
        f"```\n{RUN['command']}\n```\n"
    )
    bare = markdown(record({k: v for k, v in WITH.items() if k not in ("commits", "hardware", "config")}, metrics))
    assert bare.startswith("60 facts, 5 seeds, ")
    assert "over facts and seeds, 2026-03-01:" in bare
    assert re.search(r"^- CoRSA is better than LoRA on forgetting .*corrected p = ", made, re.MULTILINE)


def test_everyday_answers_have_columns_of_their_own(metrics: dict[str, Any]) -> None:
    found = {"base": everyday({0: ROWS}), "lora": everyday({0: ROWS, 1: [*ROWS[:3], ROWS[3] | {"output": "d"}]}, ROWS)}
    made = markdown(record(WITH, metrics | {"everyday": found}), columns=["forgetting"])
    rows = {line.split(" | ")[0]: line.split(" | ")[2:] for line in made.splitlines() if line.startswith("| ")}
    assert rows["| "] == ["everyday questions right ↑", "as before or still right ↑ |"]
    assert [cell.split(" (")[0] for cell in rows["| base"]] == ["50.0 %", "– |"]
    assert [cell.split(" (")[0] for cell in rows["| LoRA"]] == ["50.0 %", "87.5 %"]
    assert rows["| CoRSA"] == ["–", "– |"]


def test_training_times_are_ratios_to_the_shortest(metrics: dict[str, Any]) -> None:
    costly = record(WITH, metrics | {"cost": {"corsa": 31.0, "lora": 10.0}})
    made = markdown(costly, columns=["forgetting", "cost"])
    rows = {line.split(" | ")[0]: line.split(" | ")[-1] for line in made.splitlines() if line.startswith("| ")}
    assert rows["| "] == "training time, LoRA = 1 ↓ |"
    assert [rows[f"| {name}"] for name in ("base", "LoRA", "CoRSA")] == ["– |", "1.0 |", "3.1 |"]
    assert "training time" not in markdown(costly, columns=["forgetting"])  # only where it is asked for
    assert "training time" not in markdown(record(WITH, metrics), columns=["forgetting", "cost"])


ROWS = [{"question": str(i), "output": text, "right": i % 2 == 0} for i, text in enumerate(("a", "b", "a", "c"))]
"""Answers to four questions."""


def test_columns_can_be_chosen(metrics: dict[str, Any]) -> None:
    made = markdown(record(WITH, metrics), columns=["forgetting", "logp_new"])
    assert "|  | forgetting ↓ | " in made
    assert " nats" in made
    with pytest.raises(CorsaError, match="unknown metric 'forgeting': did you mean 'forgetting'"):
        markdown(record(WITH, metrics), columns=["forgeting"])


def test_a_record_is_small_and_has_no_answers(metrics: dict[str, Any]) -> None:
    kept = record(WITH, metrics)
    assert kept["metrics"] == metrics
    assert {"command", "hardware", "created", "commits", "config"} <= kept.keys()
    assert "steps" not in kept
    assert "Leader" not in json.dumps(kept)


def test_a_record_names_files_without_the_folders_of_a_machine(metrics: dict[str, Any]) -> None:
    command = "python pipelines/continual.py --data /home/ada/facts.jsonl --then-data ~/b/c.json --mmlu /data/x/mmlu"
    config = {"data": "/home/ada/facts.jsonl", "models": ["/m/a.gguf", "smollm2-135m"], "storage": "s3://bucket/runs"}
    kept = record(WITH | {"command": f"{command} --storage s3://bucket/runs", "config": config}, metrics)
    shown = "python pipelines/continual.py --data facts.jsonl --then-data c.json --mmlu mmlu --storage s3://bucket/runs"
    assert kept["command"] == shown
    assert kept["config"] == config | {"data": "facts.jsonl", "models": ["a.gguf", "smollm2-135m"]}


def test_a_document_is_filled_from_the_records_beside_it(tmp_path: Path, metrics: dict[str, Any]) -> None:
    (tmp_path / "one.json").write_text(json.dumps(record(WITH, metrics)))
    (tmp_path / "all.json").write_text(json.dumps(record(WITH, {"single update": metrics})))
    first, second = (
        "<!-- table: one forgetting -->\n<!-- end -->",
        ("<!-- table: all/single_update -->\nold 1.0 %\n<!-- end -->"),
    )
    new = filled(f"a\n{first}\nb\n{second}\n", tmp_path)
    assert new.startswith("a\n<!-- table: one forgetting -->\n\n`smollm2-135m`, 60 facts")
    assert new.endswith("\n\n<!-- end -->\n")
    assert "old 1.0 %" not in new
    assert new.count("| CoRSA |") == 2
    assert filled(new, tmp_path) == new
    assert filled(new.replace(" %", " pt"), tmp_path) == new  # a number that was typed by hand goes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: two -->\n<!-- end -->", "unknown record 'two'"),
        ("<!-- table: all/double -->\n<!-- end -->", "unknown scenario 'double'"),
        ("<!-- table: one -->\n", "does not end"),
        ("<!-- table: one -->\n<!-- table: one -->\n<!-- end -->", "does not end"),
        ("<!-- table: one a b -->\n<!-- end -->", "does not end"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, metrics: dict[str, Any], text: str, said: str) -> None:
    (tmp_path / "one.json").write_text(json.dumps(record(WITH, metrics)))
    (tmp_path / "all.json").write_text(json.dumps(record(WITH, {"single": metrics})))
    with pytest.raises(CorsaError, match=said):
        filled(text, tmp_path)


def test_the_command_publishes_a_run_and_fills_a_document(tmp_path: Path, metrics: dict[str, Any]) -> None:
    store = Store(tmp_path / "runs")
    step = Step("report/paper", PAPER, JoinedConfig(title="All", command="c", experiment={}), {})
    output = store.workspace(step)
    (output / "metrics.json").write_text(json.dumps({"single": metrics}))
    (output / "run.json").write_text(json.dumps(WITH))
    (output / "report.html").write_text("")
    store.commit(step, output, {}, 1.0)
    document = tmp_path / "results.md"
    document.write_text("<!-- table: all/single -->\n<!-- end -->\n")
    kept = tmp_path / "results" / "all.json"
    assert not main(["report", "--storage", str(tmp_path / "runs"), "--publish", str(kept)])
    assert json.loads(kept.read_text())["metrics"] == {"single": metrics}
    assert not main(["report", "--tables", str(document)])
    assert "| CoRSA |" in document.read_text()
    other = tmp_path / "other.md"
    other.write_text("<!-- table: all/single -->\n<!-- end -->\n")
    assert not main(["report", "--tables", str(other), "--records", str(kept.parent)])
    assert other.read_text() == document.read_text()
    assert main(["report", "--records", str(kept.parent)]) != 0
    assert main(["report", "--storage", str(tmp_path / "runs"), "--publish", str(tmp_path / "all")]) != 0


def test_a_step_s_record_names_the_commit(tmp_path: Path) -> None:
    head = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(head, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("this is no clone")
    store = Store(tmp_path / "runs")
    step = Step("report/paper", PAPER, JoinedConfig(title="All", command="c", experiment={}), {})
    made = store.commit(step, store.workspace(step), {}, 1.0)
    assert made.record.versions["commit"].removesuffix("-dirty") == found.stdout.strip()


# The page of results


@pytest.mark.parametrize("document", [RESULTS, ROOT / "README.md"], ids=lambda path: path.name)
def test_the_tables_of_a_document_are_what_the_records_say(document: Path) -> None:
    text = document.read_text()
    assert "<!-- table: " in text
    assert filled(text, RESULTS.with_suffix("")) == text, "run `make results`"


def test_every_published_record_is_shown() -> None:
    named = re.findall(r"<!-- table: ([^\s/]+)", RESULTS.read_text())
    assert {path.stem for path in RESULTS.with_suffix("").glob("*.json")} == set(named)
