"""The subcommands of `corsa`, a module each; `corsa.cli` joins them.

Heavy packages are imported inside the commands that need them, so that `corsa --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg
from tyro.extras import SubcommandApp

app = SubcommandApp()

Storage = Annotated[str, arg(metavar="URL", help="root of the store: a directory, s3://... or gs://...")]
