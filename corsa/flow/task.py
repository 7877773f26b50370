"""What a step's function gets: its configuration, its finished inputs, and a place to write to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from corsa.flow.step import Step
from corsa.flow.store import Artifact, Store


class Progress(Protocol):
    """Where running steps report their progress."""

    def post(self, line: Mapping[str, Any]) -> None:
        """Show the line `{chain, phase, round, rounds, epoch, epochs, step, steps, edit, edits, loss, eta_s, answered,
        probes}`; never blocks.

        Every key but `chain` may be absent. A line replaces the last one of its chain; phase "done" removes it.
        """
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def post(self, line: Mapping[str, Any]) -> None:
        del line


@dataclass(frozen=True, eq=False)
class Task:
    """A step about to be run. Picklable: it can be committed from any process that reaches the store."""

    step: Step
    store: Store
    progress: Progress = field(default_factory=Silent)

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def fingerprint(self) -> str:
        return self.step.fingerprint

    @property
    def config(self) -> Any:
        return self.step.config

    @property
    def placement(self) -> Any:
        return self.step.placement

    @property
    def inputs(self) -> dict[str, Artifact]:
        """The inputs by name. One that is an earlier task of the same list can be read once that is committed."""
        return {name: self.store.artifact(needed.fingerprint) for name, needed in self.step.inputs.items()}

    @property
    def partial(self) -> str:
        """Path or URL of a scratch area that outlives a crash, for checkpoints; removed when the step is committed."""
        return self.store.partial(self.fingerprint)

    @property
    def finished(self) -> Artifact | None:
        """The result, if the step has been committed by any driver."""
        return self.store.find(self.step, checksums=True)

    @cached_property
    def output(self) -> Path:
        """An empty local directory to write to. Every process that asks gets its own; the one that commits counts."""
        return self.store.workspace(self.step)

    def __getstate__(self) -> dict[str, Any]:
        known = {"step": self.step, "store": self.store, "progress": self.progress}
        return known  # without `output`: another process starts with an empty one

    def commit(self, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        """Make what was written visible as the step's result. If another driver was faster, its result is returned."""
        return self.store.commit(self.step, self.output, metrics, seconds)
