"""The progress messages of a run without a terminal, and what it says it waits for."""

from __future__ import annotations

from typing import Any

from corsa.flow.progress import Board, Report, cells
from corsa.flow.waiting import amounts, standstill

LINE = {"chain": "corsa/seed0", "phase": "training", "round": 1, "rounds": 3}


def nothing() -> str | None:
    return None


def test_a_board_tells_each_phase_once_however_short_it_was() -> None:
    board = Board()
    for line in ({"phase": "loading"}, {"phase": "training", "step": 1}, {"phase": "training", "step": 2}):
        board.post({"chain": "a"} | line)
    lines, begun = board.look()
    assert lines == [{"chain": "a", "phase": "training", "step": 2}]
    assert [line["phase"] for line in begun] == ["loading", "training"]
    assert board.look() == (lines, [])
    board.post({"chain": "a", "phase": "done"})
    assert board.look() == ([], [])


def test_a_phase_is_said_at_once_and_then_a_line_a_minute() -> None:
    report = Report(nothing)
    said: list[tuple[int, str]] = []
    for second in range(200):
        line = LINE | {"epoch": 1, "epochs": 9, "step": second, "steps": 900, "loss": 0.25, "eta_s": 900 - second}
        said += [
            (second, s) for s in report.at(second, [line], [line] if second == 5 else [], [["corsa/seed0/round1"]])
        ]
    assert [second for second, _ in said] == [5, 65, 125, 185]
    rest = "round 1/3  epoch 1/9  step 65/900  loss 0.250  0:13:55 left"
    assert said[1][1] == f"running  corsa/seed0  training  {rest}"


def test_a_step_without_a_line_of_its_own_is_said_every_minute() -> None:
    report = Report(nothing)
    said = [line for second in range(130) for line in report.at(second, [], [], [["report/continual"]])]
    assert said == ["running  report/continual"] * 2


def test_steps_that_wait_for_their_turn_have_no_line_of_their_own() -> None:
    group = ["base/anchors", "facts/base", "base/controls"]
    report = Report(nothing)
    said = [line for second in range(70) for line in report.at(second, [], [], [group])]
    assert said == ["running  base/anchors  and 2 more steps"]
    report, line = Report(nothing), {"chain": "base/anchors", "phase": "evaluating"}
    said = [text for second in range(130) for text in report.at(second, [line], [], [group, ["edits"]])]
    assert said == ["running  base/anchors  evaluating", "running  edits"] * 2


def test_probes_are_counted() -> None:
    assert cells(LINE | {"phase": "evaluating", "answered": 128, "probes": 300})[-1] == "128 of 300 probes answered"


def test_a_run_that_stands_still_says_what_it_waits_for() -> None:
    asked: list[int] = []

    def waited_for() -> str:
        asked.append(1)
        return "2 x 1 CPU are waited for"

    report = Report(waited_for)
    said: list[tuple[int, str]] = []
    for second in range(200):
        line: dict[str, Any] = LINE | {"step": min(second, 20)}  # it makes progress for twenty seconds
        said += [(second, s) for s in report.at(second, [line], [], [["x"]]) if s.startswith("waiting")]
    assert [second for second, _ in said] == [65, 110, 155]
    assert said[0][1] == "waiting  nothing has moved for 45 s: 2 x 1 CPU are waited for"
    assert len(asked) == 3


def test_nothing_is_asked_while_it_moves_and_nothing_said_where_nothing_is_waited_for() -> None:
    asked: list[int] = []
    moving, still = Report(lambda: asked.append(1)), Report(nothing)
    for second in range(300):
        moving.at(second, [LINE | {"step": second}], [], [["x"]])
        assert not [s for s in still.at(second, [], [], [["x"]]) if s.startswith("waiting")]
    assert not asked


def test_a_standstill_in_words() -> None:
    """Two trials hold a fraction of both CPUs, and their tasks request whole CPUs."""
    nodes = [{"CPU": (0.99, 1.0), "memory": (5.0, 5.0)}, {"CPU": (0.99, 1.0)}]
    assert standstill([({"CPU": 1.0}, 2)], nodes, {"Trial of this run with 0.01 CPU": 2}) == (
        "2 x 1 CPU are waited for; free: 0.99 of 1 CPU, 0.99 of 1 CPU; held by 2 x Trial of this run with 0.01 CPU"
    )
    assert amounts({"CPU_group_0_ab": 0.5, "CPU_group_ab": 0.5, "bundle_group_ab": 0.001}) == "0.5 CPU"
