"""Writes the model card of an adapter (README.md), for readers and for the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from corsa.config import ModelConfig
from corsa.data.edit import Edit
from corsa.editing.history import Update
from corsa.models.registry import LICENCES, hub_name
from corsa.terminal import visible

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LONGEST = 500  # characters of one text


def plain(text: str) -> str:
    r"""Escapes a text for Markdown, so that it makes no HTML, image, link, mention, formula, heading or new table cell.

    >>> print(plain("a|b <img src=x> ![](http://x) **c**"))
    a\|b \<img src=x\> \!\[\](http&#58;//x) \*\*c\*\*
    """
    line = visible(" ".join(text.split()))
    line = line if len(line) <= _LONGEST else line[:_LONGEST] + "..."
    line = re.sub(r"[\\`*_{}\[\]<>#|!~&$]", r"\\\g<0>", line)
    line = re.sub(r"^([-+=]|\d+(?=[.)]))", lambda start: re.sub(r"[-+=]|$", r"\\\g<0>", start[0], count=1), line)
    line = re.sub(r"(?i)\bwww\.", lambda found: found[0][:-1] + "&#46;", line)
    return line.replace("://", "&#58;//").replace("@", "&#64;").replace("mailto:", "mailto&#58;")


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
        updates: all updates of the line; the last one made this adapter.
        edits: the latest edit of each fact.
        metrics: of the last round, {name: {label, value, edits, probes, ...}}, from `corsa.evaluation.metrics`.
        settings: training settings, {name: value}.
    """
    name = hub_name(model.name)
    hub = _HUB.fullmatch(name) is not None
    environment = Environment(
        loader=PackageLoader("corsa.editing", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["text"] = plain
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
