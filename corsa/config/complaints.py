"""Explains a refused configuration in one line: which option or field, what was found and what is allowed.

Every `pydantic.ValidationError` of a configuration that a person has written becomes a message here.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import tyro
from pydantic import BaseModel, ValidationError

from corsa.config import Frozen
from corsa.errors import CorsaError, unknown_name

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
    """Inside, a command-line value that a configuration refuses raises `CorsaError`."""
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
        with patch.object(tyro._errors, "fire_and_exit_instantiation_failure", explained):
            yield
    except ValidationError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_globals.get("__name__", "").startswith("corsa.cli.commands.") for frame, _ in frames):
            raise  # raised by a command itself
        raise refused_option(error) from error


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
