"""The result of a run in sentences, with nothing claimed that the paired test does not bear out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from corsa.methods import METHODS

HEADLINES = ("efficacy", "forgetting", "generality", "retention", "activation")
"""The metrics of the main table and of the verdict where a report names no others."""

_SHORT = {
    "efficacy": "update efficacy",
    "retention": "retention of old",
    "activation": "activation of old",
    "edit_success": "edit success",
    "multihop": "multi-hop",
    "upass_1": "UPass@1",
    "upass_5": "UPass@5",
    "upass_single": "UPass single",
    "spass_1": "SPass@1",
    "spass_5": "SPass@5",
    "spass_single": "SPass single",
    "spass_subset_1": "SPass@1 subset",
    "spass_subset_5": "SPass@5 subset",
}

_FEW = 5
"""More methods than this are left to the table."""


def headlines(metrics: dict[str, Any]) -> dict[str, str]:
    """The metrics of a report's main table that have a value there, with their names in a sentence."""
    chosen: Sequence[str] = metrics.get("headlines", HEADLINES)
    measured = [n for n in chosen if any(row["metrics"][n]["value"] is not None for row in metrics["rows"])]
    return {name: _SHORT.get(name, name) for name in measured or chosen}


def label(method: str) -> str:
    """A method's name as it is printed; what follows its name (a setting) stays as it is."""
    name, blank, setting = method.partition(" ")
    return f"{METHODS[name].label if name in METHODS else name}{blank}{setting}"


def shown(entry: dict[str, Any], unit: str) -> tuple[str, str]:
    """A value and its interval as text, shares in percent, points as pt; ("–", "") where there is none."""
    if entry["value"] is None:
        return "–", ""
    scale, suffix = (1, " nats") if unit == "nats" else (100, " pt" if unit == "points" else " %")
    numbers = {
        key: round(scale * entry[key], 1) + 0.0 for key in ("value", "low", "high") if entry[key] is not None
    }  # + 0.0: never "-0.0"
    value = f"{numbers['value']:.1f}{suffix}"
    if "low" not in numbers:
        return value, ""
    return value, f"{numbers['low']:.1f}{' to ' if numbers['low'] < 0 else '–'}{numbers['high']:.1f}"


def findings(metrics: dict[str, Any]) -> list[str]:
    """For each pair of methods: which is better on which headline metric, and on which they cannot be told apart."""
    pairs = list(dict.fromkeys((entry["a"], entry["b"]) for entry in metrics["comparisons"]))
    if len(pairs) > 1 and any("corsa" in pair for pair in pairs):  # the other pairs are in the table of differences
        pairs = [pair for pair in pairs if "corsa" in pair]
    sentences = [sentence for a, b in pairs for sentence in _pair(metrics, a, b)]
    if metrics["probe_kind"] == "edit":
        missing = "This data has no paraphrases" if _asked(metrics) else "Paraphrases were not asked"
        sentences.append(f"{missing}: the numbers are counted on the edit prompts themselves.")
    elif fallback := metrics.get("fallback"):
        ids = _listed([f"{name}/..." for name in fallback])
        sentences.append(f"The edits {ids} have no paraphrases: they are counted on the edit prompts themselves.")
    return sentences


def _asked(metrics: dict[str, Any]) -> bool:
    """Whether paraphrases were asked, of data that has them."""
    return "paraphrase" in (metrics.get("kinds") or ("paraphrase",))


def summary(metrics: dict[str, Any]) -> str:
    """One paragraph: what was done, what each method learnt and forgot."""
    rounds = len(metrics["rounds"])
    seeds = len(metrics["seeds"])
    what = "the edit prompts" if metrics["probe_kind"] == "edit" else "paraphrases"
    opening = (
        f"{metrics['chains']} facts were taught{f' over {rounds} rounds of edits' if rounds > 1 else ''}"
        f"{f', with {seeds} seeds' if seeds > 1 else ''}, and {what} of them were asked"
        f"{' after every round' if rounds > 1 else ' afterwards'}."
    )
    sentences = [opening]
    edited = [row for row in metrics["rows"] if row["method"] != "base"]
    for row in edited if len(edited) <= _FEW else []:
        efficacy, forgetting = (row["metrics"][name] for name in ("efficacy", "forgetting"))
        if efficacy["value"] is None:
            continue
        right = shown(efficacy, "share")[0]
        facts = "the latest round's wordings" if rounds > 1 else "the wordings"
        learnt = f"{label(row['method'])} answers {right} of {facts} with the new answer"
        lost = (
            f" and has forgotten {shown(forgetting, 'share')[0]} of what it had learnt before"
            if forgetting["value"] is not None
            else ""
        )
        sentences.append(f"{learnt}{lost}.")
    return " ".join(sentences)


def _pair(metrics: dict[str, Any], a: str, b: str) -> list[str]:
    names = headlines(metrics)
    found = [
        entry
        for name in names
        for entry in metrics["comparisons"]
        if (entry["metric"], entry["a"], entry["b"]) == (name, a, b)
    ]
    if not found:
        return []
    ours, theirs = (b, a) if b == "corsa" else (a, b)
    better = [_measured(metrics, entry, ours, theirs) for entry in found if entry["better"] == ours]
    worse = [_measured(metrics, entry, ours, theirs) for entry in found if entry["better"] == theirs]
    alike = [names[entry["metric"]] for entry in found if not entry["distinguishable"]]
    sentences = []
    if ours == "corsa" and not better:
        tail = "it is worse on " + _listed(worse) if worse else "no difference on these metrics is beyond chance"
        sentences.append(f"{label(ours)} does not beat {label(theirs)} here: {tail}.")
    elif better:
        tail = f", and worse on {_listed(worse)}" if worse else ""
        sentences.append(f"{label(ours)} is better than {label(theirs)} on {_listed(better)}{tail}.")
    elif worse:
        sentences.append(f"{label(theirs)} is better than {label(ours)} on {_listed(worse)}.")
    if alike:
        edits = max(entry["edits"] for entry in found)
        over = metrics.get("over", "facts")
        few = f"; with fewer than six {over} no difference could show" * (edits < 6)
        sentences.append(
            f"{label(theirs)} and {label(ours)} cannot be told apart on {_listed(alike)} "
            f"(paired permutation test over up to {edits} {over}, 5 % level{few})."
        )
    return sentences


def _measured(metrics: dict[str, Any], entry: dict[str, Any], ours: str, theirs: str) -> str:
    name = entry["metric"]
    unit = metrics["definitions"][name]["unit"]
    values = {row["method"]: shown(row["metrics"][name], unit)[0] for row in metrics["rows"]}
    return f"{headlines(metrics)[name]} ({values[ours]} against {values[theirs]}, p = {entry['p']:.2g})"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
