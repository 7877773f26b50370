"""Checks the inputs of a run before it starts: files of the wrong format, and answers that no output can match.

Imports nothing heavy unless an answer is so long that a tokenizer must count its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from corsa.config import ModelConfig
from corsa.config.code_steps import ProblemsConfig, ProblemsPlace
from corsa.config.steps import (
    AskingConfig,
    EditsConfig,
    EditsPlace,
    FactsConfig,
    FactsPlace,
    PartConfig,
    QuestionsConfig,
    QuestionsPlace,
)
from corsa.data.benchmarks import Reading, read
from corsa.data.benchmarks.programs import read_problems
from corsa.data.text import folded, invisible, shown
from corsa.errors import CorsaError

if TYPE_CHECKING:
    from rich.console import Console

    from corsa.flow import Step
    from corsa.models.encoding import Encoder

Fact = Mapping[str, Any]
"""`id`, `prompt`, `target_new` and `target_old` ("": unknown), as in a draft or an edit."""


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
    asked: dict[tuple[str, ModelConfig, int], tuple[Step, AskingConfig]] = {}
    for step in pending:
        if isinstance(step.config, AskingConfig) and "edits" in step.inputs:
            edits, config = step.inputs["edits"], step.config
            asked[edits.fingerprint, config.model, config.evaluation.answer_tokens] = (edits, config)
    for edits, config in asked.values():
        with suppress(CorsaError):  # errors in data or tokenizer are reported where they are read
            tokens = config.evaluation.answer_tokens
            for line in too_long(_facts(edits), tokens, lambda config=config: _encoder(config.model)):
                console.print(f"{edits.name}: {line}", markup=False, highlight=False, soft_wrap=True)


def _facts(step: Step) -> list[Fact]:
    """The facts that a step turns into edits."""
    config, place = step.config, step.placement
    if isinstance(config, PartConfig):
        return _facts(step.inputs["edits"])
    if isinstance(config, EditsConfig) and isinstance(place, EditsPlace):
        return [edit.model_dump(include=_FIELDS) for edit in _reading(config, place.data).edits]
    if isinstance(config, FactsConfig) and isinstance(place, FactsPlace):
        from corsa.data.benchmarks.file import drafts_of

        return [draft.fields for draft in drafts_of(place.data)]
    return []


_FIELDS = {"id", "prompt", "target_new", "target_old"}


def _encoder(model: ModelConfig) -> Encoder:
    from corsa.models.encoding import Encoder
    from corsa.models.loading import load_tokenizer

    return Encoder(load_tokenizer(model), model.template)


def too_long(facts: Sequence[Fact], new_tokens: int, encoder: Callable[[], Encoder]) -> list[str]:
    """Messages on new answers that outputs match rarely or never: longer than `new_tokens`, or of several lines.

    `encoder` is called only if an answer has at least `new_tokens` bytes: no tokenizer makes more tokens than bytes.
    """
    lines = []
    long = [fact["target_new"] for fact in facts if len(fact["target_new"].encode()) >= new_tokens]
    lengths = [len(ids) for ids in encoder().answers(long)] if long else []  # the end token included
    over = [length for length in lengths if length - 1 > new_tokens]
    if over:
        lines.append(
            f"{len(over)} of {len(facts)} new answers are longer than the {new_tokens} tokens that are generated, and "
            f"cannot count as right: set --evaluation.new-tokens {max(over)}"
        )
    several = [fact for fact in facts if "\n" in fact["target_new"]]
    if several:
        lines.append(
            f"{len(several)} of {len(facts)} new answers have several lines ({several[0]['id']}): an output is right "
            "only if it gives all of them"
        )
    return lines


def remarks(facts: Sequence[Fact], encoder: Encoder, new_tokens: int) -> list[str]:
    """Messages on valid facts that a person should know; empty if there are none."""
    lines = too_long(facts, new_tokens, lambda: encoder)

    def say(found: Sequence[Fact], what: str) -> None:
        if found:
            few = ", ".join(shown(str(fact["id"])) for fact in found[:3]) + ", ..." * (len(found) > 3)
            lines.append(f"{len(found)} of {len(facts)} facts {what} ({few})")

    short = [f for f in facts if any(0 < len(folded(f[side])) <= 2 for side in ("target_new", "target_old"))]
    say(short, "have an answer of one or two characters, which `contains` finds inside of other words")
    texts = [(fact, [fact[name] for name in ("prompt", "target_new", "target_old")]) for fact in facts]
    special = [fact for fact, own in texts if any(token in text for text in own for token in encoder.special)]
    say(special, "hold the text of a special token of this tokenizer, which is read as plain text")
    say([fact for fact, own in texts if any(map(invisible, own))], "hold invisible characters")
    return lines


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
