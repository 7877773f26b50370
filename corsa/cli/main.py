"""The `corsa` command. Its subcommands are modules of `corsa.cli.commands`; importing one registers it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff

from corsa.cli.commands import STATUSES, app
from corsa.cli.commands import ask as ask
from corsa.cli.commands import data as data
from corsa.cli.commands import doctor as doctor
from corsa.cli.commands import edit as edit
from corsa.cli.commands import evaluate as evaluate
from corsa.cli.commands import export as export
from corsa.cli.commands import merge as merge
from corsa.cli.commands import perf_gpu as perf_gpu
from corsa.cli.commands import perf_sandbox as perf_sandbox
from corsa.cli.commands import perf_speed as perf_speed
from corsa.cli.commands import plan as plan
from corsa.cli.commands import push as push
from corsa.cli.commands import runs as runs
from corsa.cli.commands import serve as serve
from corsa.cli.commands import undo as undo
from corsa.cli.commands.perf import perf
from corsa.config.command_line import answered, leave
from corsa.config.complaints import options_explained
from corsa.errors import unknown_name

_FIRST = ("data", "edit", "ask", "evaluate", "undo", "export", "push", "serve", "merge", "report", "runs")
"""The subcommands in the order of use; the rest follow."""

for _name in [*_FIRST, *(name for name in list(app._subcommands) if name not in _FIRST)]:
    app._subcommands[_name] = app._subcommands.pop(_name)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status (`corsa.cli.commands.STATUSES`). Prints an error as one line on stderr."""
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    return answered(lambda: _command(list(sys.argv[1:] if args is None else args)))


def _command(args: list[str]) -> int | None:
    known, place = app._subcommands, 0
    while place < len(args) and not args[place].startswith("-"):
        if args[place] not in known:
            raise unknown_name(
                "command", " ".join(args[: place + 1]), [" ".join([*args[:place], name]) for name in known]
            )
        if args[place] != "perf":
            break
        known, place = perf._subcommands, place + 1
    with options_explained():
        return app.cli(
            prog="corsa",
            description=f"Edit what language models know, again and again.\n\n{STATUSES}",
            args=args,
            config=[FlagCreatePairsOff],
        )


def run() -> NoReturn:
    """The `corsa` program: `main`, and the end of its process."""
    leave(main())


if __name__ == "__main__":
    run()
