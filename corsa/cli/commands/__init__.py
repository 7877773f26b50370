"""The subcommands of `corsa`, one module each. `corsa.cli.main` imports them.

Heavy packages are imported inside the commands that need them, so that `corsa --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg
from tyro.extras import SubcommandApp

app = SubcommandApp()

Storage = Annotated[str, arg(metavar="URL", help="root of the store: a directory, s3://... or gs://...")]

AsJson = Annotated[bool, arg(name="json", help="print the result as JSON, for a program to read")]

STATUSES = """exit status:
  0  done
  1  a step failed; finished ones are kept, and the same command continues from there
  2  something to mend, said on stderr: an option, a file, a name
  3  a gate was not passed (--min-success, --min-generality, --max-forgetting), an export does not answer as its
     adapter, or a server answers as its base model; what was written is kept
  130  interrupted by Ctrl-C; finished steps are kept, and the same command continues from there
  143  terminated by SIGTERM, as the same"""
GATE_NOT_PASSED = 3
