"""The predictions table of a report, from the answers of several steps. It may have millions of rows: its texts are
codes, and none of its rows is a Python object.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from corsa.config.steps import Shown
from corsa.evaluation.prepared_predictions import BASE, ROW_GROUP

TEXTS = ("method", "edit", "chain", "part", "kind", "prompt", "answer", "target_old", "output")
"""The columns of text."""
_CODES = pa.dictionary(pa.int32(), pa.string())


def reported(answers: Iterable[tuple[str | Path, Shown]], schedule: pa.Table, cases: pa.Table | None) -> pa.Table:
    """The predictions of several steps, with the method's name and the case of each edit. The base model's come first.

    The base model's rows get the scenario's round and part of each edit; those of an edit that the scenario does not
    teach are left out.

    Args:
        answers: files of predictions, and how each is shown.
        schedule: `corsa.data.schedule.ROUNDS`, of all scenarios.
        cases: columns edit and case.
    """
    found: dict[bool, list[pa.Table]] = {True: [], False: []}
    for path, shown in answers:
        rows = pq.read_table(path, read_dictionary=list(TEXTS))
        if "case" in rows.column_names:  # an earlier report's table, which an adapter brings with it
            rows = rows.drop_columns("case")
        rows = _with(rows, "method", _same(shown.method, len(rows)))
        if shown.trained is not None:
            rows = _with(rows, "trained", _same(shown.trained, len(rows)))
        if shown.method == BASE:
            at = _places(rows["edit"], schedule["edit"])
            rows, at = rows.filter(at.is_valid()), at.drop_null()
            for name in ("learnt", "part"):
                rows = _with(rows, name, schedule[name].take(at))
        case = _same("", len(rows))
        if cases is not None:
            known = cases["case"].take(_places(rows["edit"], cases["edit"]))
            case = pc.fill_null(known, "")
        rows = rows.append_column("case", case.cast(pa.string()).dictionary_encode())
        found[shown.method == BASE].append(_coded(rows))
    every = found[True] + found[False]  # tables of an earlier version have no `weight`
    return pa.concat_tables(every, promote_options="default").unify_dictionaries()


def write_reported(table: pa.Table, path: Path) -> None:
    """Write the table with its texts as texts, in row groups."""
    schema = pa.schema([(f.name, pa.string() if f.type == _CODES else f.type) for f in table.schema])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(table), ROW_GROUP):
            writer.write_table(table.slice(start, ROW_GROUP).cast(schema))
        if not len(table):
            writer.write_table(schema.empty_table())


def read_reported(file: object, columns: list[str] | None = None) -> pa.Table:
    """The table from a file that `write_reported` or an earlier version wrote."""
    return _coded(pq.read_table(file, columns=columns, read_dictionary=[*TEXTS, "case"])).unify_dictionaries()


def _coded(rows: pa.Table) -> pa.Table:
    texts = {*TEXTS, "case"}
    return rows.cast(pa.schema([(f.name, _CODES if f.name in texts else f.type) for f in rows.schema]))


def _with(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    at = rows.schema.get_field_index(name)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_string(values.type):
        values = values.dictionary_encode()
    else:
        values = values.cast(rows.schema.field(name).type)
    return rows.set_column(at, name, values)


def _places(values: pa.ChunkedArray, among: pa.ChunkedArray) -> pa.ChunkedArray:
    """The position of each value among others; null for one that is not there."""
    options = pc.SetLookupOptions(among.combine_chunks())
    return pc.call_function("index_in", [values.cast(pa.string())], options)


def _same(value: str | int, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(value), rows)
