"""Makes a configuration from the command line and a YAML file, and turns a failure into a line that says what to do."""

from __future__ import annotations

import argparse
import atexit
import errno
import io
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml
from pydantic import ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from corsa.config import Frozen
from corsa.config.bounded_yaml import read_yaml
from corsa.config.complaints import options_explained, refused
from corsa.errors import CorsaError
from corsa.terminal import visible

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
    """`default` changed by `--config FILE` and the other options; the options override the file.

    Prints help and exits if the arguments ask for it.

    Raises:
        CorsaError: the file cannot be read, or the file or an option has a field that does not exist or a value that is
            not allowed.
    """
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    file.add_argument("--config")
    try:
        path = file.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise CorsaError("--config needs a file") from error
    if path is not None:
        default = _from_file(type(default), Path(path))
    with options_explained():
        return tyro.cli(type(default), default=default, args=list(arguments), prog=program, description=description)


def _from_file(kind: type[C], path: Path) -> C:
    try:
        entries = read_yaml(path) or {}
    except OSError as e:
        raise CorsaError(f"configuration file {path} cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise CorsaError(f"configuration file {path}{_place(e)}") from e
    if not isinstance(entries, dict):
        raise CorsaError(f"configuration file {path} holds no mapping of fields to values")
    try:
        return kind.model_validate(entries)
    except ValidationError as e:
        raise refused(e, kind, f"configuration file {path}") from e


def _place(error: Exception) -> str:
    """Where a file stops being YAML, and why."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f" is not YAML: {str(error).splitlines()[0]}"
    why = getattr(error, "problem", None) or getattr(error, "context", None) or "it cannot be read"
    return f", line {mark.line + 1}, column {mark.column + 1}: this is not YAML: {why}"


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status, see `answered`."""
    leave(answered(main))


def leave(status: int) -> NoReturn:
    """End this process.

    After an interruption, threads may still wait in Ray. Leaving the cluster or taking the interpreter apart under them
    crashes the process now and then (ray-project/ray#47864), so it ends without either, as a killed process does. Ray
    ends the processes that it has started for this one.
    """
    shutdown = getattr(sys.modules.get("ray._private.worker"), "shutdown", None)  # absent if the import was interrupted
    if status in _STOPPED and shutdown:
        atexit.unregister(shutdown)
        atexit._run_exitfuncs()  # such as the removal of temporary files
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: the command ends as with Ctrl-C, and says what is kept."""


def answered(command: Callable[[], int | None]) -> int:
    """Run a command; its exit status. An error that the user can fix is one line on stderr."""
    try:
        with _terminated_as_interrupted():
            _write_whatever_the_encoding()
            _write_no_controls()
            _refuse_a_place_that_is_gone()
            if shutil.get_terminal_size().columns < NARROWEST:  # laying out help would never end
                os.environ["COLUMNS"] = str(NARROWEST)
            try:
                status = command()
            finally:
                sys.stdout.flush()  # a closed pipe or a full disk shows here, not at exit
    except CorsaError as error:
        return _complain(str(error), error.status)
    except BaseException as error:
        return _ended(error)
    return status or 0


def _ended(error: BaseException) -> int:
    """The status after an error that is no `CorsaError`, as after a signal or with unwritable output. Raises one that
    only a programmer can mend.
    """
    stopped = _interruption(error)
    if stopped is not None:
        return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)
    if isinstance(error, BrokenPipeError):
        _write_no_more()
        return 1
    if isinstance(error, OSError):
        if error.errno in _NO_FILE and error.filename is not None:
            name = str(error.filename)
            return _complain(f"{name[:200]}{'...' * (len(name) > 200)}: {error.strerror}", 2)
        if error.errno in _NO_PLACE:
            _write_no_more()
            return _complain(f"the output cannot be written: {error.strerror}. Free some space, or write elsewhere", 2)
    if isinstance(error, ValueError) and str(error) == "embedded null byte":  # Python's words for such a path
        return _complain("the name of a file or directory holds a null byte", 2)
    raise error


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal that an error comes from: one that stops a library in the middle may leave it as another error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


NARROWEST = 20
"""Smallest number of columns that output is laid out for, on any terminal."""

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit statuses after an interruption."""

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""Errors of a standard output that is full or closed."""

_NO_FILE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Errors of a file or directory that the user named."""


def _complain(line: str, status: int) -> int:
    with suppress(OSError, AttributeError, ValueError):  # standard error may be closed
        print(f"error: {visible(line)}", file=sys.stderr)
    return status


def _write_no_more() -> None:
    """Discard the rest of the standard output's buffer, which would fail again at exit."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_whatever_the_encoding() -> None:
    """Write escapes for characters that a terminal or a pipe cannot show, instead of failing. A closed stream gets
    nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


class _Record(logging.LogRecord):
    """A log record without control characters: libraries log what files contain."""

    def getMessage(self) -> str:  # noqa: N802 (a name of the standard library)
        """The message, with escapes for its control characters."""
        return visible(super().getMessage())


def _write_no_controls() -> None:
    """Escape control characters in what libraries log and warn of."""
    if logging.getLogRecordFactory() is _Record:
        return
    plain = warnings.formatwarning
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *args, **how: visible(plain(*args, **how))


def _refuse_a_place_that_is_gone() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise CorsaError("the working directory is gone: change to one that exists (cd), and run this again") from error


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, the first SIGTERM raises `Terminated`, also where SIGINT is ignored; a second one ends the process."""

    def handle(number: int, frame: object) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # only the main thread can set a signal handler
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
