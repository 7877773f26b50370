"""Steps as a DAG: what a step is (`step`), where its results live (`store`), who runs them and when (`runner`).

Flow knows nothing of models, methods or data. Ray is imported only by `cluster` and `progress`, and only when called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corsa.flow.drawing import draw as draw
    from corsa.flow.runner import Outcome as Outcome
    from corsa.flow.runner import run as run
    from corsa.flow.step import Kind as Kind
    from corsa.flow.step import Step as Step
    from corsa.flow.step import StepFunction as StepFunction
    from corsa.flow.store import Artifact as Artifact
    from corsa.flow.store import DamagedError as DamagedError
    from corsa.flow.store import MissingError as MissingError
    from corsa.flow.store import Record as Record
    from corsa.flow.store import Store as Store
    from corsa.flow.task import Progress as Progress
    from corsa.flow.task import Task as Task

_WHERE = {
    "draw": "corsa.flow.drawing",
    "Outcome": "corsa.flow.runner",
    "run": "corsa.flow.runner",
    "Kind": "corsa.flow.step",
    "Step": "corsa.flow.step",
    "StepFunction": "corsa.flow.step",
    "Artifact": "corsa.flow.store",
    "DamagedError": "corsa.flow.store",
    "MissingError": "corsa.flow.store",
    "Record": "corsa.flow.store",
    "Store": "corsa.flow.store",
    "Progress": "corsa.flow.task",
    "Task": "corsa.flow.task",
}
"""Imported on first use: `corsa --help` needs steps (for the list of methods), but no store, which imports pyarrow."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
