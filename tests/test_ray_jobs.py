"""Pipelines submitted through the jobs API, and requests and data that a cluster must handle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fact_files import one_counterfact_record
from ray_cluster import LIMIT, PIPELINE, ROOT, Cluster, corsa, plain_environment, records, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # the first test waits for the cluster and the shared run
pytest_plugins = ["ray_fixtures"]

SMALL = ["--model", "random:tiny-llama", "--placement.threads", "1", "--evaluation.new-tokens", "4"]
SMALL += ["--training.epochs", "2", "--methods", "lora"]


def submit(cluster: Cluster, *arguments: str) -> str:
    """Submits the pipeline as a user would, waits for it, and returns its log; it must succeed."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.dashboard]
    command += ["--working-dir", ".", "--", "python", PIPELINE, *arguments]
    environment = {name: value for name, value in cluster.environment.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    log = re.sub(r"\x1b\[\d+m", "", done.stdout + done.stderr)
    assert done.returncode == 0, log
    assert "succeeded" in log
    return log


def test_a_submitted_job_leaves_results_that_the_next_one_finds(cluster: Cluster) -> None:
    """One edit, batch size sixteen, and a relative storage path: below the home directory, not in the job's copy."""
    arguments = [*SMALL, "--limit", "1", "--rounds", "1", "--storage", "kept/runs"]
    log = submit(cluster, *arguments)
    (uploaded,) = cluster.home.parent.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert sum(path.stat().st_size for path in uploaded.rglob("*") if path.is_file()) < 5 << 20
    assert not (uploaded / ".venv").exists()
    assert (uploaded / "corsa" / "data" / "benchmarks" / "world_facts.yaml").is_file()
    assert "update efficacy" in log
    paths = re.findall(r"^(/.*/(?:report\.html|metrics\.json|predictions\.parquet))$", log, re.MULTILINE)
    assert len(paths) == 3
    assert all(Path(path).is_file() and Path(path).is_relative_to(cluster.home / "kept" / "runs") for path in paths)
    found = records(cluster.home / "kept" / "runs")
    assert found["edits/world_facts"].metrics["edits"] == 1
    assert found["world_facts/lora/seed0/round1"].metrics["steps"] == 2

    again = submit(cluster, *arguments)
    assert "0 to do" in again
    assert "dashboard  http" not in again
    assert paths[0] in again


def test_more_workers_than_fit_are_refused_with_the_arithmetic(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [*SMALL, "--limit", "2", "--workers", "64", "--storage", tmp_path]
    refused = run(arguments, cluster.environment, status=2)
    assert "error: 64 workers x 1 CPU = 64 CPU asked, the cluster has 2 (1 node): ask for at most 2" in refused.err
    assert "Traceback" not in refused.out + refused.err
    alone = run(arguments, plain_environment(), status=2)  # before a cluster is started for nothing
    assert "error: 64 workers x 1 CPU = 64 CPU asked, the cluster has " in alone.err
    assert "dashboard" not in alone.out
    assert not any("reference" in name or "lora" in name for name in records(tmp_path))


def facts(path: Path, count: int, **first: Any) -> Path:
    """A user's file of facts without chains; `first` changes the first fact."""
    rows = [
        {"prompt": f"Who leads team {i}?", "target_new": f"Ada {i}", "target_old": f"Grace {i}"}
        | {"paraphrases": [f"Team {i} is led by whom?"], "neighbors": [{"prompt": "Who leads none?", "answer": "no"}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | first, *rows[1:]]))
    return path


def test_a_persons_file_is_divided_over_the_rounds(cluster: Cluster, tmp_path: Path) -> None:
    data = facts(tmp_path / "facts.jsonl", 5)
    arguments = ["--benchmark", "file", "--data", data, "--rounds", "2", "--storage", tmp_path / "runs"]
    finished = run([*SMALL, *arguments], cluster.environment)
    rows = pd.read_parquet(finished.paths[2])
    lora = rows[rows.method == "lora"]
    assert lora.groupby("trained").edit.nunique().to_dict() == {1: 3, 2: 5}
    assert lora[lora.trained == 2].drop_duplicates("edit").learnt.value_counts().to_dict() == {1: 3, 2: 2}
    assert set(lora.kind) == {"edit", "paraphrase", "neighbor"}
    found = records(tmp_path / "runs")
    steps = [found[f"file-x2/lora/seed0/round{number}"].metrics["steps"] for number in (1, 2)]
    assert steps == [2, 2]  # one batch per epoch


def test_a_bad_record_in_a_persons_file_stops_the_run_before_a_cluster_is_asked_for(tmp_path: Path) -> None:
    data = facts(tmp_path / "facts.jsonl", 3, target_new="   ")
    arguments = [*SMALL, "--benchmark", "file", "--data", data, "--rounds", "1", "--storage", tmp_path / "runs"]
    refused = run(arguments, plain_environment(), status=2)
    assert "facts.jsonl" in refused.err
    assert "target_new" in refused.err
    assert "Traceback" not in refused.out + refused.err
    assert "dashboard" not in refused.out + refused.err


def test_a_worker_takes_the_first_batch_of_a_file(cluster: Cluster, tmp_path: Path) -> None:
    words = ["perf", "data", "--data", one_counterfact_record(tmp_path), "--model", "random:tiny-llama"]
    done = corsa(tmp_path, cluster, *words, "--edits", "300", "--cluster", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["edits"] == 300
    assert 0 < found["first_batch_s"] < LIMIT
