"""Measures the speed from a file of edits to batches, the memory of a worker's token table, and the time until the
first batch is in a worker of a running cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from corsa.algorithm.packing import pack
from corsa.config import ModelConfig, Placement
from corsa.data.benchmarks import read
from corsa.data.edit import to_table
from corsa.errors import CorsaError
from corsa.flow.cluster import connect, disconnect
from corsa.models.encoding import Encoder
from corsa.models.loading import load_tokenizer
from corsa.terminal import Console
from corsa.training.tokens import REFERENCE, TokenTable, batch_order, token_rows

_BLOCK = 512  # edits tokenized together


@dataclass(frozen=True)
class DataFigures:
    """One pass in one process. In seconds unless the name gives another unit."""

    edits: int
    read_s: float  # the published file to the `Edit` table
    tokenize_s: float
    pack_s: float  # one epoch of batches, from the token table to padded rows with their masks
    triplets_per_s: float  # reading, tokenizing and packing together
    table_bytes_per_edit: float  # of the token table that each worker holds
    memory_bytes_per_edit: float  # growth of a process that takes the table from shared memory, as a worker does
    memory_bytes_per_edit_tenfold: float  # with ten times as many edits
    padding_ratio: float
    batch: int
    model: str
    first_batch_s: float | None  # from a running cluster and a table on disk to the first batch in a worker


def measure_data(model: ModelConfig, file: Path, *, edits: int, batch: int, cluster: bool = False) -> DataFigures:
    """Make `edits` records from a CounterFact file (repeated ones get new ids) and turn them into one epoch of batches.

    Args:
        model: provides the tokenizer and the template.
        file: a published counterfact.json.
        edits: number of records.
        batch: edits per batch.
        cluster: also measure the first batch in a Ray Train worker, on the cluster of RAY_ADDRESS or a new local one.

    Raises:
        CorsaError: the file is not a list of CounterFact records, or the cluster cannot be reached.
    """
    encoder = Encoder(load_tokenizer(model), model.template)
    encoder.prompts(["the first call loads what the tokenizer needs"])
    with tempfile.TemporaryDirectory() as folder:
        path = _repeated(file, edits, Path(folder))
        times = [time.perf_counter()]
        found = read("counterfact", str(path)).edits
        table = to_table(found)
        times.append(time.perf_counter())
        blocks = [_tokenized(encoder, table.slice(i, _BLOCK)) for i in range(0, len(table), _BLOCK)]
        times.append(time.perf_counter())
        tokens = TokenTable(blocks)
        held = tokens.bytes
        ids = table["id"].to_pylist()
        processed = needed = 0
        for chosen in batch_order(len(ids), batch, seed=0, round_=1, epoch=0):
            whole = [tokens.triplet(ids[i]) for i in chosen]
            processed += sum(rows.input_ids.numel() for rows in pack(whole))
            needed += sum(map(len, whole))
        times.append(time.perf_counter())
        grown = [_growth(blocks, n, Path(folder)) for n in (1, 10)]
        first_batch_s = _first_batch(blocks, ids, batch, Path(folder)) if cluster else None
    read_s, tokenize_s, pack_s = np.diff(times).tolist()
    return DataFigures(
        edits=len(ids),
        read_s=read_s,
        tokenize_s=tokenize_s,
        pack_s=pack_s,
        triplets_per_s=len(ids) / (read_s + tokenize_s + pack_s),
        memory_bytes_per_edit=grown[0],
        memory_bytes_per_edit_tenfold=grown[1],
        table_bytes_per_edit=held / len(ids),
        padding_ratio=processed / needed,
        batch=batch,
        model=model.name,
        first_batch_s=first_batch_s,
    )


def _first_batch(blocks: Sequence[pa.Table], ids: Sequence[str], batch: int, folder: Path) -> float:
    """Seconds until a group of one worker is up, has the reference table through Ray Data, and has packed a batch."""
    pq.write_table(pa.concat_tables(blocks), folder / "reference.parquet")
    connect(Console(stderr=True))
    try:
        began = time.time()
        from corsa.training.start_group import in_group

        first = [ids[i] for i in batch_order(len(ids), batch, seed=0, round_=1, epoch=0)[0]]
        tables = {"reference": str(folder / "reference.parquet")}
        return in_group(_take_batch, {"ids": first}, Placement(), str(folder), tables) - began
    finally:
        disconnect()


def _take_batch(config: dict[str, Any]) -> float:
    """On the worker: the time (seconds since 1970) when the batch is packed."""
    from corsa.training.rounds import streamed_table

    table = streamed_table("reference")
    pack([table.triplet(id_) for id_ in config["ids"]])
    return time.time()


def _repeated(file: Path, edits: int, folder: Path) -> Path:
    """Writes a file of `edits` records: the given ones, repeated, each with its own id."""
    try:
        records = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CorsaError(f"{file} cannot be read as CounterFact's JSON list: {error}") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) and "case_id" in r for r in records) or not records:
        raise CorsaError(f"{file} is not a list of CounterFact records: each has a case_id")
    path = folder / "counterfact.json"
    path.write_text(json.dumps([records[i % len(records)] | {"case_id": i} for i in range(edits)]))
    return path


def _tokenized(encoder: Encoder, table: pa.Table) -> pa.Table:
    """Rows of the reference table, without computing its two reference columns."""
    rows = token_rows(encoder, table.select(["id", "prompt", "target_new", "target_old"]).to_pylist())
    return pa.Table.from_pylist([row | {"reference_new": 0.0, "reference_old": 0.0} for row in rows], schema=REFERENCE)


_WORKER = """
import sys
import pyarrow as pa
from corsa.training.tokens import TokenTable

def own():  # KiB: without what is mapped, as blocks of Ray's object store are
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

file = pa.ipc.open_file(pa.memory_map(sys.argv[1]))
blocks = [file.get_batch(i) for i in range(file.num_record_batches)]
TokenTable([blocks[0].slice(0, 64)])  # what the first use loads
before = own()
table = TokenTable(blocks)
print(1024 * (own() - before) / len(table))
"""


def _growth(blocks: Sequence[pa.Table], times: int, folder: Path) -> float:
    """Memory growth in bytes per edit of a new process that takes the table, repeated `times`, from shared memory."""
    whole, path = pa.concat_tables(blocks), folder / "reference.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, whole.schema) as writer:
        for n in range(times):
            ids = pa.array([f"{id_}/{n}" for id_ in whole["id"].to_pylist()])
            writer.write_table(whole.set_column(0, whole.schema.field("id"), ids), max_chunksize=4096)
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, str(path)], env=os.environ, capture_output=True, text=True, check=True
    )
    return float(done.stdout)
