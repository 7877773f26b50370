"""Two nodes of one CPU each, full with two workers: submitted jobs still finish, and report progress."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import LIMIT, ROOT, end_of, free_port, records, run, start, wait_until
from ray_nodes import Nodes, running_nodes

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SHAPE = ["--model", "random:tiny-llama", "--benchmark", "world_facts", "--evaluation.new-tokens", "4"]
SHAPE += ["--training.batch", "3", "--training.epochs", "2"]
FACTS = ["--limit", "4"]
SCENARIOS = {
    "single_update": ["--methods", "lora,memit,f-learning,corsa", "--memit.gradient-steps", "2"],
    "continual": ["--rounds", "2", "--methods", "lora,corsa"],
    "ablation": [],
    "routing": ["--parts", "2", "--methods", "corsa"],
    "merging": ["--other", "world_facts", "--methods", "lora"],
    "sensitivity": ["--development", "4"],
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes({}) as found:
        yield found


def submit(nodes: Nodes, *arguments: str | Path) -> str:
    """The log of a submitted job, which must succeed."""
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", nodes.dashboard]
    command += ["--runtime-env", "cluster/runtime_env.yaml", "--", "python", *map(str, arguments)]
    environment = {
        name: value for name, value in nodes.environment.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    log = re.sub(r"\x1b\[\d+m", "", done.stdout + done.stderr)
    assert done.returncode == 0, log
    return log


def test_a_sweep_whose_trials_fill_every_cpu_ends(nodes: Nodes, tmp_path: Path) -> None:
    log = submit(nodes, "tune/sweep.py", *SHAPE, "--development", "6", "--trials", "4", "--storage", tmp_path)
    assert "trials side by side: 2 CPUs / (1 worker x 1 CPU) = 2 at once" in log
    assert "4 trials: 4 finished, 0 stopped early, 0 failed" in log
    phases = set(re.findall(r"^running  \S+/trial\S+  (loading|training|evaluating)", log, re.MULTILINE))
    assert phases == {"loading", "training", "evaluating"}, log
    assert "sharding: {zero_stage" not in log  # the configuration is not printed in full
    assert "development: 6" in log


@pytest.mark.parametrize(("pipeline", "arguments"), SCENARIOS.items(), ids=SCENARIOS)
def test_a_scenario_ends(
    nodes: Nodes, tmp_path_factory: pytest.TempPathFactory, pipeline: str, arguments: list[str]
) -> None:
    storage = tmp_path_factory.getbasetemp() / "scenarios"  # shared steps run once
    log = submit(nodes, f"pipelines/{pipeline}.py", *SHAPE, *FACTS, *arguments, "--storage", storage)
    assert "report.html" in log
    assert any(name.startswith("report") for name in records(storage))


def test_a_second_run_says_that_it_waits_for_room(nodes: Nodes, tmp_path: Path) -> None:
    """The first holds both CPUs completely; the second continues when the first has ended."""
    whole = ["--workers", "2", "--placement.cpus", "1", "--methods", "corsa", "--rounds", "1", "--limit", "7"]
    long = [*SHAPE, *whole, "--training.epochs", "100000", "--storage", tmp_path / "first"]
    first = start(long, nodes.environment)
    wait_until(lambda: len(nodes.workers()) == 2, LIMIT, "the workers of the first run")
    began = time.monotonic()
    second = start(
        [*SHAPE, *FACTS, "--rounds", "1", "--methods", "corsa", "--storage", tmp_path / "second"], nodes.environment
    )
    assert second.stdout is not None
    line = next(line for line in second.stdout if line.startswith("waiting"))
    assert time.monotonic() - began < 120
    assert " are waited for; free: 0 of 1 CPU, 0 of 1 CPU; held by " in line
    assert re.search(r"RayTrainWorker of another run \(job \w+\) with 1 CPU", line)
    first.terminate()
    assert "interrupted: finished steps are kept" in end_of(first, began, status=143).out
    end_of(second, began)


def test_a_cluster_that_does_not_answer_is_said_within_half_a_minute(nodes: Nodes, tmp_path: Path) -> None:
    gone = nodes.environment | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    refused = run([*SHAPE, *FACTS, "--storage", tmp_path], gone, status=2, limit=30)
    assert refused.err.startswith(f"error: cannot reach the Ray cluster at {gone['RAY_ADDRESS']}: nothing answers")
    assert len(refused.err.splitlines()) == 1
