"""`corsa data`: lists the benchmarks, checks a file, and shows its first edits as a model will see them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tyro.conf import Positional, arg

from corsa.cli.commands import AsJson, app
from corsa.config import EvaluationConfig, ModelConfig
from corsa.errors import CorsaError

if TYPE_CHECKING:
    from corsa.data.edit import Edit
    from corsa.models.encoding import Encoder

PIECES = 200
"""Tokens of a prompt or an answer that are shown."""


class Marks(NamedTuple):
    """What is shown between tokens, for a space and for a line's end."""

    between: str
    space: str
    line: str


MARKS, ASCII_MARKS = Marks("·", "␣", "⏎"), Marks("|", "_", "\\n")
"""The marks, and those for a terminal that lacks them."""


@app.command(name="data")
def data(
    file: Annotated[
        Positional[str | None],
        arg(
            metavar="[FILE]",
            help="a file of facts, or a benchmark's, gzipped or not; -: standard input; without it, the benchmarks are "
            "listed",
        ),
    ] = None,
    benchmark: Annotated[str, arg(help="what the file is; file: facts of your own")] = "file",
    model: Annotated[
        str, arg(help="model whose tokenizer and context length are used for the checks")
    ] = "smollm2-135m",
    template: Annotated[Literal["qa", "chat"], arg(help="qa: 'Q: ...' and 'A:'; chat: the tokenizer's")] = "qa",
    new_tokens: Annotated[
        int, arg(help="tokens generated per probe (--evaluation.new-tokens): longer answers are named")
    ] = EvaluationConfig().new_tokens,
    show: Annotated[int, arg(help="edits shown as the model will see them")] = 3,
    limit: Annotated[int | None, arg(help="facts read; all by default")] = None,
    convert: Annotated[
        Path | None, arg(metavar="OUT.jsonl", help="write the facts in this project's form to a new file")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """List the benchmarks, or check a file and show its first edits as the model will see them.

    Example: corsa data

    Example: corsa data facts.jsonl --show 2

    Example: corsa data counterfact.json --benchmark counterfact --model qwen3-4b

    In this project's form: corsa data counterfact.json --benchmark counterfact --convert facts.jsonl
    """
    from corsa.data.benchmarks import BENCHMARKS

    if file is None and (benchmark == "file" or not BENCHMARKS.get(benchmark)):
        if benchmark != "file":
            from corsa.errors import unknown_name

            raise unknown_name("benchmark", benchmark, BENCHMARKS)
        if convert:
            raise CorsaError("--convert needs a file, or --benchmark NAME")
        return _list(as_json)
    if show < 0:
        raise CorsaError(f"--show {show}: give 0 or more")
    if new_tokens < 1:
        raise CorsaError(f"--new-tokens {new_tokens}: give 1 or more")
    if limit is not None and limit < 1:
        raise CorsaError(f"--limit {limit}: nothing would be read; give 1 or more, or leave it out to read every fact")
    found = _checked(file, benchmark, limit)
    encoder = _encoder(ModelConfig(name=model, template=template))
    found.remarks += _remarks(found, encoder, new_tokens)
    _refuse_what_no_context_holds(found, encoder, ModelConfig(name=model))
    if convert:
        from corsa.data.benchmarks.conversion import write

        write(found.converted, convert)
        found.counts["converted"] = {"file": str(convert), "facts": len(found.converted)}
    shown = _as_tokens(found.records[:show], encoder)
    if as_json:
        print(json.dumps({**found.counts, "remarks": found.remarks, "edits": shown}, indent=1))
        return 0
    _print(found, shown)
    return 0


def _list(as_json: bool) -> int:
    from rich import box
    from rich.table import Table

    from corsa.data.benchmarks import BENCHMARKS
    from corsa.terminal import Console

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


@dataclass
class Found:
    """What a file holds.

    Attributes:
        counts: for a program to read.
        records: the facts, as `corsa.planning.inputs` reads them.
        remarks: what a person should know of it.
        bad: what happens to a fact that cannot be used: "stop" or "skip".
        converted: the facts in the project's own form, one record each.
    """

    counts: dict[str, Any]
    records: list[dict[str, Any]]
    remarks: list[str] = field(default_factory=list)
    bad: Literal["stop", "skip"] = "stop"
    converted: list[dict[str, Any]] = field(default_factory=list)


def _checked(file: str | None, benchmark: str, limit: int | None) -> Found:
    return _own(file, limit) if benchmark == "file" else _published(file, benchmark, limit)


def _own(file: str | None, limit: int | None) -> Found:
    """A user's file: refused if `corsa edit` refuses it. Also prints what a pipeline would do with it."""
    from corsa.data.benchmarks import read
    from corsa.data.benchmarks.cases import asked_once
    from corsa.data.benchmarks.conversion import from_draft
    from corsa.data.benchmarks.file import checked, drafts, source_of
    from corsa.data.benchmarks.rows import rows_of

    source = source_of(file or "")
    given = drafts(source)
    fields = [draft.fields for draft in given[:limit]]
    edits, repeats = asked_once([d.edit(target_old=d.fields["target_old"] or "?") for d in given[:limit]])
    remarks = []
    if known := rows_of(source).format:
        remarks.append(f"read as {known.name}: {known.mapping}")
    if missing := sum(not f["target_old"] for f in fields):
        remarks.append(
            f"{missing} without target_old: `corsa edit` asks the model what it says today; a pipeline "
            "(--benchmark file) refuses them"
        )
    else:
        try:
            read("file", str(source.path))
        except CorsaError as error:
            remarks.append(f"`corsa edit` takes this file, a pipeline (--benchmark file) refuses it: {error}")
    counts = {
        "source": str(source),
        "facts": len(fields),
        "with_old_answer": sum(bool(f["target_old"]) for f in fields),
        "with_aliases": sum(bool(f["aliases_new"] or f["aliases_old"]) for f in fields),
        **_kinds(edits),
        "skipped": [],
        **repeats.counts,
    }
    return Found(counts, fields, remarks, converted=[from_draft(d) for d in checked(source).drafts[:limit]])


def _published(file: str | None, benchmark: str, limit: int | None) -> Found:
    from corsa.data.benchmarks import BENCHMARKS, read
    from corsa.data.benchmarks.conversion import from_edit, left_out
    from corsa.planning.inputs import fact_of

    reading = read(benchmark, file, limit=limit)
    edits = reading.edits
    counts = {
        "source": reading.source,
        "facts": len({edit.chain for edit in edits}),
        "with_old_answer": len(edits),
        "with_aliases": sum(bool(edit.aliases_new or edit.aliases_old) for edit in edits),
        **_kinds(edits),
        "skipped": [str(bad) for bad in reading.skipped],
        "contradictions": [str(c) for c in reading.contradictions],
        **reading.repeats.counts,
        "without_column": left_out(edits),
    }
    bad, converted = BENCHMARKS[benchmark].on_bad_record, [from_edit(edit) for edit in edits]
    return Found(counts, [fact_of(edit) for edit in edits], bad=bad, converted=converted)


def _kinds(edits: Sequence[Edit]) -> dict[str, int]:
    kinds = [{probe.kind for probe in edit.probes} for edit in edits]
    return {f"with_{name}s": sum(kind in k for k in kinds) for name, kind in _SHOWN.items()}


_SHOWN = {"wording": "paraphrase", "neighbor": "neighbor"}


def _encoder(model: ModelConfig) -> Encoder:
    from corsa.models.encoding import Encoder
    from corsa.models.loading import load_tokenizer

    return Encoder(load_tokenizer(model), model.template)


def _remarks(found: Found, encoder: Encoder, new_tokens: int) -> list[str]:
    from corsa.data.benchmarks.cases import told
    from corsa.planning.inputs import remarks

    asked_once = told(found.counts)
    return [
        *([asked_once] if asked_once else []),
        *remarks(found.records, encoder, EvaluationConfig(new_tokens=new_tokens)),
    ]


def _refuse_what_no_context_holds(found: Found, encoder: Encoder, model: ModelConfig) -> None:
    """Raises CorsaError for a user's fact that is longer than the model's context; a benchmark's is skipped."""
    from corsa.models.shapes import architecture
    from corsa.planning.inputs import beyond_context

    try:
        context = getattr(architecture(model), "max_position_embeddings", None)
    except CorsaError:  # a directory with a tokenizer alone: its context is not known
        return
    beyond = beyond_context(found.records, encoder, context)
    if not beyond:
        return
    fact, tokens = beyond[0]
    reason = f"prompt and answer have {tokens} tokens, and the context of {model.name} holds {context}"
    if found.bad == "stop":
        raise CorsaError(f"{found.counts['source']}, {fact['id']}: {reason} ({len(beyond)} such in all); shorten them")
    found.remarks.append(f"{len(beyond)} facts are skipped in a run, such as {fact['id']}: {reason}")


def _as_tokens(records: Sequence[dict[str, Any]], encoder: Encoder) -> list[dict[str, Any]]:
    """Each record with the tokens of its prompt and of its answers. The losses cover the answers only."""
    shown = []
    for record in records:
        row: dict[str, Any] = {"id": record["id"]}
        row |= {name: list(record[name]) for name in ("paraphrases", "aliases_new", "aliases_old")}
        row["prompt"] = _pieces(encoder, encoder.prompt(record["prompt"]))
        for side in ("target_new", "target_old"):
            row[side] = _pieces(encoder, encoder.answer(record[side])) if record[side] else None
        start = len(row["prompt"])
        row["answer_span"] = [start, start + len(row["target_new"])]  # positions of target_new, end token included
        shown.append(row)
    return shown


def _pieces(encoder: Encoder, ids: list[int]) -> list[dict[str, Any]]:
    return [{"id": i, "text": encoder.tokenizer.decode([i])} for i in ids]


def _print(found: Found, shown: Sequence[dict[str, Any]]) -> None:
    from rich.text import Text

    from corsa.data.text import shown as plain
    from corsa.terminal import Console

    console, counts = Console(), found.counts
    marks = MARKS if _has(console.encoding, MARKS) else ASCII_MARKS

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    sound = not (counts["skipped"] or counts.get("contradictions") or found.remarks)
    say(f"{counts['source']}: {counts['facts']} facts" + ", no fault found" * sound)
    say(
        f"  {counts['with_wordings']} with other wordings, {counts['with_aliases']} with aliases, "
        f"{counts['with_neighbors']} with neighbors"
    )
    for line in found.remarks:
        say(f"  {line}")
    for bad in counts["skipped"][:10]:
        say(f"  skipped: {bad}")
    if len(counts["skipped"]) > 10:
        say(f"  and {len(counts['skipped']) - 10} more skipped: all of them with --json")
    for line in counts.get("contradictions", [])[:10]:
        say(f"  contradiction: {line}")
    if converted := counts.get("converted"):
        lost = [f"{count} {kind}" for kind, count in counts.get("without_column", {}).items()]
        without = f"; {' and '.join(lost)} questions have no column in this form and are left out" if lost else ""
        say(f"  wrote {converted['facts']} facts to {converted['file']}{without}")
    if shown:
        among = len(found.records)
        others = f" of {among}; --show {among} shows all" * (len(shown) < among)
        say(f"\nAs the model sees {len(shown)}{others} ({marks.between} between tokens, {marks.space} a space):")
    for row in shown:
        say(f"\n{plain(row['id'], 200)}")
        for name in ("prompt", "target_new", "target_old"):
            if row[name] is None:
                say(f"  {name:<11}  (asked of the model)")
                continue
            pieces = Text(marks.between, style="dim").join(Text(_visible(p["text"], marks)) for p in row[name][:PIECES])
            if len(row[name]) > PIECES:
                pieces.append(f" ... and {len(row[name]) - PIECES} more tokens", style="dim")
            console.print(Text(f"  {name:<11}  ").append_text(pieces), soft_wrap=True, highlight=False)
        for name in ("aliases_new", "aliases_old", "paraphrases"):
            if row[name]:
                words = " | ".join(plain(text, 200) for text in row[name][:10])
                say(f"  {name:<11}  {words}" + f" | and {len(row[name]) - 10} more" * (len(row[name]) > 10))
        first, end = row["answer_span"]
        say(f"  answer       tokens {first + 1} to {end} of {end}: what is learnt, its end token included")


def _has(encoding: str, marks: Marks) -> bool:
    try:
        "".join(marks).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _visible(text: str, marks: Marks = MARKS) -> str:
    from corsa.terminal import visible

    return visible(text.replace("\n", marks.line).replace(" ", marks.space))
