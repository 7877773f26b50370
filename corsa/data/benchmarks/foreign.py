"""Foreign formats of edits: how to recognise them, and how their columns map to those of a user's file.

A format with `convert` is read. For the others, a message describes the mapping, so that the user can convert the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from corsa.data.benchmarks import COLUMNS
from corsa.data.benchmarks.cells import lists, structured

Values = Mapping[str, Any]


class Format(NamedTuple):
    """A foreign format."""

    name: str
    marks: tuple[frozenset[str], ...]
    """Every record has one of these sets of keys."""
    mapping: str
    """How its columns map to the project's, in words."""
    convert: Callable[[Values], dict[str, Any]] | None = None
    """Converts a record to the project's columns. Values that are not strings stay unchanged and are refused later.

    Raises FieldError for a list as Python prints it.
    """


def strings(value: Any) -> list[str]:
    """The strings of a value: a string or a nested list of strings. Blank strings and nulls are left out."""
    return [text for text in _leaves(value) if isinstance(text, str) and text.strip() and text != "<|endoftext|>"]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _own(values: Values) -> dict[str, Any]:
    """The columns of a record that already have the project's names."""
    return {name: values[name] for name in COLUMNS if name in values}


def _got(values: Values, column: str) -> Any:
    """The value of a column, which may be JSON in a cell of a table."""
    return structured(values.get(column), column)


def _answer(values: Values, column: str, target: str, aliases: str) -> dict[str, Any]:
    """The first of several answers is the target, the others are its aliases."""
    value = values.get(column)
    if isinstance(value, str) and lists(value):
        value = structured(value, column)
    first, *others = strings(value) or [None]
    if first is None and not isinstance(value, str | list | tuple | None):
        return {target: value}
    return {target: first, aliases: others}


def _questions(prompts: Any, answers: Any) -> list[dict[str, Any]]:
    """Questions whose answers an edit must not change. Those without an answer cannot be scored and are left out."""
    one = isinstance(prompts, str) or not isinstance(answers, list | tuple)
    asked = prompts if isinstance(prompts, list | tuple) else [prompts]
    given = [answers] if one else answers
    found = []
    for question, answer in zip(asked, given, strict=False):
        names = strings(answer)
        if isinstance(question, str) and question.strip() and names:
            text = question.removeprefix("nq question: ")
            found.append({"prompt": text, "answer": names[0], "aliases": names[1:]})
    return found


def _localities(groups: Any) -> list[dict[str, Any]]:
    """The questions of KnowEdit's `locality`: {kind: [{prompt, ground_truth}]}, or {kind: {prompt, ground_truth}}."""
    found = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        for item in [group] if isinstance(group, Mapping) else group if isinstance(group, list) else ():
            if isinstance(item, Mapping):
                found += _questions(item.get("prompt"), item.get("ground_truth"))
    return found


def _easyedit(values: Values) -> dict[str, Any]:
    neighbors = _questions(_got(values, "locality_prompt"), _got(values, "locality_ground_truth"))
    row = _own(values) | _answer(values, "target_new", "target_new", "aliases_new")
    if "target_old" not in values:
        row |= _answer(values, "ground_truth", "target_old", "aliases_old")
    row["paraphrases"] = strings([_got(values, name) for name in ("paraphrases", "rephrase_prompt", "rephrase")])
    row["neighbors"] = neighbors + _localities(_got(values, "locality"))
    return row


def _unke(values: Values) -> dict[str, Any]:
    return {
        **_own(values),
        "prompt": values.get("question"),
        **_answer(values, "answer", "target_new", "aliases_new"),
        "paraphrases": strings(_got(values, "para_question")),
    }


def _wikibigedit(values: Values) -> dict[str, Any]:
    return {
        **_own(values),
        "prompt": values.get("update"),
        **_answer(values, "ans", "target_new", "aliases_new"),
        "paraphrases": strings([_got(values, name) for name in ("rephrase", "personas")]),
        "neighbors": _questions(_got(values, "loc"), _got(values, "loc_ans")),
    }


def _marks(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in sets)


_ASK = "target_old is not in it: `corsa edit` asks the model"

FORMATS = (
    Format(
        "the format of EasyEdit and KnowEdit",
        _marks(
            *(
                f"prompt target_new {name}"
                for name in (
                    *("ground_truth", "rephrase_prompt", "rephrase", "portability"),
                    *("locality", "locality_prompt"),
                )
            )
        ),
        "prompt -> prompt, target_new -> target_new, ground_truth -> target_old (further ones -> aliases_old), "
        "rephrase_prompt -> paraphrases, locality -> neighbors; portability is not used",
        _easyedit,
    ),
    Format(
        "the format of UnKE",
        _marks("question answer para_question", "question answer sub_question"),
        "question -> prompt, answer -> target_new, para_question -> paraphrases; sub_question and sub_answer are not "
        f"used; {_ASK}",
        _unke,
    ),
    Format(
        "the format of WikiBigEdit",
        _marks("update ans rephrase", "update subject ans"),
        "update -> prompt, ans -> target_new, rephrase and personas -> paraphrases, loc and loc_ans -> neighbors; "
        f"mhop is not used; {_ASK}",
        _wikibigedit,
    ),
    Format(
        "the format of RippleEdits",
        _marks("edit example_type", "edit Relation_Specificity", "edit Logical_Generalization"),
        "it has statements and no questions. Write a file of your own: edit.prompt without its last words -> prompt, "
        "those words -> target_new, the last words of edit.original_fact.prompt -> target_old, the queries of "
        "Relation_Specificity -> neighbors",
    ),
    Format(
        "the format of PEAK",
        _marks("requested_rewrite para_add_prompts"),
        "it appends answers to those that stand. Write a file of your own: requested_rewrite.prompt with its subject "
        "-> prompt, target_new.str -> target_new, target_true.str -> target_old, its paraphrases (para_...) -> "
        "paraphrases, each pair of neighborhood_prompts -> neighbors {prompt, answer}",
    ),
    Format(
        "a relative of CounterFact",
        _marks("requested_rewrite"),
        "write a file of your own: requested_rewrite.prompt with its subject -> prompt, target_new.str -> target_new, "
        "target_true.str -> target_old, paraphrase_prompts -> paraphrases, neighborhood_prompts -> neighbors",
    ),
    Format(
        "KnowEdit's WikiBio",
        _marks("concept text labels"),
        "text -> prompt, labels -> target_new; its answers are long, raise --evaluation.new-tokens",
    ),
    Format(
        "a file of programs",
        _marks("task_id entry_point canonical_solution", "update prog_syn_examples"),
        "pipelines/code_update.py reads it (--data, --humaneval)",
    ),
    Format(
        "pairs of preference",
        _marks("prompt chosen rejected"),
        "prompt -> prompt, chosen -> target_new, rejected -> target_old, each a plain string",
    ),
    Format(
        "a file of instructions", _marks("instruction output"), f"instruction -> prompt, output -> target_new; {_ASK}"
    ),
    Format("questions and answers", _marks("question answer"), f"question -> prompt, answer -> target_new; {_ASK}"),
    Format(
        "a file of chats",
        _marks("messages"),
        "write a file of your own: the question -> prompt, the answer -> target_new",
    ),
)
"""The foreign formats, in the order in which they are tried."""
