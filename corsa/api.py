"""The Python API: what the commands do, from a program. `import corsa` is enough: these names are found there.

Training and asking run as steps of a store (`storage`), so that nothing is computed twice and an interrupted call goes
on from where it was; they join the cluster that RAY_ADDRESS names, or start one on this machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console

from corsa.data.edit import Edit, to_table
from corsa.editing.options import EditOptions, EvaluateOptions
from corsa.errors import CorsaError

if TYPE_CHECKING:
    import datasets

    from corsa.editing.run import Result


def load_edits(
    source: str | Path | datasets.Dataset | Iterable[Mapping[str, Any]], name: str = "file", **how: Any
) -> list[Edit]:
    """The edits of a file, a data set or a benchmark, each with the questions that show whether it took.

    Args:
        source: a path (JSONL, CSV, Parquet), a `datasets.Dataset` or any rows with the columns `prompt`, `target_new`,
            `target_old` and perhaps more (`corsa.data.benchmarks.file`); "" for the benchmark that ships with it.
        name: the benchmark, `corsa data` lists them; "file": your own facts.
        how: `limit`, `offset`, `rounds` and the other arguments of `corsa.data.benchmarks.read`.

    Raises:
        CorsaError: a record cannot be used; file, line, field and reason are in its text.

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
    """Edits as a `datasets.Dataset` with the columns of `corsa.data.edit.EDIT_SCHEMA`; `load_edits` reads it again.

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
    """Teach facts: a PEFT adapter in `out`, its report, and what was found. As `corsa edit`.

    Args:
        edits: a file, a data set, rows, or edits; `target_old` may be absent, the model is then asked for it.
        out: directory of the adapter; must be new.
        options: fields of `corsa.editing.options.EditOptions`: model, adapter, method, storage, gates, training, ...

    Returns:
        `values` (the main metrics), `predictions` (every answer), `report` (the page), `passed` (all gates).

    Raises:
        CorsaError: something to mend, or a step failed.

    >>> facts = [{"prompt": "Who leads Acme?", "target_new": "Ada Byron", "target_old": "Grace Murray"}]
    >>> tiny = {"model": "random:tiny-llama", "storage": f"{folder}/runs", "evaluation": {"new_tokens": 4}}
    >>> quick = {"epochs": 2, "batch": 1}
    >>> result = edit(facts, f"{folder}/january", training=quick, **tiny)
    >>> result.passed, sorted(path.name for path in result.out.iterdir())[:3]
    (True, ['README.md', 'adapter_config.json', 'adapter_model.safetensors'])
    """
    from corsa.editing.plan import plan_edit
    from corsa.editing.run import teach

    with _as_file(edits) as path:
        chosen = _options(EditOptions, edits=str(path), out=str(out), **options)
        return teach(chosen, plan_edit(chosen), Console(stderr=True))


def evaluate(
    edits: str | Path | datasets.Dataset | Iterable[Edit | Mapping[str, Any]] | None = None, **options: Any
) -> Result:
    """Ask a model about facts, alone and with an adapter. As `corsa evaluate`.

    Args:
        edits: as in `edit`; None: a `benchmark`, or all that the `adapter` was taught.
        options: fields of `corsa.editing.options.EvaluateOptions`: model, adapter, benchmark, data, limit, ...

    Returns:
        As `edit`, without a directory.

    Raises:
        CorsaError: something to mend, or a step failed.

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
        fault = error.errors()[0]
        raise CorsaError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (found {fault['input']!r})") from None


@contextmanager
def _as_file(facts: Any) -> Iterator[Path]:
    """The facts as a file of `corsa.data.benchmarks.file`; what it holds is its identity, not where it lies."""
    if isinstance(facts, str | Path):
        yield Path(facts).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="corsa-") as folder:
        path = Path(folder) / "edits.jsonl"
        rows = [json.dumps(_row(fact), ensure_ascii=False) for fact in facts]
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        yield path


def _row(fact: Edit | Mapping[str, Any]) -> dict[str, Any]:
    """One line of the file: of an edit, its probes as the columns they come from."""
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
