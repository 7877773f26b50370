"""`corsa evaluate`: the answers of a model and of an adapter to the probes of facts."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from corsa.cli.commands import AsJson, app
from corsa.editing.options import EvaluateOptions


@app.command(name="evaluate")
def evaluate(options: Annotated[EvaluateOptions, arg(name="")], as_json: AsJson = False) -> int:
    """Ask a model, alone and with an adapter, about facts: a file, a benchmark, or all facts that the adapter learnt.

    Example: corsa evaluate --adapter adapters/february --max-forgetting 0.1

    Example: corsa evaluate --model qwen3-4b --adapter DIR --benchmark counterfact --data counterfact.json --limit 100

    What a server answers: corsa evaluate --endpoint http://localhost:8000/v1 --model january --adapter adapters/january
    """
    from corsa.cli.commands.results import ask

    return ask(options, as_json)
