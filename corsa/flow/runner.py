"""Runs the steps that are not done yet: independent steps in parallel, and a failure does not affect the others."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from rich.console import Console

from corsa.config import Frozen
from corsa.errors import CorsaError
from corsa.flow.lease import Leases
from corsa.flow.progress import watch
from corsa.flow.step import Kind, Step, components, topological
from corsa.flow.store import Artifact, Record, Store
from corsa.flow.task import Progress, Silent, Task

_POLL = 1.0  # seconds between looks for what a list of steps has committed


@dataclass
class Outcome:
    """The results of the steps."""

    artifacts: dict[str, Artifact] = field(default_factory=dict)  # fingerprint -> result
    failed: dict[str, str] = field(default_factory=dict)  # name -> cause
    not_run: list[str] = field(default_factory=list)  # names: something they need has failed


def run(
    steps: Sequence[Step],
    store: Store,
    connect: Callable[[], None],
    lanes: Callable[[Sequence[Step]], int],
    console: Console,
    *,
    progress: Progress | None = None,
    quiet: bool = False,
    left: Callable[[Sequence[Step], Sequence[Record]], str] = lambda steps, finished: "",
) -> Outcome:
    """Run the steps and all that they need until each has a result.

    `connect` is called once, and only if a step that needs the cluster has to be run. `lanes` says how many lists of
    the given steps the cluster can run in parallel. A step that fails is in the outcome, not raised.

    `progress` is told how far the steps are; by default the console shows it, unless `quiet`. `left` is asked when
    a step on the cluster is done: how long the other steps will take, given the records of the finished ones.

    Raises `CorsaError` if the store cannot be written to or `connect` refuses, and `KeyboardInterrupt` after Ctrl-C;
    finished steps then stay, and unfinished ones can be run again at once.
    """
    this = Runner(topological(steps), store, connect, lanes, console)
    this.progress, this.quiet, this.left = progress, quiet, left
    this.plan(targets={step.fingerprint for step in steps})
    if this.waiting:
        this.execute(steps)
    return this.outcome


class Runner:
    """Decides which steps run when, and runs them. `corsa.planning.simulation` replaces the work by a clock."""

    cores = os.cpu_count() or 1
    """Steps that run side by side in this process."""

    def __init__(
        self,
        order: list[Step],
        store: Store,
        connect: Callable[[], None],
        lanes: Callable[[Sequence[Step]], int],
        console: Console,
    ) -> None:
        self.order, self.store, self.connect, self.lanes, self.console = order, store, connect, lanes, console
        self.outcome = Outcome()
        self.waiting: dict[str, Step] = {}  # fingerprint -> step, in topological order
        self.running: list[list[Step]] = []
        self.dead: set[str] = set()  # fingerprints of what failed or needs something that did
        self.finished: SimpleQueue[tuple[list[Step], dict[str, str]]] = SimpleQueue()
        self.progress: Progress | None = None
        self.quiet = False
        self.left: Callable[[Sequence[Step], Sequence[Record]], str] = lambda steps, finished: ""
        self.closing = ExitStack()
        self.interrupted = False

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def plan(self, targets: set[str]) -> None:
        """Decide what to run. The content of results that this run uses is checked."""
        done = self.outcome.artifacts
        used = set(targets)
        for step in reversed(self.order):
            found = self.store.find(step, step.fingerprint in used, say=lambda damage: self.say(f"redone   {damage}"))
            if found:
                done[step.fingerprint] = found
            else:
                used |= {needed.fingerprint for needed in step.inputs.values()}
        self.waiting = {step.fingerprint: step for step in self.order if step.fingerprint not in done}
        self.say(f"{len(self.order)} steps: {len(done)} done, {len(self.waiting)} to do")

    def execute(self, targets: Sequence[Step]) -> None:
        self.store.prepare()
        self.leases = Leases(self.store)
        self.closing.callback(self.leases.close)
        self.leases.protect(targets, self.order)
        with self.closing:
            try:
                while self.waiting or self.running:
                    for steps in self.ready():
                        self.start(steps)
                    self.settle()
                if all(step.fingerprint in self.outcome.artifacts for step in targets):
                    self.leases.finished()
            except KeyboardInterrupt:
                self.interrupted = True  # errors of the threads are not reported from now on
                self.say("interrupted: finished steps are kept, and the same command continues from here")
                raise

    def ready(self) -> list[list[Step]]:
        """Lists of steps whose inputs exist and for which there is room now."""
        done = self.outcome.artifacts
        by_kind: dict[tuple[Kind, Frozen | None], dict[str, Step]] = {}  # one list is run in one way
        for fingerprint, step in self.waiting.items():
            found = by_kind.setdefault((step.kind, step.placement if step.kind.together else None), {})
            within = found if step.kind.together else {}
            if all(needed.fingerprint in done or needed.fingerprint in within for needed in step.inputs.values()):
                found[fingerprint] = step
        lists = []
        # Inputs of lists of steps go first: then one long list starts once, instead of several short ones.
        for (kind, _), found in sorted(by_kind.items(), key=lambda item: item[0][0].together):
            if found and (room := self.room(kind, list(found.values()), lists)) > 0:
                lists += divide(list(found.values()), room) if kind.together else [[s] for s in found.values()][:room]
        return lists

    def room(self, kind: Kind, steps: list[Step], starting: list[list[Step]]) -> int:
        """How many more lists can run in parallel: `lanes` of them on the cluster, one per core in this process."""
        outside = kind.on_cluster or kind.together
        if kind.on_cluster and self.progress is None:
            self.connect()
            self.progress = self.closing.enter_context(watch(self.console, self.at_work, self.quiet))
        limit = max(self.lanes(steps), 1) if outside else self.cores
        busy = [steps[0].kind for steps in self.running + starting]
        return limit - sum((other.on_cluster or other.together) == outside for other in busy)

    def at_work(self) -> list[list[str]]:
        """The names of the unfinished steps that run on the cluster, in lists of those that run one after another."""
        done = self.outcome.artifacts
        lists = [steps for steps in list(self.running) if steps[0].kind.on_cluster]
        return [names for steps in lists if (names := [s.name for s in steps if s.fingerprint not in done])]

    def start(self, steps: list[Step]) -> None:
        for step in steps:
            del self.waiting[step.fingerprint]
        self.running.append(steps)

        def body() -> None:
            try:
                causes = self.perform(steps)
            except BaseException as error:
                if self.interrupted:
                    return
                causes = dict.fromkeys((step.fingerprint for step in steps), self.cause(error))
            self.finished.put((steps, causes))

        # A daemon: an interrupted driver does not wait for its steps.
        threading.Thread(target=body, name=steps[0].name, daemon=True).start()

    def perform(self, steps: list[Step]) -> dict[str, str]:
        """Run a list in this thread; returns the causes of those that failed."""
        with self.leases.unfinished(steps, self.say) as unfinished:
            if not unfinished:
                return {}
            tasks = [Task(step, self.store, self.progress or Silent()) for step in unfinished]
            function = steps[0].kind.function
            self.store.sweep(unfinished)
            try:
                if steps[0].kind.together:
                    return function(tasks, tasks[0].progress)
                began = time.monotonic()
                metrics = function(tasks[0])
                tasks[0].commit(metrics, time.monotonic() - began)
                return {}
            finally:
                self.store.sweep(unfinished)  # a failed step must not keep the disk full

    def cause(self, error: BaseException) -> str:
        """The cause to show to the user. Only an unexpected error is shown with its traceback."""
        root, link = error, error
        while link is not None:
            wrapped = getattr(link, "cause", None)  # Ray's wrapper of what a worker raised
            if isinstance(wrapped, BaseException):
                root = link = wrapped
                continue
            known = self.store.files.explained(link) if isinstance(link, OSError) else link
            if isinstance(known, CorsaError):
                return str(known)
            link = link.__cause__
        self.say("".join(traceback.format_exception(error)).rstrip())
        return f"{type(root).__name__}: {root}"

    def settle(self) -> None:
        """Wait briefly for a list to end; record which steps were committed, failed or became impossible."""
        for step in (step for steps in self.running if len(steps) > 1 for step in steps):
            self.note(step)
        try:
            steps, causes = self.finished.get(timeout=_POLL)
        except Empty:
            return
        self.running.remove(steps)
        for step in steps:
            damage: list[str] = []
            if not self.note(step, damage.append) and not self.drop(step):
                missing = "; ".join(damage) or "its function returned without a result and without a cause"
                cause = causes.get(step.fingerprint, missing)
                self.outcome.failed[step.name] = cause
                self.dead.add(step.fingerprint)
                self.say(f"failed   {step.name}: {cause}")
        for fingerprint, step in list(self.waiting.items()):
            if self.drop(step):
                del self.waiting[fingerprint]

    def note(self, step: Step, say: Callable[[str], object] = lambda damage: None) -> bool:
        """Whether the step has its result by now; reported the first time. `say` gets what is wrong with a result."""
        if step.fingerprint in self.outcome.artifacts:
            return True
        if found := self.store.find(step, checksums=True, say=say):
            self.outcome.artifacts[step.fingerprint] = found
            self.say(f"done     {step.name}  {found.record.seconds:.1f} s{self.how_far(step)}")
            for text in found.metrics.get("notes", ()):
                self.say(f"note     {step.name}: {text}")
        return found is not None

    def how_far(self, step: Step) -> str:
        """How many steps are done after a step on the cluster, and how long the others will take."""
        if not step.kind.on_cluster:
            return ""
        done = self.outcome.artifacts
        todo = [step for step in self.order if step.fingerprint not in done]
        parts = [f"{len(done)} of {len(self.order)} steps", self.left(todo, [a.record for a in done.values()])]
        return f"  ({', '.join(filter(None, parts))})"

    def drop(self, step: Step) -> bool:
        """Whether the step cannot be run because something that it needs has failed."""
        if missing := [needed.name for needed in step.inputs.values() if needed.fingerprint in self.dead]:
            self.outcome.not_run.append(step.name)
            self.dead.add(step.fingerprint)
            self.say(f"not run  {step.name}: it needs {', '.join(missing)}")
        return bool(missing)


def divide(steps: Sequence[Step], lists: int) -> list[list[Step]]:
    """The steps in at most `lists` lists of similar length; dependent steps stay together, in order."""
    parts: list[list[Step]] = [[] for _ in range(lists)]
    for component in sorted(components(steps), key=len, reverse=True):
        min(parts, key=len).extend(component)
    return [part for part in parts if part]
