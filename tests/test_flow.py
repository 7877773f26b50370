"""Identity of steps, and which steps run when."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from flow_steps import ADD, CLUSTER, ROUNDS, How, Number, chain, diamond, execute, step
from pydantic import ConfigDict, Field
from rich.console import Console

from corsa.config import Frozen, StepConfig
from corsa.errors import CorsaError
from corsa.flow import Kind, Step, StepFunction, Store, draw, run
from corsa.flow.cluster import check_fits, lanes
from corsa.flow.progress import table
from corsa.flow.runner import divide
from corsa.flow.step import topological


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def absent() -> StepFunction:
    """Loads a step's function that is not there."""
    from flow_steps import absent  # type: ignore[attr-defined]

    return absent


def test_a_fingerprint_depends_on_what_changes_the_result_and_on_nothing_else(log: Path) -> None:
    before = step("before", ADD, log)
    this = Step("this", ADD, Number(value=2), {"edits": before})
    assert this.fingerprint == Step("other", ADD, Number(value=2), {"edits": before}, How(log=log)).fingerprint
    assert this.fingerprint == Step("this", replace(ADD, load=absent), this.config, this.inputs).fingerprint
    others = [
        Step("this", ADD, Number(value=3), {"edits": before}),
        Step("this", ADD, Number(value=2), {"facts": before}),
        Step("this", ADD, Number(value=2), {"edits": step("before", ADD, log, value=9)}),
        Step("this", ADD, Number(value=2)),
        Step("this", replace(ADD, version=2), Number(value=2), {"edits": before}),
        Step("this", replace(ADD, name="subtract"), Number(value=2), {"edits": before}),
    ]
    assert len({this.fingerprint, *(other.fingerprint for other in others)}) == 7


@pytest.mark.process
def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "from corsa.config import StepConfig; from corsa.flow import Kind, Step;"
        "print(Step('s', Kind('k', print, 1), StepConfig.model_validate({})).fingerprint)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == Step("s", Kind("k", absent, 1), StepConfig.model_validate({})).fingerprint


def test_what_has_no_stable_text_is_refused_with_its_field() -> None:
    class Odd(Frozen):
        model_config = ConfigDict(allow_inf_nan=True)
        fine: tuple[int, ...] = (1, 2)
        rates: dict[str, float] = Field(default_factory=dict)
        names: frozenset[str] = frozenset()

    with pytest.raises(CorsaError, match=r"'odd': config\.names: a frozenset cannot be part of an identity"):
        Step("odd", ADD, Odd(names=frozenset({"a"}))).fingerprint  # noqa: B018
    with pytest.raises(CorsaError, match=r"config\.rates\.a: nan"):
        Step("odd", ADD, Odd(rates={"a": float("nan")})).fingerprint  # noqa: B018


def test_two_different_steps_of_one_name_are_refused(log: Path) -> None:
    with pytest.raises(CorsaError, match="two different steps are called 'same'"):
        topological([step("same", ADD, log, value=1), step("same", ADD, log, value=2)])


@pytest.mark.process
def test_planning_imports_neither_torch_nor_ray() -> None:
    code = "import sys, corsa.flow.cluster; assert not {'torch', 'ray', 'pandas', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_needed_is_run_once_and_the_second_time_nothing_is(store: Store, log: Path) -> None:
    steps = diamond(log)
    outcome, text, connections = execute(store, *steps)
    assert connections == 1
    assert not outcome.failed
    assert not outcome.not_run
    assert len(outcome.artifacts) == 6
    last = outcome.artifacts[steps[-1].fingerprint]
    assert last.metrics == {"sum": 10.0}  # base 1, right 3, rounds 1 + 2 + 3
    assert Path(last.path("folder/sum.txt")).read_text() == "10.0"
    assert last.local("folder") == Path(last.url) / "folder"
    assert "6 steps: 0 done, 6 to do" in text
    assert text.count("done     ") == 6
    assert sorted(log.read_text().split("\n")) == sorted(
        ["", "base", "left", "list of 3", "right", "round/1", "round/2", "round/3"]
    )

    log.write_text("")
    again, text, connections = execute(store, *diamond(log))
    assert (log.read_text(), connections) == ("", 0)
    assert again.artifacts.keys() == outcome.artifacts.keys()
    assert text.strip() == "6 steps: 6 done, 0 to do"


def test_a_cluster_is_connected_to_only_for_a_step_that_needs_it(store: Store, log: Path) -> None:
    local = step("local", ADD, log)
    assert execute(store, local)[2] == 0
    assert execute(store, step("remote", CLUSTER, log, local, value=2), step("too", CLUSTER, log, value=3))[2] == 1


def test_a_cluster_that_refuses_stops_the_run_and_loses_nothing(store: Store, log: Path) -> None:
    def refuse() -> None:
        raise CorsaError("too many workers")

    first = step("first", ADD, log)
    with pytest.raises(CorsaError, match="too many workers"):
        run([step("second", CLUSTER, log, first)], store, refuse, lambda _: 1, Console(quiet=True))
    assert store.find(first)


def test_a_failure_names_its_cause_and_leaves_the_others_running(store: Store, log: Path) -> None:
    bad = step("bad", ADD, log, fail="the sky fell")
    after = step("after", ADD, log, step("between", ADD, log, bad, value=2), value=3)
    good = step("good", ADD, log, value=4, sleep=0.3)
    outcome, text, _ = execute(store, after, step("well", ADD, log, good, value=5))
    assert outcome.failed == {"bad": "ValueError: the sky fell"}
    assert outcome.not_run == ["between", "after"]
    assert {"good", "well"} == {artifact.record.name for artifact in outcome.artifacts.values()}
    assert "failed   bad: ValueError: the sky fell" in text
    assert "not run  between: it needs bad" in text
    assert not any(path.is_file() for path in Path(store.files.inside("leases")).glob("*.json"))

    mended, _, _ = execute(store, step("after", ADD, log, step("between", ADD, log, step("bad", ADD, log), value=2)))
    assert not mended.failed
    assert log.read_text().count("good") == 1


def test_a_list_that_fails_in_part_keeps_what_it_committed(store: Store, log: Path) -> None:
    first, second, third = chain("a", 3, log)
    second = replace(second, placement=How(log=log, fail="no memory"))
    third = replace(third, inputs={"input0": second})
    others = chain("b", 2, log, value=10)
    outcome, _, _ = execute(store, third, *others, lanes=1)
    assert outcome.failed == {"a/2": "no memory"}
    assert outcome.not_run == ["a/3"]
    assert {artifact.record.name for artifact in outcome.artifacts.values()} == {"a/1", "b/1", "b/2"}
    log.write_text("")
    outcome, _, _ = execute(store, chain("a", 3, log)[-1], *others)
    assert outcome.artifacts[third.fingerprint].metrics == {"sum": 6.0}
    assert log.read_text().split("\n") == ["list of 2", "a/2", "a/3", ""]
    assert first.fingerprint in outcome.artifacts


def test_a_list_whose_function_raises_fails_only_what_could_have_run(store: Store, log: Path) -> None:
    broken = Kind("broken", absent, 1, together=True)
    first = Step("one", broken, Number())
    second = Step("two", broken, Number(value=2), {"before": first})
    outcome, _, _ = execute(store, second, step("other", ADD, log))
    assert "absent" in outcome.failed["one"]
    assert outcome.not_run == ["two"]
    assert len(outcome.artifacts) == 1


def test_chains_stay_whole_and_lists_are_balanced(log: Path) -> None:
    chains = [chain(name, length, log, value=10.0 * length) for name, length in (("a", 2), ("b", 3), ("c", 1))]
    steps = [s for round in zip(*(c + [None] * 3 for c in chains), strict=False) for s in round if s]
    parts = divide(steps, 2)
    assert [[s.name for s in part] for part in parts] == [["b/1", "b/2", "b/3"], ["a/1", "a/2", "c/1"]]
    assert len(divide(steps, 8)) == 3
    merged = step("merged", ROUNDS, log, chains[0][-1], chains[1][-1])
    assert len(divide([*steps, merged], 8)) == 2


def test_lists_run_side_by_side_and_never_more_than_there_are_lanes(store: Store, log: Path) -> None:
    asked: list[int] = []

    def count(steps: Sequence[Step]) -> int:
        asked.append(len(steps))
        assert sum(thread.name.startswith("c") for thread in threading.enumerate()) <= 2
        return 2

    ends = [chain(f"c{index}", 2, log, value=10.0 * index, sleep=0.05)[-1] for index in range(3)]
    slow = step("slow", ROUNDS, log, step("late", ADD, log, sleep=0.2))
    run([*ends, slow], store, lambda: None, count, Console(quiet=True))
    lists = [line for line in log.read_text().split("\n") if line.startswith("list")]
    assert sorted(lists) == ["list of 1", "list of 2", "list of 4"]
    assert asked[0] == 6


def test_the_drawing_says_what_is_done(store: Store, log: Path) -> None:
    steps = diamond(log)
    execute(store, steps[0])
    console = Console(width=100)
    with console.capture() as captured:
        console.print(draw([step("report", ADD, log, *steps)], store))
    text = captured.get()
    assert "7 steps: 2 done, 5 to do" in text
    assert "done   base" in text
    assert "to do  right" in text
    assert "report  also needs " in text
    assert text.index("base") < text.index("right") < text.index("round/1") < text.index("round/3")


def test_more_workers_than_the_cluster_holds_are_refused_with_the_arithmetic() -> None:
    two = [{"CPU": 2.0}]
    check_fits(2, 1, on=two)
    check_fits(4, 0.5, on=two)
    with pytest.raises(CorsaError, match=r"3 workers x 1 CPU = 3 CPU asked, the cluster has 2 \(1 node\): ask for at"):
        check_fits(3, 1, on=two)
    with pytest.raises(CorsaError, match="1 GPU = 1 GPU asked, the cluster has 0"):
        check_fits(1, 1, 1, on=two)
    with pytest.raises(CorsaError, match=r"\(3 nodes, a worker runs on one\): ask for less per worker"):
        check_fits(1, 3, on=two * 3)
    with pytest.raises(CorsaError, match="x 1 CPU"):
        check_fits(10_000, 1)  # before there is a cluster: against this machine


def test_lanes() -> None:
    assert lanes({"CPU": 2.0}, {"CPU": 0.5}) == 4
    assert lanes({"CPU": 0.3}, {"CPU": 0.1}) == 3
    assert lanes({"CPU": 16.0, "GPU": 2.0}, {"CPU": 4, "GPU": 1}) == 2
    assert lanes({"CPU": 1.0}, {"CPU": 2}) == 0


def test_progress_lines() -> None:
    line = {"chain": "corsa/seed0", "round": 2, "rounds": 3, "epoch": 4, "epochs": 10, "step": 7, "steps": 20}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(
            table([line | {"phase": "training", "loss": 0.12345, "eta_s": 75.2}, {"chain": "a", "phase": "x"}])
        )
    first, second = captured.get().rstrip().split("\n")
    assert first.split() == ["a", "x"]
    assert " ".join(second.split()) == "corsa/seed0 training round 2/3 epoch 4/10 step 7/20 loss 0.123 0:01:15 left"
