"""Toy steps for the tests of `corsa.flow`, and a driver that tests kill: `python flow_steps.py STORE LOG [SLEEP]`."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from corsa.config import Frozen
from corsa.flow import Kind, Outcome, Progress, Step, StepFunction, Store, Task, run


class Number(Frozen):
    value: float = 1.0


class How(Frozen):
    """How a toy step runs: its log, its duration, and whether it fails."""

    log: Path
    sleep: float = 0.0
    fail: str = ""


def add(task: Task) -> dict[str, float]:
    """The step's value plus the values of its inputs. Every execution writes a line to the log."""
    with task.placement.log.open("a") as log:
        log.write(f"{task.name}\n")
    total = task.config.value + sum(float(needed.read("folder/sum.txt")) for needed in task.inputs.values())
    (task.output / "folder").mkdir()
    (task.output / "folder" / "sum.txt").write_text(str(total))
    time.sleep(task.placement.sleep)
    if task.placement.fail:
        raise ValueError(task.placement.fail)
    return {"sum": total}


def add_all(tasks: list[Task], progress: Progress) -> dict[str, str]:
    """Runs a list in one call. A step that fails, and the steps after it, are missing from the result."""
    causes: dict[str, str] = {}
    with tasks[0].placement.log.open("a") as log:
        log.write(f"list of {len(tasks)}\n")
    for task in tasks:
        if not any(needed.fingerprint in causes for needed in task.inputs.values()):
            progress.post({"chain": task.name, "phase": "training"})
            try:
                task.commit(add(task), 0.0)
            except ValueError as error:
                causes[task.fingerprint] = str(error)
        else:
            causes[task.fingerprint] = "never shown: the step it needs has failed"
    return causes


def fill_disk(task: Task) -> dict[str, float]:
    """Writes until the disk is full."""
    with (task.output / "big").open("wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return {}


def load_add() -> StepFunction:
    return add


def load_add_all() -> StepFunction:
    return add_all


def load_fill_disk() -> StepFunction:
    return fill_disk


ADD = Kind("add", load_add, 1)
CLUSTER = Kind("cluster", load_add, 1, on_cluster=True)
ROUNDS = Kind("rounds", load_add_all, 1, together=True)
FILL = Kind("fill", load_fill_disk, 1)


def step(
    name: str, kind: Kind, log: Path, *inputs: Step, value: float = 1.0, sleep: float = 0.0, fail: str = ""
) -> Step:
    named = {f"input{index}": needed for index, needed in enumerate(inputs)}
    return Step(name, kind, Number(value=value), named, How(log=log, sleep=sleep, fail=fail))


def chain(name: str, length: int, log: Path, *inputs: Step, value: float = 1.0, sleep: float = 0.0) -> list[Step]:
    """A chain of rounds; the first needs `inputs`."""
    rounds: list[Step] = []
    for index in range(length):
        before = rounds[-1:] or list(inputs)
        rounds.append(step(f"{name}/{index + 1}", ROUNDS, log, *before, value=value + index, sleep=sleep))
    return rounds


def execute(store: Store, *steps: Step, lanes: int = 2) -> tuple[Outcome, str, int]:
    """The outcome, the printed text, and the number of requests for a cluster."""
    connections: list[None] = []
    text = io.StringIO()
    outcome = run(
        steps, store, lambda: connections.append(None), lambda _: lanes, Console(file=text, force_terminal=False)
    )
    return outcome, text.getvalue(), len(connections)


def diamond(log: Path, sleep: float = 0.0) -> list[Step]:
    """Base -> (left, right) -> three rounds; returns the last of each."""
    base = step("base", ADD, log, sleep=sleep)
    left = step("left", ADD, log, base, value=2, sleep=sleep)
    right = step("right", CLUSTER, log, base, value=3, sleep=sleep)
    return [left, *chain("round", 3, log, right, sleep=sleep)]


if __name__ == "__main__":
    store, log, sleep = Store(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    print(os.getpid(), flush=True)
    try:
        outcome = run(diamond(log, sleep), store, lambda: None, lambda _: 1, Console(soft_wrap=True))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(bool(outcome.failed))
