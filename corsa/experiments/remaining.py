"""How long pending steps will take, as finished steps like them took in the same store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from corsa.config.steps import EditsConfig, PartConfig, QuestionsConfig
from corsa.flow import Step
from corsa.flow.store import Record


def expected(pending: Iterable[Step], finished: Iterable[Record]) -> dict[str, float]:
    """Seconds of the pending steps on the cluster, by fingerprint: the median time per fact of the most similar
    finished steps, times the facts. A step is left out if its facts are not known or nothing like it is finished.
    """
    records = {record.fingerprint: record for record in finished}
    counts = {f: r.metrics.get("edits") or r.metrics.get("questions") for f, r in records.items()}
    rates: dict[str, list[float]] = {}
    for record in records.values():
        if facts := next((counts.get(record.inputs[name]) for name in _DATA if name in record.inputs), None):
            for key in _likeness(record.kind, record.config):
                rates.setdefault(key, []).append(record.seconds / facts)
    found = {}
    for step in (step for step in pending if step.kind.on_cluster):
        facts = next((_facts(step.inputs[name], counts) for name in _DATA if name in step.inputs), None)
        key = next((key for key in _likeness(step.kind.name, step.config.canonical()) if key in rates), None)
        if facts and key:
            found[step.fingerprint] = facts * median(rates[key])
    return found


def left(pending: Sequence[Step], finished: Iterable[Record]) -> str:
    """The time that the pending steps take one after the other, as text; "" if nothing is known of any of them."""
    known = expected(pending, finished)
    unknown = sum(step.kind.on_cluster and step.fingerprint not in known for step in pending)
    if not known:
        return ""
    about = timedelta(seconds=round(sum(known.values())))
    return f"about {about} left" + f" and {unknown} step{'s' * (unknown > 1)} of which nothing is known" * bool(unknown)


_DATA = ("edits", "questions")
"""Inputs whose rows a step trains on or asks."""


def _likeness(kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    """What steps of similar speed have in common, from the closest likeness to the widest."""
    yield repr([kind, sorted((k, v) for k, v in config.items() if k not in ("seed", "round"))])
    parts = (config.get(name) for name in ("step", "training", "evaluation", "model"))
    step, training, evaluation, model = (part if isinstance(part, Mapping) else {} for part in parts)
    method = [bool(step.get("lambda")), bool(step.get("rho")), step.get("pcgrad") == "off"]
    size = [model.get("name"), model.get("dtype"), training.get("epochs"), evaluation.get("protocol")]
    yield repr([kind, sorted(config), size, method])


def _facts(data: Step, counts: Mapping[str, int | None]) -> float | None:
    """Rows of a step that reads data: counted if it is done, else at most its limit."""
    if data.fingerprint in counts:
        return counts[data.fingerprint]
    config = data.config
    if isinstance(config, PartConfig):
        whole = _facts(data.inputs["edits"], counts)
        return whole / config.parts if whole else None
    return config.limit if isinstance(config, EditsConfig | QuestionsConfig) else None
