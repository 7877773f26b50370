"""`corsa data`: which benchmarks there are, whether a file is sound, and its first edits as a model will see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from corsa.cli.commands import AsJson, app
from corsa.config import ModelConfig
from corsa.errors import CorsaError


@app.command(name="data")
def data(
    file: Annotated[
        Positional[str | None],
        arg(metavar="[FILE]", help="a file of facts, or a benchmark's; without it, the benchmarks are listed"),
    ] = None,
    benchmark: Annotated[str, arg(help="what the file is; file: facts of your own")] = "file",
    model: Annotated[str, arg(help="whose tokenizer is shown")] = "smollm2-135m",
    template: Annotated[Literal["qa", "chat"], arg(help="qa: 'Q: ...' and 'A:'; chat: the tokenizer's")] = "qa",
    show: Annotated[int, arg(help="edits shown as the model will see them")] = 3,
    limit: Annotated[int | None, arg(help="facts read; all by default")] = None,
    as_json: AsJson = False,
) -> int:
    """List the benchmarks, or check a file and show its first edits as the model will see them.

    Example: corsa data

    Example: corsa data facts.jsonl --show 2

    Example: corsa data counterfact.json --benchmark counterfact --model qwen3-4b
    """
    from corsa.data.benchmarks import BENCHMARKS

    if file is None and (benchmark == "file" or not BENCHMARKS.get(benchmark)):
        if benchmark != "file":
            from corsa.errors import unknown_name

            raise unknown_name("benchmark", benchmark, BENCHMARKS)
        return _list(as_json)
    if show < 0:
        raise CorsaError(f"--show {show}: give 0 or more")
    found, records = _checked(file, benchmark, limit)
    shown = _as_tokens(records[:show], ModelConfig(name=model, template=template)) if show else []
    if as_json:
        print(json.dumps({**found, "edits": shown}, indent=1, ensure_ascii=False))
        return 0
    _print(found, shown)
    return 0


def _list(as_json: bool) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from corsa.data.benchmarks import BENCHMARKS

    rows = [
        {"name": b.name, "description": b.description, "from": _origin(b.name), "bad_records": b.on_bad_record}
        for b in BENCHMARKS.values()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table("benchmark", "what it is", "without --data", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], row["description"], row["from"])
    Console().print(table)
    return 0


def _origin(name: str) -> str:
    from corsa.data.benchmarks import BENCHMARKS

    known = BENCHMARKS[name]
    return "ships with the project" if not known.needs_data else str(known.hub) if known.hub else "needs its file"


def _checked(file: str | None, benchmark: str, limit: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the file holds, and its records as {id, prompt, target_new, target_old or ""}."""
    if benchmark == "file":
        from corsa.data.benchmarks.file import drafts_of

        drafts = drafts_of(Path(file or "").expanduser())[:limit]
        fields = [draft.fields for draft in drafts]
        return {
            "source": str(file),
            "facts": len(fields),
            "with_old_answer": sum(bool(f["target_old"]) for f in fields),
            "with_wordings": sum(bool(f["paraphrases"]) for f in fields),
            "with_neighbors": sum(bool(f["neighbors"]) for f in fields),
            "skipped": [],
        }, fields
    from corsa.data.benchmarks import read

    reading = read(benchmark, file, limit=limit)
    edits = reading.edits
    kinds = [{probe.kind for probe in edit.probes} for edit in edits]
    return {
        "source": reading.source,
        "facts": len({edit.chain for edit in edits}),
        "with_old_answer": len(edits),
        "with_wordings": sum("paraphrase" in k for k in kinds),
        "with_neighbors": sum("neighbor" in k for k in kinds),
        "skipped": [str(bad) for bad in reading.skipped],
        "contradictions": [str(c) for c in reading.contradictions],
    }, [edit.model_dump() for edit in edits]


def _as_tokens(records: list[dict[str, Any]], model: ModelConfig) -> list[dict[str, Any]]:
    """Each record with the tokens of its prompt and of its answers; the answers are what the losses are taken over."""
    from corsa.models.encoding import Encoder
    from corsa.models.loading import load_tokenizer

    encoder = Encoder(load_tokenizer(model), model.template)
    shown = []
    for record in records:
        row: dict[str, Any] = {"id": record["id"]}
        row["prompt"] = _pieces(encoder, encoder.prompt(record["prompt"]))
        for side in ("target_new", "target_old"):
            row[side] = _pieces(encoder, encoder.answer(record[side])) if record[side] else None
        start = len(row["prompt"])
        row["answer_span"] = [start, start + len(row["target_new"])]  # positions of target_new, end token included
        shown.append(row)
    return shown


def _pieces(encoder: Any, ids: list[int]) -> list[dict[str, Any]]:
    return [{"id": i, "text": encoder.tokenizer.decode([i])} for i in ids]


def _print(found: dict[str, Any], shown: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(
        f"{found['source']}: {found['facts']} facts, no fault found"
        if not found["skipped"]
        else f"{found['source']}: {found['facts']} facts"
    )
    if missing := found["facts"] - found["with_old_answer"]:
        say(f"  {missing} without target_old: `corsa edit` asks the model what it says today")
    say(f"  {found['with_wordings']} with other wordings, {found['with_neighbors']} with neighbors")
    for bad in found["skipped"][:10]:
        say(f"  skipped: {bad}")
    if len(found["skipped"]) > 10:
        say(f"  and {len(found['skipped']) - 10} more skipped: all of them with --json")
    for line in found.get("contradictions", [])[:10]:
        say(f"  contradiction: {line}")
    for row in shown:
        say(f"\n{row['id']}")
        for name in ("prompt", "target_new", "target_old"):
            if row[name] is None:
                say(f"  {name:<10}  (asked of the model)")
                continue
            pieces = Text("·", style="dim").join(Text(_visible(p["text"])) for p in row[name])
            console.print(Text(f"  {name:<10}  ").append_text(pieces), soft_wrap=True, highlight=False)
        first, end = row["answer_span"]
        say(f"  answer      tokens {first + 1} to {end} of {end}: what is learnt, its end token included")


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "␣")
