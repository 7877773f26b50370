"""The schedule of a run, simulated: the flow's own runner decides what starts when, and a clock replaces the work."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from corsa.flow.runner import Runner
from corsa.flow.step import Step, topological
from corsa.flow.task import Silent
from corsa.terminal import Console

Seconds = Callable[[Step], float]


@dataclass(frozen=True)
class Span:
    """When a step ran, in seconds from the start of the run. lane: the list of steps that it was in; -1: in this
    process.
    """

    step: Step
    start: float
    end: float
    lane: int


@dataclass(frozen=True)
class Schedule:
    """The spans of all steps. lanes: groups side by side."""

    spans: list[Span]
    lanes: int

    @property
    def seconds(self) -> float:
        """The time of the run."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def idle(self) -> float:
        """The share of the groups' time in which they do nothing."""
        busy = sum(span.end - span.start for span in self.spans if span.lane >= 0)
        return 1 - busy / (self.seconds * self.lanes) if self.seconds else 0.0

    def critical_path(self, seconds: Seconds) -> list[Step]:
        """The chain of dependent steps that takes longest: no number of groups makes the run shorter."""
        total: dict[str, float] = {}
        before: dict[str, Step | None] = {}
        steps = [span.step for span in self.spans]
        for step in topological(steps):
            last = max(step.inputs.values(), key=lambda one: total[one.fingerprint], default=None)
            before[step.fingerprint] = last
            total[step.fingerprint] = seconds(step) + (total[last.fingerprint] if last else 0.0)
        at: Step | None = max(steps, key=lambda step: total[step.fingerprint], default=None)
        path = []
        while at is not None:
            path.append(at)
            at = before[at.fingerprint]
        return path[::-1]


def simulate(targets: Sequence[Step], seconds: Seconds, lanes: int, starting: float = 0.0, cores: int = 1) -> Schedule:
    """The schedule of steps and all that they need, none of which is done.

    Args:
        targets: the steps.
        seconds: of a step, without the start of its group.
        lanes: groups that the cluster runs side by side.
        starting: seconds until a group that was started takes its first step.
        cores: steps that this process runs side by side.
    """
    return _Simulation(topological(targets), seconds, lanes, starting, cores).schedule()


class _Simulation(Runner):
    """The runner with a clock: starting a list puts the ends of its steps on the clock, waiting moves it on."""

    def __init__(self, order: list[Step], seconds: Seconds, lanes: int, starting: float, cores: int) -> None:
        store: Any = None  # nothing is looked up or written
        super().__init__(order, store, lambda: None, lambda steps: lanes, Console(quiet=True))
        self.seconds_of, self.side_by_side, self.starting, self.cores = seconds, lanes, starting, cores
        self.progress = Silent()
        self.waiting = {step.fingerprint: step for step in order}
        self.clock, self.spans = 0.0, list[Span]()
        self._ends: list[tuple[float, int, Step, list[Step]]] = []
        self._number, self._lane = count(), count()
        self._done: Any = object()

    def schedule(self) -> Schedule:
        """Runs everything."""
        while self.waiting or self.running:
            for steps in self.ready():
                self.start(steps)
            self.settle()
        return Schedule(self.spans, self.side_by_side)

    def start(self, steps: list[Step]) -> None:
        """Put the ends of a list's steps on the clock, one after the other."""
        outside = steps[0].kind.on_cluster or steps[0].kind.together
        lane, at = (next(self._lane), self.clock + self.starting) if outside else (-1, self.clock)
        self.running.append(steps)
        for step in steps:
            del self.waiting[step.fingerprint]
            end = at + self.seconds_of(step)
            self.spans.append(Span(step, at, end, lane))
            heapq.heappush(self._ends, (end, next(self._number), step, steps))
            at = end

    def settle(self) -> None:
        """Move the clock to the next end."""
        self.clock, _, step, steps = heapq.heappop(self._ends)
        self.outcome.artifacts[step.fingerprint] = self._done
        if all(one.fingerprint in self.outcome.artifacts for one in steps):
            self.running.remove(steps)
