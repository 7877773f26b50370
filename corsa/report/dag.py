"""Draws the steps of a run as a graph: layers from left to right, with the critical path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

_BOX, _GAP, _ROW, _LINE = 148, 26, 60, 23
"""Box width, gap between layers and row height in pixels; characters per line of a box."""


@dataclass(frozen=True)
class Node:
    """One step. `share`: its time relative to the slowest step's. `lines`: its name, split to fit the box."""

    name: str
    seconds: float | None
    state: str
    inputs: tuple[str, ...]
    x: int
    y: int
    share: float
    critical: bool

    @property
    def lines(self) -> list[str]:
        """The name on one or two lines, broken at a slash if possible. A name that is too long loses its start."""
        if len(self.name) <= _LINE:
            return [self.name]
        breaks = [i for i, letter in enumerate(self.name) if letter == "/" and len(self.name) - i - 1 <= _LINE]
        at = breaks[0] + 1 if breaks else len(self.name) - _LINE
        head, tail = self.name[:at], self.name[at:]
        return [head if len(head) <= _LINE else "…" + head[1 - _LINE :], tail]


@dataclass(frozen=True)
class Edge:
    """An edge from a step to one that depends on it, as an SVG path."""

    path: str
    critical: bool


@dataclass(frozen=True)
class Dag:
    """The drawing, without transitive edges.

    `seconds`: total time of all steps. `longest`: total time of the critical path.
    """

    nodes: list[Node]
    edges: list[Edge]
    width: int
    height: int
    seconds: float
    longest: float
    box: int = _BOX

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, Any]]) -> Dag:
        """Builds the drawing from steps {name, seconds, state, inputs: names} in topological order. Inputs that are not
        among the steps are ignored.
        """
        took = {step["name"]: float(step.get("seconds") or 0) for step in steps}
        inputs = {
            step["name"]: tuple(dict.fromkeys(name for name in step.get("inputs") or () if name in took))
            for step in steps
        }
        depth: dict[str, int] = {}
        reached: dict[str, float] = {}
        for name in took:
            depth[name] = max((depth[needed] + 1 for needed in inputs[name]), default=0)
            reached[name] = took[name] + max((reached[needed] for needed in inputs[name]), default=0.0)
        way = _slowest_way(inputs, reached)
        drawn = {name: _direct(name, inputs) for name in took}
        rows = _rows(inputs, depth)
        top = max(took.values(), default=0) or 1
        layers, most = max(depth.values(), default=0) + 1, max(rows.values(), default=0) + 1
        place = {name: (depth[name] * (_BOX + _GAP) + 1, round(rows[name] * _ROW) + 1) for name in took}
        nodes = [
            Node(
                step["name"],
                step.get("seconds"),
                str(step.get("state") or ""),
                inputs[step["name"]],
                *place[step["name"]],
                share=took[step["name"]] / top,
                critical=step["name"] in way,
            )
            for step in steps
        ]
        edges = [
            Edge(_curve(place[needed], place[name]), (needed, name) in pairwise(way))
            for name in took
            for needed in drawn[name]
        ]
        edges.sort(key=lambda edge: edge.critical)  # drawn last, so on top
        return cls(
            nodes,
            edges,
            width=layers * (_BOX + _GAP) - _GAP + 2,
            height=round(most * _ROW) - 10,
            seconds=sum(took.values()),
            longest=max(reached.values(), default=0.0),
        )


def _slowest_way(inputs: Mapping[str, Sequence[str]], reached: Mapping[str, float]) -> list[str]:
    """The critical path: from the last step to finish, back through the input that finished latest each time."""
    way: list[str] = []
    at = max(reached, key=reached.__getitem__, default=None)
    while at is not None:
        way.insert(0, at)
        at = max(inputs[at], key=reached.__getitem__, default=None)
    return way


def _direct(name: str, inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """The inputs of a step that no other input of it depends on. The others need no edge."""
    below: set[str] = set()
    open_ = [further for needed in inputs[name] for further in inputs[needed]]
    while open_:
        at = open_.pop()
        if at not in below:
            below.add(at)
            open_.extend(inputs[at])
    return [needed for needed in inputs[name] if needed not in below]


def _rows(inputs: Mapping[str, Sequence[str]], depth: Mapping[str, int]) -> dict[str, float]:
    """Each step's row within its layer: near the mean row of its inputs, so that few edges cross."""
    layers: dict[int, list[str]] = {}
    for name, layer in depth.items():
        layers.setdefault(layer, []).append(name)
    rows: dict[str, float] = {}
    for layer in sorted(layers):

        def wanted(name: str) -> float:
            return sum(rows[needed] for needed in inputs[name]) / len(inputs[name]) if inputs[name] else 0.0

        free = 0.0
        for name in sorted(layers[layer], key=wanted):
            rows[name] = max(free, wanted(name))
            free = rows[name] + 1
    return rows


def _curve(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + _BOX, start[1] + 24, end[0], end[1] + 24
    bend = max((x2 - x1) / 2, 12)
    return f"M{x1} {y1}C{x1 + bend:g} {y1} {x2 - bend:g} {y2} {x2} {y2}"
