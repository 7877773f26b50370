"""The model card of an adapter: what people and the Hugging Face hub read of it (README.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from corsa.config import ModelConfig
from corsa.data.edit import Edit
from corsa.editing.history import Update
from corsa.models.registry import LICENCES, hub_name


def card(
    model: ModelConfig,
    updates: Sequence[Update],
    edits: Sequence[Edit],
    metrics: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """The text of README.md.

    Args:
        model: the base model.
        updates: the line, the last being this adapter's.
        edits: the facts as they stand.
        metrics: of the last round, {name: {label, value, edits, probes, ...}} as `corsa.evaluation.metrics` gives them.
        settings: how it was trained, {name: value}.
    """
    name = hub_name(model.name)
    hub = name.count("/") == 1 and not name.startswith(("/", ".", "~"))
    environment = Environment(
        loader=PackageLoader("corsa.adapters", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md").render(
        base=name,
        on_hub=hub,
        licence=LICENCES.get(name),
        template=model.template,
        updates=updates,
        edits=edits,
        metrics={n: m for n, m in metrics.items() if m["value"] is not None},
        settings=settings,
    )
