"""Published results of the paper (Nguyen et al. 2026, arXiv 2602.03696), shown next to the results of a run.

Every entry names its source. The paper's models (4B parameters and more) and data (the whole benchmarks) differ from
most runs of this project, so the page shows both values and never subtracts them. Single cells of the tables are not
included: only the abstract's statements could be checked against the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published number. `metric` is the matching metric of `corsa.evaluation.metrics`: the first method's value
    minus the second's.
    """

    table: str
    text: str
    value: str
    metric: str
    methods: tuple[str, str]
    source: str


PUBLISHED = (
    Published(
        "Table 1",
        "generality, CoRSA above LoRA, average over three fact benchmarks",
        "+12.42 points",
        "generality",
        ("corsa", "lora"),
        "abstract",
    ),
    Published(
        "Table 1",
        "generality, CoRSA above model editing methods, average over three fact benchmarks",
        "+10 points",
        "generality",
        ("corsa", "memit"),
        "abstract",
    ),
    Published(
        "Table 2",
        "forgetting with multiple updates, CoRSA below LoRA",
        "-27.82 %",
        "forgetting",
        ("corsa", "lora"),
        "abstract (over all its settings of multiple updates)",
    ),
    Published(
        "Table 3",
        "forgetting with multiple updates, CoRSA below LoRA",
        "-27.82 %",
        "forgetting",
        ("corsa", "lora"),
        "abstract (over all its settings of multiple updates)",
    ),
    *(
        Published(
            "Table 6",
            f"UPass@5, CoRSA above the strongest baseline (here: {name})",
            "+5.48 points",
            "upass_5",
            ("corsa", method),
            "abstract",
        )
        for method, name in (("lora", "LoRA"), ("f-learning", "F-Learning"))
    ),
)


def differs(metrics: dict[str, Any]) -> str:
    """How a report's measurement differs from the paper's; "" if it follows the protocol of the paper's code."""
    if (metrics["protocol"], metrics["rule"]) == ("authors", "contains"):
        return ""
    here = f"the protocol “{metrics['protocol']}” and the rule “{metrics['rule']}”"
    return (
        "The paper's figures come from the protocol “authors”: answers sampled at temperature 0.7 in the chat "
        "template, up to 128 tokens, the first paraphrase, a plain lower-cased substring test of the target without "
        f"aliases. This run has {here}, which is another measure."
    )


def with_measured(metrics: dict[str, Any]) -> list[tuple[Published, dict[str, Any] | None]]:
    """The published numbers for a report's tables, each with the run's own comparison if there is one."""
    found = {(c["metric"], c["a"], c["b"]): c for c in metrics["comparisons"]}
    rows = []
    for entry in PUBLISHED:
        if entry.table in metrics.get("published", ()):
            a, b = entry.methods
            mine = found.get((entry.metric, a, b))
            if mine is None and (other := found.get((entry.metric, b, a))):
                low, high = other["low"], other["high"]
                turned = {"difference": -other["difference"], "low": None, "high": None}
                if low is not None:
                    turned |= {"low": -high, "high": -low}
                mine = {**other, **turned}
            rows.append((entry, mine))
    return rows
