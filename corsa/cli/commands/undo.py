"""`corsa undo`: undo facts, or return to an earlier adapter of the line."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from corsa.cli.commands import AsJson, app
from corsa.editing.options import UndoOptions


@app.command(name="undo")
def undo(options: Annotated[UndoOptions, arg(name="")], as_json: AsJson = False) -> int:
    """Undo single facts by teaching their old answers again, or roll back to an earlier adapter of the line.

    --edit erases nothing: the old answers are taught as one more update. --to restores an earlier adapter
    exactly.

    Example: corsa undo --adapter adapters/february --edit "Who leads Acme?" --out adapters/mended

    Example: corsa undo --adapter adapters/february --to 1 --out adapters/as-in-january
    """
    if options.to is not None:
        from corsa.cli.commands.results import show_rolled_back
        from corsa.editing.export import roll_back

        return show_rolled_back(roll_back(options), as_json)
    from corsa.cli.commands.results import teach
    from corsa.editing.plan import plan_undo

    return teach(options, plan_undo(options), as_json)
