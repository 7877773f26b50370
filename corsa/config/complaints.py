"""Explains a refused configuration in one line: which option or field, what was found and what is allowed.

Every `pydantic.ValidationError` of a configuration that a person has written, and every command line that tyro
refuses, becomes a message here.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn
from unittest.mock import patch

import tyro
from pydantic import BaseModel, ValidationError
from tyro._backends import _tyro_help_formatting as help_formatting

from corsa.config import Frozen
from corsa.errors import CorsaError, nearest, unknown_name

_LONGEST = 80  # characters shown of what was found


def refused(error: ValidationError, kind: type[BaseModel], where: str = "") -> CorsaError:
    """What is wrong with the fields of a `kind`, as a file or a program names them: `where: training.epochs: ...`."""
    path, text = _first(error)
    before = f"{where}: " if where else ""
    if error.errors()[0]["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in _owner(kind, path).model_fields.items()]
        return CorsaError(f"{before}{unknown_name('field', path[-1], known)}")
    return CorsaError(f"{before}{'.'.join(path)}{': ' if path else ''}{text}")


def refused_option(error: ValidationError, prefix: str = "") -> CorsaError:
    """The same for command-line options: `--training.epochs: ...`. `prefix` is that of the refused group."""
    path, text = _first(error)
    parts = [part for part in prefix.split(".") if part and not part.startswith("__") and part != "options"]
    kinds = {kind.__name__: kind for kind in _all(Frozen)}
    kind = kinds.get(error.title)
    if path and kind and path[0] in kind.model_fields:
        how = [meta for meta in kind.model_fields[path[0]].metadata if getattr(meta, "prefix_name", None) is False]
        if how:  # an option without a group prefix
            parts, path = [], [getattr(how[0], "name", None) or path[0], *path[1:]]
    option = ".".join([*parts, *path]).replace("_", "-")
    return CorsaError(f"--{option}: {text}" if option else text)


@contextmanager
def options_explained() -> Iterator[None]:
    """Inside, a command line that tyro or a configuration refuses raises `CorsaError`, where tyro would print a box."""
    plain: Any = tyro._errors.fire_and_exit_instantiation_failure

    def explained(*given: Any, arg_fallback: Any, **more: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, ValidationError):  # of the whole; else of a group, which it has been wrapped for
            raise refused_option(error) from error
        cause = error and error.__context__
        if isinstance(cause, ValidationError):
            raise refused_option(cause, arg_fallback if isinstance(arg_fallback, str) else "") from cause
        plain(*given, arg_fallback=arg_fallback, **more)

    try:
        with (
            patch.object(tyro._errors, "fire_and_exit_instantiation_failure", explained),
            patch.object(help_formatting, "unrecognized_args_error", _refuse_unrecognized),
            tyro._errors.on_parse_error(_refuse),
        ):
            yield
    except ValidationError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_globals.get("__name__", "").startswith("corsa.cli.commands.") for frame, _ in frames):
            raise  # raised by a command itself
        raise refused_option(error) from error


def _refuse(event: tyro._errors.ParseErrorEvent) -> None:
    """Raise `CorsaError` for what the parser refuses. `_refuse_unrecognized` does so for unknown options."""
    errors = tyro._errors
    if isinstance(event, errors.MissingArgs):
        missing, parser = event.missing_arguments, event.missing_arguments[0].local_root_parser
        program = f"{event.prog} {parser.prog_suffix}".strip()
        needs = f"needs {_joined([_name(one.arg) for one in missing])}"
        if event.unrecognized_tokens:  # most often a required option, misspelt
            raise _unrecognized(program, event.unrecognized_tokens, _options(parser, program, []), f", which {needs}")
        raise CorsaError(f"{program} {needs}; see {program} --help")
    if isinstance(event, errors.MissingSubcommand):
        names = list(event.subcommand_spec.parser_from_name)
        program = f"{event.prog} {event.subcommand_spec.prog_suffix}".strip()
        raise CorsaError(f"{program} needs a command: {_joined(names, 'or')}; see {program} --help")
    if isinstance(event, errors.InvalidChoice):
        choices = [choice for choice in event.choices if choice != "None"]
        near = nearest(event.value, choices)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise CorsaError(f"{_name(event.argument)} needs one of {', '.join(choices)}, not {_shown(event.value)}{hint}")
    if isinstance(event, errors.BadValue):
        raise CorsaError(f"{_name(event.argument)} needs {_expected(event.argument)}")
    if isinstance(event, errors.InstantiationFailure):
        if event.argument is None:
            raise CorsaError(event.message.splitlines()[0])
        raise CorsaError(f"{_name(event.argument)} needs {_expected(event.argument)}{_found(event.message)}")


def _refuse_unrecognized(
    *, prog: str, unrecognized_args_and_progs: Sequence[tuple[str, str]], args: list[str], parser_spec: Any, **_: Any
) -> NoReturn:
    """In place of tyro's own function of that name and its parameters."""
    word, owner = unrecognized_args_and_progs[0]
    words = [word, *(other for other, _ in unrecognized_args_and_progs[1:])]
    raise _unrecognized(owner, words, _options(parser_spec, prog.partition(" ")[0], args))


def _unrecognized(program: str, words: Sequence[str], known: Sequence[tuple[str, str]], needs: str = "") -> CorsaError:
    word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
    if not word.startswith("-"):
        return CorsaError(f"{_shown(word)} belongs to no option of {program}{needs}; see {program} --help")
    own = [option for option, owner in known if owner == program]
    last = {option.strip("-").rpartition(".")[2]: option for option in own}
    like = get_close_matches(word.strip("-").rpartition(".")[2], list(last), n=1, cutoff=2 / 3)
    hint = f"did you mean {last[like[0]]}? " if like else ""
    return CorsaError(f"unknown option {_shown(word)[1:-1]}: {hint}{program} --help lists them all")


def _options(parser: Any, program: str, args: list[str]) -> list[tuple[str, str]]:
    """Every option of a parser and of its subcommands, and the command that has it."""
    found, *_ = help_formatting.recursive_arg_search(args, parser, program, set())
    return [(option, one.usage_hint.removesuffix(" --help")) for one in found for option in one.option_strings]


def _name(argument: Any) -> str:
    if not argument.is_positional():
        return "/".join(argument.lowered.name_or_flags)
    metavar = str(argument.lowered.metavar)
    return metavar if metavar.isupper() and metavar.isalpha() else argument.display_name()


def _expected(argument: Any) -> str:
    """What an option takes, in words."""
    metavar = str(argument.lowered.metavar).removeprefix("{None}|")
    kind = re.sub(r"\{?\[(\w+) .*", r"\1", metavar)
    one, several = {
        "INT": ("a whole number", "whole numbers"),
        "FLOAT": ("a number", "numbers"),
        "STR": ("a value", "values"),
    }.get(kind, (f"a value of the form {metavar}",) * 2)
    return several if "..." in metavar else one


def _found(message: str) -> str:
    """The refused text, which the first line of tyro's message ends with; nothing if it does not."""
    texts = re.findall(r"'((?:[^'\\]|\\.)*)'", message.splitlines()[0])
    return f" (found {_shown(texts[-1])})" if texts else ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")


def _joined(words: Sequence[str], last: str = "and") -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _first(error: ValidationError) -> tuple[list[str], str]:
    """Where the first fault is, and what it is."""
    first = error.errors(include_url=False)[0]
    text, found = first["msg"].removeprefix("Value error, "), first["input"]
    if found is None or isinstance(found, str | int | float):
        shown = repr(found) if not isinstance(found, int) or abs(found) < 10**_LONGEST else "a number that long"
        text += f" (found {shown if len(shown) <= _LONGEST else shown[:_LONGEST] + '...'})"
    return [str(part) for part in first["loc"]], text


def _owner(kind: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    owner: Any = kind
    for part in path[:-1]:
        by_name = {field.alias or name: field for name, field in owner.model_fields.items()} | owner.model_fields
        owner = by_name[part].annotation
    return owner


def _all(kind: type[Frozen]) -> Iterator[type[Frozen]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _all(below)
