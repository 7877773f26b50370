"""Checks the inputs of a run before it starts: files of the wrong format, and answers that no output can match.

Imports nothing heavy unless an answer is so long that a tokenizer must count its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from corsa.config import EvaluationConfig, ModelConfig
from corsa.config.code_steps import ProblemsConfig, ProblemsPlace
from corsa.config.steps import (
    EditsConfig,
    EditsPlace,
    FactsConfig,
    FactsPlace,
    PartConfig,
    PredictionConfig,
    QuestionsConfig,
    QuestionsPlace,
)
from corsa.data.benchmarks import Reading, read
from corsa.data.benchmarks.cells import lists
from corsa.data.benchmarks.programs import read_problems
from corsa.data.text import folded, invisible, shown
from corsa.errors import CorsaError
from corsa.evaluation.matching import several_lines
from corsa.models.encoding import CLOSE, OPEN, without_thoughts

if TYPE_CHECKING:
    from rich.console import Console

    from corsa.data.edit import Edit
    from corsa.flow import Step
    from corsa.models.encoding import Encoder

Fact = Mapping[str, Any]
"""As in a draft: `id`, `prompt`, `target_new`, `target_old` ("": unknown), and optional `aliases_new`, `aliases_old`,
`paraphrases` and `neighbors` (questions with their answers and aliases). `fact_of` makes it from an edit.
"""


def fact_of(edit: Edit) -> dict[str, Any]:
    """An edit as a fact."""
    names = ("id", "prompt", "target_new", "target_old", "aliases_new", "aliases_old")
    return {
        **{name: getattr(edit, name) for name in names},
        "paraphrases": [text for probe in edit.probes if probe.kind == "paraphrase" for text in probe.prompts],
        "neighbors": [
            (text, probe.answer, probe.aliases)
            for probe in edit.probes
            if probe.kind == "neighbor"
            for text in probe.prompts
        ],
    }


def check_files(steps: Iterable[Step]) -> None:
    """Read the input files of these steps. Data from the hub is not read here.

    Raises:
        CorsaError: a file cannot be read, does not belong to the benchmark, or has bad records that stop a run.
    """
    for step in steps:
        config, place = step.config, step.placement
        if isinstance(config, EditsConfig) and isinstance(place, EditsPlace) and not config.digest.startswith("hub:"):
            _reading(config, place.data)
        elif isinstance(config, ProblemsConfig) and isinstance(place, ProblemsPlace):
            read_problems(place.data, limit=config.limit, offset=config.offset)
        elif isinstance(config, QuestionsConfig) and isinstance(place, QuestionsPlace) and place.data:
            from corsa.evaluation.mmlu import read_mmlu

            read_mmlu(place.data, limit=config.limit)


def _reading(config: EditsConfig, data: str | None) -> Reading:
    return _read(json.dumps(config.canonical()), data)


@lru_cache(maxsize=4)
def _read(config: str, data: str | None) -> Reading:
    how = json.loads(config)
    return read(how.pop("benchmark"), data, **{name: value for name, value in how.items() if name != "digest"})


def say_what_cannot_count(pending: Iterable[Step], console: Console) -> None:
    """Print which new answers are longer than the generated output or have several lines, for all pending questions."""
    asked: dict[tuple[str, ModelConfig, EvaluationConfig], tuple[Step, PredictionConfig]] = {}
    for step in pending:
        if isinstance(step.config, PredictionConfig) and "edits" in step.inputs:
            edits, config = step.inputs["edits"], step.config
            asked[edits.fingerprint, config.model, config.evaluation] = (edits, config)
    for edits, config in asked.values():
        with suppress(CorsaError):  # errors in data or tokenizer are reported where they are read
            for line in cannot_count(_facts(edits), config.evaluation, lambda config=config: _encoder(config.model)):
                console.print(f"{edits.name}: {line}", markup=False, highlight=False, soft_wrap=True)


def _facts(step: Step) -> list[Fact]:
    """The facts that a step turns into edits."""
    config, place = step.config, step.placement
    if isinstance(config, PartConfig):
        return _facts(step.inputs["edits"])
    if isinstance(config, EditsConfig) and isinstance(place, EditsPlace):
        return [fact_of(edit) for edit in _reading(config, place.data).edits]
    if isinstance(config, FactsConfig) and isinstance(place, FactsPlace):
        from corsa.data.benchmarks.file import drafts_of

        return [draft.fields for draft in drafts_of(place.data)]
    return []


def _encoder(model: ModelConfig) -> Encoder:
    from corsa.models.encoding import Encoder
    from corsa.models.loading import load_tokenizer

    return Encoder(load_tokenizer(model), model.template)


class _Answers(NamedTuple):
    """The answers of one kind: what they are called, what happens to one that no output gives, and (id, names)."""

    what: str
    fate: str
    given: list[tuple[str, tuple[str, ...]]]


def _answers(facts: Sequence[Fact], evaluation: EvaluationConfig) -> list[_Answers]:
    """The answers that outputs are compared with, by kind."""

    def names(answer: str, aliases: Sequence[str]) -> tuple[str, ...]:
        return (answer, *([] if evaluation.protocol == "authors" else aliases))

    new = [(f["id"], names(f["target_new"], f.get("aliases_new", ()))) for f in facts]
    old = [(f["id"], names(f["target_old"], f.get("aliases_old", ()))) for f in facts if f.get("target_old")]
    near = [(f["id"], names(answer, more)) for f in facts for _, answer, more in f.get("neighbors", ())]
    return [
        _Answers("new answers", "cannot count as right", new),
        _Answers("old answers", "are never found", old),
        _Answers("answers of neighbor questions", "cannot count as right", near * ("neighbor" in evaluation.kinds)),
    ]


def cannot_count(facts: Sequence[Fact], evaluation: EvaluationConfig, encoder: Callable[[], Encoder]) -> list[str]:
    """Messages on answers that outputs match rarely or never: longer than the generated tokens, of several lines, or
    with thoughts in them.

    `encoder` is called only if an answer has at least as many bytes as tokens are generated: no tokenizer makes more
    tokens than bytes.
    """
    tokens, lines = evaluation.answer_tokens, []

    def long(name: str) -> bool:
        return len(name.encode()) >= tokens

    for what, fate, given in _answers(facts, evaluation):
        names = list(dict.fromkeys(own[0] for _, own in given if all(map(long, own))))
        names += [alias for _, own in given if all(map(long, own)) for alias in own[1:]]
        lengths = dict(zip(names, map(len, encoder().answers(names)), strict=True)) if names else {}  # with the end
        over = [lengths[own[0]] for _, own in given if all(lengths.get(name, 0) - 1 > tokens for name in own)]
        if over:
            lines.append(
                f"{len(over)} of {len(given)} {what} are longer than the {tokens} tokens that are generated, and {fate}"
                + (f": set --evaluation.new-tokens {max(over)}" if not evaluation.sampled else "")
            )
        if several := [id_ for id_, own in given if several_lines(own[:1])]:
            lines.append(
                f"{len(several)} of {len(given)} {what} have several lines ({several[0]}): an output is right only if "
                "it gives all of them"
            )
        if thoughts := [id_ for id_, own in given if all(without_thoughts(name) != name for name in own)]:
            lines.append(
                f"{len(thoughts)} of {len(given)} {what} hold {OPEN} or {CLOSE} ({thoughts[0]}), and {fate}: what a "
                "model writes there is never read as its answer"
            )
    return lines


def remarks(facts: Sequence[Fact], encoder: Encoder, evaluation: EvaluationConfig) -> list[str]:
    """Messages on valid facts that a person should know; empty if there are none."""
    lines = cannot_count(facts, evaluation, lambda: encoder)

    def say(fits: Callable[[Sequence[str], Sequence[str]], bool], what: str) -> None:
        if found := [fact for fact, (answers, texts) in given if fits(answers, texts)]:
            few = ", ".join(shown(str(fact["id"])) for fact in found[:3]) + ", ..." * (len(found) > 3)
            lines.append(f"{len(found)} of {len(facts)} facts {what} ({few})")

    given = [(fact, _texts(fact)) for fact in facts]
    say(
        lambda answers, _: any(0 < len(folded(answer)) <= 2 for answer in answers),
        "have an answer of one or two characters, which `contains` finds inside of other words",
    )
    say(
        lambda answers, _: any(lists(answer) or _BAR.search(answer) for answer in answers),
        "have an answer that looks like a list, and it is one answer: other names belong in the aliases",
    )
    say(
        lambda answers, _: any(folded(answer) in _ABSENT for answer in answers),
        "have the answer nan, none or null, which stands for an empty cell in some tables",
    )
    say(
        lambda answers, texts: any(token in text for text in (*answers, *texts) for token in encoder.special),
        "hold the text of a special token of this tokenizer, which is read as plain text",
    )
    say(lambda answers, texts: any(map(invisible, (*answers, *texts))), "hold invisible characters")
    return lines


_BAR = re.compile(r"(?<!<)[|\uff5c](?!>)")
"""A bar between items, and none of a special token such as <|im_end|>."""
_ABSENT = ("nan", "none", "null", "<na>")


def _texts(fact: Fact) -> tuple[list[str], list[str]]:
    """The answers and their aliases, and the questions of a fact."""
    near = fact.get("neighbors", ())
    answers = [fact["target_new"], fact["target_old"], *fact.get("aliases_new", ()), *fact.get("aliases_old", ())]
    answers += [name for _, answer, names in near for name in (answer, *names)]
    return answers, [fact["prompt"], *fact.get("paraphrases", ()), *(question for question, _, _ in near)]


def beyond_context(facts: Sequence[Fact], encoder: Encoder, context: int | None) -> list[tuple[Fact, int]]:
    """The facts whose prompt and longer answer exceed the model's context, each with its number of tokens."""
    if context is None:
        return []
    long = [f for f in facts if len(f["prompt"].encode()) + _answer_bytes(f) + 100 > context]  # 100: for the template
    prompts = encoder.prompts([fact["prompt"] for fact in long])
    sides = zip(*(encoder.answers([fact[side] for fact in long]) for side in ("target_new", "target_old")), strict=True)
    found = [(f, len(prompt) + max(map(len, own))) for f, prompt, own in zip(long, prompts, sides, strict=True)]
    return [(fact, tokens) for fact, tokens in found if tokens > context]


def _answer_bytes(fact: Fact) -> int:
    return max(len(fact[side].encode()) for side in ("target_new", "target_old"))
