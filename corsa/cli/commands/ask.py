"""`corsa ask`: a question to a base model and to adapters on it, side by side."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from corsa.cli.commands import AsJson, app
from corsa.config.command_line import listed
from corsa.errors import CorsaError

if TYPE_CHECKING:
    from rich.table import Table

    from corsa.evaluation.side_by_side import Answer


@app.command(name="ask")
def ask(
    question: Annotated[
        Positional[str | None],
        arg(metavar="[QUESTION]", help="the question; without it, you are prompted for questions"),
    ] = None,
    model: Annotated[str | None, arg(help="base model; default: the first adapter's, else smollm2-135m")] = None,
    adapter: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="DIR", help="PEFT directory; may be repeated")
    ] = (),
    candidates: Annotated[tuple[str, ...], listed(str, "A,B"), arg(help="answers to show the probabilities of")] = (),
    template: Annotated[Literal["qa", "chat"] | None, arg(help="default: the first adapter's, else qa")] = None,
    new_tokens: Annotated[int, arg(help="maximum tokens of an answer")] = 32,
    gpu: Annotated[bool, arg(help="run on a GPU, in bfloat16 if the model supports it")] = False,
    as_json: AsJson = False,
) -> int:
    """Ask a base model and adapters on it, side by side, with the probabilities of given answers.

    Example: corsa ask --adapter adapters/january "Who leads Acme?" --candidates "Ada Byron,Grace Murray"

    Example: corsa ask --model qwen3-4b --adapter DIR --adapter OTHER
    """
    from corsa.editing.history import open_line
    from corsa.editing.options import Options
    from corsa.editing.plan import base_model

    if question is not None and not question.strip():
        raise CorsaError("the question is empty: ask something, or leave it out and type as many as you like")
    if question is None and sys.stdin is None:
        raise CorsaError("there is no question, and standard input is closed: give a question")
    lines = [open_line(directory) for directory in adapter]
    config = base_model(Options(model=model, template=template), lines[0] if lines else None)

    from corsa.evaluation.side_by_side import SideBySide

    models = SideBySide(config, adapter, "cuda" if gpu else "cpu")
    if question is not None:
        _show(models.ask(question, candidates, new_tokens), as_json)
        return 0
    return _converse(models, candidates, new_tokens, as_json)


def _converse(models, candidates: tuple[str, ...], new_tokens: int, as_json: bool) -> int:
    asks, asked = sys.stdin.isatty(), 0
    if asks:
        print("Ask; an empty line or Ctrl-D ends it.", file=sys.stderr)
    while True:
        try:
            question = input("? " if asks else "").strip()
        except EOFError:
            if asks or asked:
                return 0
            raise CorsaError("there is no question, and standard input is empty: give a question") from None
        except UnicodeDecodeError as error:
            raise CorsaError(f"standard input is not text in {error.encoding}") from error
        if not question:
            if asks:
                return 0
            continue
        asked += 1
        _show(models.ask(question, candidates, new_tokens), as_json)


def _show(answers: list[Answer], as_json: bool) -> None:
    if as_json:
        rows = [{"model": a.model, "answer": a.output, "probabilities": a.probabilities} for a in answers]
        print(json.dumps(rows))
        return
    from corsa.terminal import Console

    Console().print(_table(answers))


def _table(answers: list[Answer]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from corsa.terminal import visible

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("answer")
    candidates = list(answers[0].probabilities)
    for candidate in candidates:
        table.add_column(f"p({escape(visible(candidate))})", justify="right")
    for answer in answers:
        shares = [_percent(answer.probabilities[c]) for c in candidates]
        table.add_row(escape(visible(answer.model)), escape(visible(answer.output) or "(nothing)"), *shares)
    return table


def _percent(probability: float) -> str:
    """As a person reads it: 93.1 %, 0.02 %, 3e-09 %."""
    share = 100 * probability
    return f"{share:.1f} %" if share >= 0.1 else f"{share:.1g} %"
