"""The `corsa` command. Its subcommands are the modules of `corsa.commands`; each is named once here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tyro.conf import FlagCreatePairsOff

from corsa.commands import app
from corsa.commands import perf_sandbox as perf_sandbox
from corsa.commands import runs as runs
from corsa.errors import CorsaError


def main(args: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 for a failure the user can mend, which is printed to stderr; 130 after Ctrl-C."""
    try:
        app.cli(
            prog="corsa",
            description="Edit what language models know, again and again.",
            args=args,
            config=[FlagCreatePairsOff],
        )
    except CorsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
