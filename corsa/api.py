"""The Python API: the commands as functions. `import corsa` makes these names available.

Training and prediction run as steps whose results are kept in a store (`storage`): nothing is computed twice, and an
interrupted call continues where it stopped. They use the Ray cluster in RAY_ADDRESS, or start one on this machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from corsa.config.complaints import refused
from corsa.data.edit import Edit, to_table
from corsa.data.text import shown
from corsa.editing.options import EditOptions, EvaluateOptions
from corsa.errors import CorsaError
from corsa.terminal import Console

if TYPE_CHECKING:
    import datasets

    from corsa.editing.run import Result


def load_edits(
    source: str | Path | datasets.Dataset | Iterable[Mapping[str, Any]], name: str = "file", **how: Any
) -> list[Edit]:
    """Reads the edits of a file, a data set or a benchmark, each with the questions that test it.

    Args:
        source: a path (JSONL, CSV, Parquet), a `datasets.Dataset` or any rows with the columns `prompt`, `target_new`,
            `target_old` and optional ones (`corsa.data.benchmarks.file`); "" for the shipped or hub copy of `name`.
        name: the benchmark (`corsa data` lists them), or "file" for your own facts.
        how: `limit`, `offset`, `rounds` and the other arguments of `corsa.data.benchmarks.read`.

    Raises:
        CorsaError: a record cannot be used; the text gives file, line, field and reason.

    >>> (edit,) = load_edits([{"prompt": "Who leads Acme?", "target_new": "Ada Byron", "target_old": "Grace Murray"}])
    >>> edit.target_new, [probe.kind for probe in edit.probes]
    ('Ada Byron', ['edit'])
    >>> load_edits("", "world_facts", limit=1)[0].prompt
    'Who is the prime minister of the United Kingdom?'
    """
    from corsa.data.benchmarks import read

    if isinstance(source, str | Path):
        return read(name, str(source) or None, **how).edits
    with _as_file(source) as path:
        return read("file", str(path), **how).edits


def to_dataset(edits: Iterable[Edit]) -> datasets.Dataset:
    """Edits as a `datasets.Dataset` with the columns of `corsa.data.edit.EDIT_SCHEMA`; `load_edits` can read it.

    >>> edits = load_edits([{"prompt": "Who leads Acme?", "target_new": "Ada Byron", "target_old": "Grace Murray"}])
    >>> data = to_dataset(edits)
    >>> data.num_rows, data[0]["target_old"]
    (1, 'Grace Murray')
    >>> load_edits(data) == edits
    True
    """
    import datasets

    return datasets.Dataset(to_table(edits))


def edit(
    edits: str | Path | datasets.Dataset | Iterable[Edit | Mapping[str, Any]], out: str | Path, **options: Any
) -> Result:
    """Teaches facts, as `corsa edit` does. Writes a PEFT adapter and its report to `out`.

    Args:
        edits: a file, a data set, rows, or edits. The model is asked for a missing `target_old`.
        out: directory of the adapter; must be new.
        options: fields of `corsa.editing.options.EditOptions`: model, adapter, method, storage, gates, training, ...

    Returns:
        `values` (the main metrics), `predictions` (every answer), `report` (the page), `passed` (all gates).

    Raises:
        CorsaError: an input is wrong, or a step failed.

    >>> facts = [{"prompt": "Who leads Acme?", "target_new": "Ada Byron", "target_old": "Grace Murray"}]
    >>> tiny = {"model": "random:tiny-llama", "storage": f"{folder}/runs", "evaluation": {"new_tokens": 4}}
    >>> quick = {"epochs": 2, "batch": 1}
    >>> result = edit(facts, f"{folder}/january", training=quick, **tiny)
    >>> result.passed, sorted(path.name for path in result.out.iterdir())[:3]
    (True, ['README.md', 'adapter_config.json', 'adapter_model.safetensors'])
    """
    from corsa.editing.plan import plan_edit
    from corsa.editing.run import teach
    from corsa.editing.tuning import tune

    with _as_file(edits) as path:
        chosen, console = _options(EditOptions, edits=str(path), out=str(out), **options), Console(stderr=True)
        tuned = tune(chosen, console)[0] if chosen.tune else None
        return teach(chosen, plan_edit(chosen, tuned), console)


def evaluate(
    edits: str | Path | datasets.Dataset | Iterable[Edit | Mapping[str, Any]] | None = None, **options: Any
) -> Result:
    """Asks a model about facts, without and with an adapter, as `corsa evaluate` does.

    Args:
        edits: as in `edit`; None: a `benchmark`, or all facts that the `adapter` was taught.
        options: fields of `corsa.editing.options.EvaluateOptions`: model, adapter, benchmark, data, limit, ...

    Returns:
        As `edit`, without a directory.

    Raises:
        CorsaError: an input is wrong, or a step failed.

    >>> result = evaluate(adapter=f"{folder}/january", storage=f"{folder}/runs", evaluation={"new_tokens": 4})
    >>> 0 <= result.values["edit_success"] <= 1
    True
    """
    from corsa.editing.run import evaluate

    if edits is None:
        return evaluate(_options(EvaluateOptions, **options), Console(stderr=True))
    with _as_file(edits) as path:
        return evaluate(_options(EvaluateOptions, edits=str(path), **options), Console(stderr=True))


def _options(kind: type[Any], **fields: Any) -> Any:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    try:
        return kind(**given)
    except ValidationError as error:
        raise refused(error, kind) from None


@contextmanager
def _as_file(facts: Any) -> Iterator[Path]:
    """The facts as a file of `corsa.data.benchmarks.file`. Its contents identify it, not its path."""
    from corsa.data.benchmarks.files import call

    if isinstance(facts, str | Path):
        yield Path(facts).expanduser()
        return
    rows = _rows(facts)
    with tempfile.TemporaryDirectory(prefix="corsa-") as folder:
        path = Path(folder) / "edits.json"
        call(path, "the facts given")
        path.write_text(json.dumps(rows), encoding="utf-8")
        yield path


def _rows(facts: Any) -> list[dict[str, Any]]:
    """The facts as rows that JSON can hold.

    Raises:
        CorsaError: they are not a list of records.
    """
    if isinstance(facts, Edit | Mapping):
        what = "a mapping: choose one split of it, or" if _holds_tables(facts) else "one record:"
        raise CorsaError(f"the facts given are {what} give a list of records, such as [{{'prompt': ...}}]")
    if hasattr(facts, "to_dict") and hasattr(facts, "columns"):
        raise CorsaError("the facts given are a table: give its rows, frame.to_dict('records')")
    try:
        given = list(facts)
    except TypeError:
        raise CorsaError(
            f"the facts given are {type(facts).__name__}: give a path, or a list of records with prompt and target_new"
        ) from None
    rows = []
    for index, fact in enumerate(given):
        if not isinstance(fact, Edit | Mapping):
            raise CorsaError(f"the facts given, record [{index}]: is no record but {shown(repr(fact))}")
        rows.append(row := _row(fact))
        try:
            json.dumps(row)
        except (TypeError, ValueError, RecursionError) as error:
            raise CorsaError(f"the facts given, record [{index}]: {error}; give plain strings and lists") from None
    return rows


def _holds_tables(facts: Any) -> bool:
    return isinstance(facts, Mapping) and any(hasattr(value, "column_names") for value in facts.values())


def _row(fact: Edit | Mapping[str, Any]) -> dict[str, Any]:
    """One row of the file. The probes of an edit become columns again."""
    if isinstance(fact, Edit):
        fact = fact.model_dump()
    row = {name: value for name, value in fact.items() if value is not None}
    probes = row.pop("probes", [])
    row.pop("case", None)
    if probes:
        row["paraphrases"] = [prompt for p in probes if p["kind"] == "paraphrase" for prompt in p["prompts"]]
        row["neighbors"] = [
            {"prompt": p["prompts"][0], "answer": p["answer"], "aliases": list(p["aliases"])}
            for p in probes
            if p["kind"] == "neighbor"
        ]
    if row.get("chain") == row.get("id"):
        row = {name: value for name, value in row.items() if name not in ("chain", "round")}
    return row
