"""A step whose probes another engine answers after its training: what its worker group leaves for that."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from corsa.flow.step import Kind, Step, StepFunction
from corsa.flow.store import Artifact
from corsa.flow.task import Task


class Unanswered(Task):
    """The task of a step without its answers. Its result is that of another step, `left`, until the answers are there:
    the adapter, the curves, and a table of predictions in which only the log-probabilities are known.
    """

    @cached_property
    def left(self) -> Step:
        """The step under which the worker group commits."""
        kind = Kind("unanswered", _in_its_group, self.step.kind.version)
        return Step(f"{self.step.name}/unanswered", kind, self.step.config, self.step.inputs, self.step.placement)

    @cached_property
    def left_there(self) -> Artifact:
        """What the worker group left."""
        return self.store.artifact(self.left.fingerprint)

    @property
    def finished(self) -> Artifact | None:
        return self.store.find(self.left, checksums=True)

    @cached_property
    def output(self) -> Path:
        return self.store.workspace(self.left)

    def commit(self, metrics: Mapping[str, Any], seconds: float) -> Artifact:
        return self.store.commit(self.left, self.output, metrics, seconds)


def _in_its_group() -> StepFunction:
    raise AssertionError("its worker group makes it (corsa.training.vllm_rounds)")
