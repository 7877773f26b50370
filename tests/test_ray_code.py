"""Table 6 end to end on a tiny model, twice. The second run computes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from code_files import task, update, write_lines
from ray_cluster import Cluster, Run, plain_environment, run

from corsa.sandbox.worker import available

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(available()[0] is None, reason=f"programs cannot be isolated here: {available()[1]}"),
]
pytest_plugins = ["ray_fixtures"]

PIPELINE = "pipelines/code_update.py"
SHAPE = ["--model", "random:tiny-llama", "--placement.threads", "1", "--lora.rank", "4", "--training.epochs", "1"]
SHAPE += ["--sampling.samples", "2", "--sampling.new-tokens", "8", "--allow-code-execution"]
SHAPE += ["--seeds", "0,1"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("code")
    arena = write_lines(folder / "arena.jsonl", [update("sin", 2), update("cos", 2)])
    humaneval = write_lines(folder / "HumanEval.jsonl", [task(0), task(1)])
    (folder / "sampled_humaneval_task_ids.json").write_text(json.dumps(["HumanEval/1"]))
    return ["--data", str(arena), "--humaneval", str(humaneval)]


@pytest.fixture(scope="session")
def first(cluster: Cluster, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    storage = tmp_path_factory.mktemp("code-runs")
    arguments = [*SHAPE, *files, "--storage", storage]
    return Run(storage, run(arguments, cluster.environment, pipeline=PIPELINE, limit=500))


def test_every_method_is_measured_on_updates_and_on_humaneval(first: Run) -> None:
    page = Path(first.finished.out.splitlines()[-2])
    metrics = json.loads(page.with_name("metrics.json").read_text())
    assert metrics["methods"] == ["base", "prepend", "lora", "f-learning", "corsa"]
    for row in metrics["rows"]:
        assert row["metrics"]["upass_1"]["probes"] == 2  # the second problem of each update: the first is taught
        assert row["metrics"]["spass_1"]["probes"] == (0 if row["method"] == "prepend" else 2)
        assert row["metrics"]["spass_subset_1"]["probes"] == (0 if row["method"] == "prepend" else 1)
    assert set(metrics["by_update"]) == {f"[math.{name}]:[add-argument]:[update-0]" for name in ("sin", "cos")}
    text = page.read_text()
    assert text.count("+5.48 points") == 2  # the paper's abstract compares with LoRA and F-Learning
    assert "2 of 2 edits have no old answer" in text  # eight random tokens do not run
    verdicts = pq.read_table(page.with_name("verdicts.parquet")).to_pylist()
    assert len(verdicts) == 2 * (
        5 * 2 * 2 * 2 + 4 * 2 * 2
    )  # seeds, methods, problems, samples; of updates with and without
    assert {row["seed"] for row in verdicts} == set(metrics["seeds"]) == {0, 1}
    assert "sandbox" not in {row["outcome"] for row in verdicts}


def test_the_second_time_nothing_is_computed(first: Run, files: list[str]) -> None:
    again = run([*SHAPE, *files, "--storage", first.storage], plain_environment(), pipeline=PIPELINE)
    assert "0 to do" in again.out
    assert "dashboard" not in again.out
    assert again.out.splitlines()[-2:] == first.finished.out.splitlines()[-2:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--methods", "memit"], "an update of an API has neither"),
        (["--methods", "crosa"], "did you mean 'corsa'"),
        (["--no-allow-code-execution"], "say so with --allow-code-execution"),
    ],
)
def test_what_cannot_be_is_refused_at_once(files: list[str], tmp_path: Path, change: list[str], said: str) -> None:
    refused = run([*SHAPE, *files, *change, "--storage", tmp_path], plain_environment(), status=2, pipeline=PIPELINE)
    assert said in refused.err
