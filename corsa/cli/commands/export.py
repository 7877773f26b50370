"""`corsa export`: an adapter in the forms that other programs load, each checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from corsa.cli.commands import GATE_NOT_PASSED, AsJson, app
from corsa.terminal import visible

if TYPE_CHECKING:
    from corsa.editing.other_formats import Export

_SHOWN = 10


@app.command(name="export")
def export(
    source: Annotated[
        Positional[str], arg(metavar="DIR", help="the adapter, as corsa edit left it; or a delta/ that MEMIT left")
    ],
    merged: Annotated[
        Path | None, arg(metavar="DIR", help="the base model with the change in its weights, for transformers and vLLM")
    ] = None,
    gguf: Annotated[
        Path | None, arg(metavar="FILE", help="the same as one GGUF file, for llama.cpp, Ollama and LM Studio")
    ] = None,
    gguf_lora: Annotated[
        Path | None, arg(metavar="FILE", help="the change alone as a GGUF adapter, for llama.cpp's --lora")
    ] = None,
    adapter: Annotated[Path | None, arg(metavar="DIR", help="the change alone as a plain PEFT adapter")] = None,
    rank: Annotated[int | None, arg(help="cut the adapters to this rank; default: exact")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        arg(help="of merged weights; default: the base model's, which is exact"),
    ] = None,
    edits: Annotated[
        str | None, arg(metavar="FILE", help="facts whose questions check the exports; default: the taught ones")
    ] = None,
    model: Annotated[str | None, arg(help="base model; default: the adapter's")] = None,
    questions: Annotated[int, arg(help="questions asked of each export at most")] = 100,
    new_tokens: Annotated[int, arg(help="tokens of an answer at most")] = 32,
    as_json: AsJson = False,
) -> int:
    """Write an adapter in the forms that other programs load, and check that each answers as the adapter does.

    Another library (transformers, PEFT, gguf) loads each export and answers the taught questions. If an answer differs
    from ours, it is listed, and the command ends with status 3; the export is kept.

    Example: corsa export adapters/january --merged january-model --gguf january.gguf

    Example: corsa export adapters/january --adapter january-16 --rank 16 --gguf-lora january-lora.gguf
    """
    from corsa.editing.other_formats import Wanted, plain
    from corsa.editing.other_formats import export as exported
    from corsa.errors import CorsaError
    from corsa.terminal import Console

    for name, value in (("--questions", questions), ("--new-tokens", new_tokens)):
        if value < 1:
            raise CorsaError(f"{name} {value}: give 1 or more")
    console = Console(stderr=True)
    found = exported(
        source,
        Wanted(merged, gguf, gguf_lora, adapter, rank, dtype),
        edits=edits,
        model=model,
        questions=questions,
        new_tokens=new_tokens,
        told=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    if as_json:
        print(json.dumps([plain(one) for one in found], indent=1))
    else:
        for one in found:
            print(visible(f"{one.path}: {_told(one)}"))
            for d in one.differences[:_SHOWN]:
                print(
                    visible(f"  {d.question}: {d.exported!r} here, {d.ours!r} of the adapter, {d.base!r} of the base")
                )
            if len(one.differences) > _SHOWN:
                print(f"  and {len(one.differences) - _SHOWN} more: all of them with --json")
    return GATE_NOT_PASSED if any(one.differences for one in found) else 0


def _told(one: Export) -> str:
    what = f"{one.form}, relative error {one.error:.2g} of the change" if one.error else f"{one.form}, exact"
    same = one.asked - len(one.differences)
    verdict = "" if one.applied else ". THE CHANGE IS NOT IN IT: every answer that the adapter changes is the base's"
    moved = f"the adapter changes {one.moved} of them" if one.moved else "of which the adapter changes none"
    return f"{what}; {same} of {one.asked} answers as the adapter's ({moved}){verdict}"
