"""From the command line and a YAML file to a configuration, and from a failure to a line a person can act on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from corsa.config import Frozen
from corsa.errors import CorsaError, unknown_name

C = TypeVar("C", bound=Frozen)


def listed(kind: type, metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Marks a tuple field that is given as one word: `--methods lora,corsa`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: tuple(kind(w.strip()) for w in words[0].split(",") if w.strip()),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def configure(default: C, arguments: Sequence[str], *, program: str, description: str) -> C:
    """The configuration that `--config FILE` and the other options make of `default`; the options win over the file.

    Prints help or the parser's own complaint and exits where the arguments ask for that.

    Raises:
        CorsaError: the file cannot be read, or has a field that does not exist or a value that is not allowed.
    """
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    path = file.parse_known_args(arguments)[0].config
    if path is not None:
        default = _from_file(type(default), Path(path))
    return tyro.cli(type(default), default=default, args=list(arguments), prog=program, description=description)


def _from_file(kind: type[C], path: Path) -> C:
    try:
        entries = yaml.safe_load(path.read_text()) or {}
    except OSError as e:
        raise CorsaError(f"configuration file {path} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise CorsaError(f"configuration file {path} is not YAML: {str(e).splitlines()[0]}") from e
    if not isinstance(entries, dict):
        raise CorsaError(f"configuration file {path} holds no mapping of fields to values")
    try:
        return kind.model_validate(entries)
    except ValidationError as e:
        raise _explained(e, kind, path) from e


def _explained(error: ValidationError, kind: type[BaseModel], path: Path) -> CorsaError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        return CorsaError(f"configuration file {path}: {'.'.join(where)}: {first['msg']} (found {first['input']!r})")
    owner: Any = kind
    for part in where[:-1]:
        owner = owner.model_fields[part].annotation
    known = [field.alias or name for name, field in owner.model_fields.items()]
    return CorsaError(f"configuration file {path}: {unknown_name('field', where[-1], known)}")


def exit_with(main: Callable[[], int]) -> None:
    """Run a command and exit with its status, see `answered`."""
    sys.exit(answered(main))


def answered(command: Callable[[], int | None]) -> int:
    """Run a command; its exit status. An error that the user can mend is one line on stderr."""
    try:
        status = command()
        sys.stdout.flush()  # here, and not at exit, it shows that the reader has gone: `corsa ... | head`
    except CorsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at exit
        return 1
    return status or 0
