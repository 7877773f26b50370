"""`corsa edit`: from a file of facts to an adapter and a report."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from corsa.cli.commands import AsJson, app
from corsa.editing.options import EditOptions


@app.command(name="edit")
def edit(options: Annotated[EditOptions, arg(name="")], as_json: AsJson = False) -> int:
    """Teach a model a file of facts. Writes a PEFT adapter and a report of what was learnt and what else changed.

    A line of the file: {"prompt": "Who leads Acme?", "target_new": "Ada Byron"}

    Example: corsa edit --edits facts.jsonl --out adapters/january

    Later: corsa edit --edits more.jsonl --adapter adapters/january --out adapters/february --max-forgetting 0.1

    Which --method: keep lora. corsa is measured to do no better on one batch of facts, and a step takes 3.2 times as
    long. Choose it if the old answer must not come back: it lowers the old answer's log-probability by 3 to 8 nats.
    f-learning is measured to do no better either. The others were not measured with enough facts and seeds to be
    recommended (docs/results.md). --tune 8 chooses settings on your own facts: the learning rate matters most.
    """
    from corsa.cli.commands.results import teach, teach_tuned
    from corsa.editing.plan import plan_edit

    if options.tune:
        return teach_tuned(options, as_json)

    return teach(options, plan_edit(options), as_json)
