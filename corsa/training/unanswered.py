"""A step whose probes another engine answers after its training: what its worker group leaves for that."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from corsa.flow.store import Artifact, Store
from corsa.flow.task import Task


class Unanswered(Task):
    """The task of a step without its answers. What the group leaves is kept beside the step's checkpoints until the
    answers are there: the adapter, the curves, and predictions of which only the log-probabilities are known.
    """

    @cached_property
    def beside(self) -> Store:
        """Where the worker group commits. It is removed when the step itself is committed."""
        return self.store.within(f"partial/{self.fingerprint[:16]}")

    @cached_property
    def left(self) -> Artifact:
        """What the worker group left."""
        return self.beside.artifact(self.fingerprint)

    @property
    def finished(self) -> Artifact | None:
        return self.beside.find(self.step, checksums=True)

    @cached_property
    def output(self) -> Path:
        return self.beside.workspace(self.step)

    def commit(self, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        return self.beside.commit(self.step, self.output, metrics, seconds)
