"""Draws the DAG as a tree, for `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from rich.tree import Tree

from corsa.flow.step import Step, topological
from corsa.flow.store import Store


def draw(steps: Sequence[Step], store: Store) -> Tree:
    """The steps and everything they depend on as a tree. Each step shows its state: done, with its duration, or to do.

    A step is drawn below the input with the longest chain of its own. Its other inputs are named on its line.
    """
    order = topological(steps)
    depth: dict[str, int] = {}
    trees: dict[str, Tree] = {}
    done = 0
    root = Tree("", guide_style="dim")
    for step in order:
        needed = sorted(step.inputs.values(), key=lambda other: depth[other.fingerprint], reverse=True)
        depth[step.fingerprint] = depth[needed[0].fingerprint] + 1 if needed else 0
        result = store.find(step)
        done += result is not None
        label = Text.assemble(("done   ", "green") if result else ("to do  ", "yellow"), step.name)
        if result:
            label.append(f"  {result.record.seconds:.1f} s", style="dim")
        if needed[1:]:
            label.append(f"  also needs {', '.join(dict.fromkeys(other.name for other in needed[1:]))}", style="dim")
        trees[step.fingerprint] = (trees[needed[0].fingerprint] if needed else root).add(label)
    root.label = Text(f"{len(order)} steps: {done} done, {len(order) - done} to do")
    return root
