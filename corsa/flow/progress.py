"""Progress of a run: a live line per chain on a terminal, plain lines elsewhere. Workers of the cluster report it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from corsa.flow.task import Progress, Silent
from corsa.flow.waiting import waited_for

_LOOK = 0.5  # seconds between looks at the board
_LAST = 5.0  # seconds that the last look may take
_PERIOD = 60.0  # seconds between two plain lines of a chain that stays in one phase
_PATIENCE = 45.0  # seconds without any progress before the cluster is asked what is waited for
_KEPT = 1000  # changes of phase that are kept until the next look


class ProgressBoard:
    """The latest line of every chain, in a Ray actor without a name. Picklable: pass it to the workers."""

    def __init__(self) -> None:
        import ray

        self._board = ray.remote(num_cpus=0)(Board).remote()

    def post(self, line: Mapping[str, Any]) -> None:
        """Does not wait, and does not fail when the board is gone: a progress report must never end a run."""
        with suppress(Exception):
            self._board.post.remote(dict(line))

    def look(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """As `Board.look`."""
        import ray

        return ray.get(self._board.look.remote())


class Board:
    """What the actor holds."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[str, Any]] = {}
        self._begun: list[dict[str, Any]] = []

    def post(self, line: dict[str, Any]) -> None:
        before = self._lines.get(line["chain"], {})
        if line.get("phase") == "done":
            self._lines.pop(line["chain"], None)
            return
        self._lines[line["chain"]] = line
        if any(before.get(key) != line.get(key) for key in ("phase", "round")):
            self._begun = [*self._begun, line][-_KEPT:]

    def look(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The lines of the running chains, and the first line of every phase that has begun since the last look."""
        begun, self._begun = self._begun, []
        return list(self._lines.values()), begun


@contextmanager
def watch(console: Console, running: Callable[[], Sequence[Sequence[str]]], quiet: bool = False) -> Iterator[Progress]:
    """A `Progress` that the console shows: on a terminal one live line per chain, elsewhere a plain line at each phase
    and every minute. If nothing changes, a line says what is waited for.

    Args:
        console: where it is shown.
        running: names the steps that are running, in lists of those that run one after another.
        quiet: show nothing. Without a cluster nothing is shown either.
    """
    if quiet or "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        yield Silent()
        return
    board, over = ProgressBoard(), threading.Event()
    with ExitStack() as closing:
        live = closing.enter_context(Live(console=console, transient=True)) if console.is_terminal else None
        report = Report(waited_for)

        def look() -> None:
            lines, begun = board.look()
            if live:
                live.update(table(lines))
            said = report.at(time.monotonic(), lines, begun, running())
            for line in said if live is None else [line for line in said if line.startswith("waiting")]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        def poll() -> None:
            while not over.wait(_LOOK):
                with suppress(Exception):  # the cluster may go before the run ends; the run itself says so
                    look()

        thread = threading.Thread(target=poll, name="progress", daemon=True)
        thread.start()
        closing.callback(thread.join, _LAST)  # leaving the cluster under a thread that asks it can crash
        closing.callback(over.set)
        yield board


class Report:
    """Decides which plain lines are printed, and when. `waited_for` asks the cluster what is waited for."""

    def __init__(self, waited_for: Callable[[], str | None]) -> None:
        self._waited_for = waited_for
        self._seen: Any = None
        self._moved = self._asked = 0.0
        self._said: dict[str, float] = {}  # name of a chain or step -> when it was last said

    def at(
        self,
        now: float,
        lines: Sequence[dict[str, Any]],
        begun: Sequence[dict[str, Any]],
        running: Sequence[Sequence[str]],
    ) -> list[str]:
        """The lines to print at time `now` (seconds of a monotonic clock). Steps without a line share one per list."""
        if (seen := (list(lines), list(running))) != self._seen:
            self._seen, self._moved, self._asked = seen, now, now
        said = [self._say(now, line["chain"], cells(line)[1:]) for line in begun]
        chains = {line["chain"]: line for line in lines}
        more = {name: cells(line)[1:] for name, line in chains.items()}
        for first, *later in running:
            if not any(name == c or name.startswith(f"{c}/") for name in (first, *later) for c in chains):
                more[first] = [f"and {len(later)} more step{'s' * (len(later) > 1)}"] if later else []
        for name, what in more.items():
            if now - self._said.setdefault(name, now) >= _PERIOD:
                said.append(self._say(now, name, what))
        self._said = {name: when for name, when in self._said.items() if name in more}
        if running and now - self._asked >= _PATIENCE:
            self._asked = now
            if what := self._waited_for():
                said.append(f"waiting  nothing has moved for {now - self._moved:.0f} s: {what}")
        return said

    def _say(self, now: float, name: str, more: Sequence[str]) -> str:
        self._said[name] = now
        return "  ".join(["running", name, *(cell for cell in more if cell)])


def cells(line: Mapping[str, Any]) -> list[str]:
    """The parts of a line: chain, phase and progress.

    >>> cells({"chain": "corsa/seed0", "phase": "training", "epoch": 2, "epochs": 9, "loss": 0.5, "eta_s": 61})
    ['corsa/seed0', 'training', 'epoch 2/9', 'loss 0.500', '0:01:01 left']
    """
    found = [line["chain"], line.get("phase", "")]
    for unit in ("round", "epoch", "step", "edit"):
        if unit in line:
            total = line.get(f"{unit}s")
            found.append(f"{unit} {line[unit]}" + (f"/{total}" if total else ""))
    if line.get("loss") is not None:
        found.append(f"loss {line['loss']:.3f}")
    if line.get("eta_s") is not None:
        found.append(f"{timedelta(seconds=round(line['eta_s']))} left")
    if line.get("probes"):
        found.append(f"{line['answered']} of {line['probes']} probes answered")
    return found


def table(lines: list[dict[str, Any]]) -> Table:
    """The lines as a terminal shows them, sorted by chain.

    >>> from rich.console import Console
    >>> Console(width=80).print(table([{"chain": "corsa/seed0", "round": 2, "rounds": 3, "phase": "loading"}]))
    corsa/seed0  loading  round 2/3
    """
    grid = Table.grid(padding=(0, 2))
    for line in sorted(lines, key=lambda line: line["chain"]):
        grid.add_row(*cells(line))
    return grid
