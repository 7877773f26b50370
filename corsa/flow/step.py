"""A step and its identity: a fingerprint of everything that changes the result, and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import PurePath
from typing import Any

from corsa.config import Frozen
from corsa.errors import CorsaError

_IMPORTING = threading.Lock()
"""Steps start in threads. transformers loads its modules lazily and does not support concurrent imports."""

StepFunction = Callable[..., Any]
"""`f(task) -> metrics`, or, of a kind with `together`, `f(tasks, progress) -> {fingerprint: cause}`."""


@dataclass(frozen=True)
class Kind:
    """A kind of step. Raise `version` when the function's results change: old results are then not used.

    `load` imports the function and returns it. It is called when the first step of the kind is run, so that planning
    imports nothing heavy. It is a function of a module, so that a step can be pickled.

    An ordinary function is `f(task) -> metrics`. With `together`, it is `f(tasks, progress) -> {fingerprint: cause}`:
    it gets a topologically ordered list of steps (an input may be an earlier one of the list), commits each separately
    with `task.commit` and returns the causes of those that failed. The metric `notes`, a list of texts, is printed when
    the step is done.
    """

    name: str
    load: Callable[[], StepFunction]
    version: int
    on_cluster: bool = False  # needs Ray: a run in which no such step is pending starts no cluster
    together: bool = False

    @property
    def function(self) -> StepFunction:
        """The function itself."""
        with _IMPORTING:
            return self.load()


@dataclass(frozen=True, eq=False)
class Step:
    """One node of the DAG. `name` is for people, `placement` says how it is run; neither is part of the identity."""

    name: str
    kind: Kind
    config: Frozen
    inputs: Mapping[str, Step] = field(default_factory=dict)
    placement: Frozen | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of kind, version, configuration and the inputs' fingerprints.

        Raises `CorsaError`, naming the field, for a value whose text could differ from one process to the next.
        """
        _refuse_unstable(self.config.model_dump(by_alias=True), f"step {self.name!r}: config")
        identity = {
            "kind": self.kind.name,
            "version": self.kind.version,
            "config": self.config.canonical(),
            "inputs": {name: step.fingerprint for name, step in self.inputs.items()},
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _refuse_unstable(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CorsaError(f"{where}: the key {key!r} is not text, so it cannot be part of an identity")
            _refuse_unstable(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unstable(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CorsaError(f"{where}: {value} cannot be part of an identity; use null or a finite number")
    elif not isinstance(value, str | int | float | Enum | PurePath | None):
        kind = type(value).__name__
        raise CorsaError(f"{where}: a {kind} cannot be part of an identity; use numbers, text, lists and mappings")


def topological(steps: Iterable[Step]) -> list[Step]:
    """The steps and all that they need, inputs first; equal fingerprints are one step.

    Raises `CorsaError` if two different steps share a name: reports and messages could not tell them apart.
    """
    order: dict[str, Step] = {}
    names: dict[str, str] = {}

    def visit(step: Step) -> None:
        if step.fingerprint in order:
            return
        for needed in step.inputs.values():
            visit(needed)
        if names.setdefault(step.name, step.fingerprint) != step.fingerprint:
            raise CorsaError(f"two different steps are called {step.name!r}: give each a name of its own")
        order[step.fingerprint] = step

    for step in steps:
        visit(step)
    return list(order.values())


def components(steps: Iterable[Step]) -> list[list[Step]]:
    """The steps, in their order, as connected groups: two that depend on each other among `steps` share one."""
    group: dict[str, list[Step]] = {}
    for step in steps:  # inputs come first, so every earlier relative is in a group already
        merged: list[Step] = []
        for needed in step.inputs.values():
            relatives = group.get(needed.fingerprint, merged)
            if relatives is not merged:
                merged += relatives
                group.update((member.fingerprint, merged) for member in relatives)
        merged.append(step)
        group[step.fingerprint] = merged
    return list({id(members): members for members in group.values()}.values())
