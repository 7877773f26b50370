"""The simulated schedule of a run: the runner's own decisions with a clock, compared with real runs of toy steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from flow_steps import ADD, CLUSTER, ROUNDS, How, Number
from rich.console import Console

from corsa.errors import CorsaError
from corsa.flow import Step, Store, run
from corsa.planning.cluster import ClusterSpec
from corsa.planning.simulation import simulate


def toy(log: Path, sleep: float) -> tuple[Step, dict[str, float]]:
    """Two chains of three, one of them slower, after a common step and before a last one."""
    seconds = {"data": sleep, "end": sleep} | {
        f"{chain}{n}": sleep * (1 + (chain == "b")) for chain in "ab" for n in range(3)
    }

    def step(name: str, kind: object, **inputs: Step) -> Step:
        number = Number(value=float(len(name) + ord(name[0]) + ord(name[-1])))
        return Step(name, kind, number, inputs, How(log=log, sleep=seconds[name]))  # type: ignore[arg-type]

    data = step("data", ADD)
    ends = {}
    for chain in "ab":
        last = data
        for n in range(3):
            last = step(f"{chain}{n}", CLUSTER, before=last)
        ends[chain] = last
    return step("end", ADD, **ends), seconds


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_real_run_takes_what_the_simulation_says(tmp_path: Path, lanes: int) -> None:
    end, seconds = toy(tmp_path / "log", 0.5)
    found = simulate([end], lambda step: seconds[step.name], lanes)
    assert found.seconds == pytest.approx({1: 5.5, 2: 4.0}[lanes])
    assert [step.name for step in found.critical_path(lambda step: seconds[step.name])] == [
        "data",
        "b0",
        "b1",
        "b2",
        "end",
    ]
    busy = sum(s for name, s in seconds.items() if name[0] in "ab" and name != "data")
    assert found.idle == pytest.approx(1 - busy / (found.seconds * lanes))

    began = time.monotonic()
    run([end], Store(tmp_path / "runs"), lambda: None, lambda steps: lanes, Console(quiet=True), quiet=True)
    took = time.monotonic() - began
    assert took > found.seconds  # never faster: every step sleeps
    order = [span.step.name for span in sorted(found.spans, key=lambda span: span.start)]
    log = (tmp_path / "log").read_text().split()
    assert log[0] == order[0]
    assert set(log[1 : 1 + lanes]) == set(order[1 : 1 + lanes])  # those of two lanes start at the same time


def test_a_group_starts_once_for_a_list_of_steps(tmp_path: Path) -> None:
    before: dict[str, Step] = {}
    for n in range(3):
        number = Number(value=float(n))
        before = {"before": Step(f"round{n}", ROUNDS, number, before, How(log=tmp_path / "log"))}
    found = simulate([before["before"]], lambda step: 2.0, lanes=4, starting=10.0)
    assert [(span.start, span.end, span.lane) for span in found.spans] == [(10, 12, 0), (12, 14, 0), (14, 16, 0)]
    run([before["before"]], Store(tmp_path / "runs"), lambda: None, lambda steps: 4, Console(quiet=True), quiet=True)
    assert (tmp_path / "log").read_text().splitlines()[0] == "list of 3"


def test_a_cluster_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    known = "gpu_memory: 80GiB\ntflops: 300\nbandwidth: 3350\nlink: 50\nprice: 2.5\n"
    file.write_text(f"nodes: 8\ngpus: 8\n{known}")
    assert ClusterSpec.read(file).workers == 64
    wrong_files = {"gpus: 8\n": "nodes", "nodes: 0\ngpus: 8\n": "nodes", "nodes: 1\ngpus: 1\ncolour: 1\n": "colour"}
    for text, wrong in wrong_files.items():
        file.write_text(text + known)
        with pytest.raises(CorsaError, match=f"cluster.yaml: {wrong}"):
            ClusterSpec.read(file)
    with pytest.raises(CorsaError, match="cannot be read"):
        ClusterSpec.read(tmp_path / "absent.yaml")
