"""Generation by vLLM on the cluster, through Ray Data's processor: many adapters of one base at once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pyarrow as pa
import pyarrow.compute as pc

from corsa.config import ModelConfig, Placement
from corsa.errors import CorsaError
from corsa.evaluation.predict import TEMPERATURE, TOP_P
from corsa.flow.ray_data import as_dataset, retried
from corsa.flow.store import Artifact
from corsa.models.loading import files_of
from corsa.training.resources import cpus_per_worker

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of its adapters."""

_ANSWERS = pa.schema([("number", pa.int64()), ("tokens", pa.list_(pa.int32()))])
_BLOCK = 1024  # requests per block
_TOGETHER = 8  # adapters on a GPU at a time


@dataclass(frozen=True)
class Asked:
    """What one adapter, or the base (`adapter` None), is to continue."""

    adapter: Artifact | None
    requests: pa.Table  # `corsa.evaluation.deferred_predictor.REQUESTS`


def continuations(
    asked: Sequence[Asked],
    model: ModelConfig,
    ends: Sequence[int],
    placement: Placement,
    told: Callable[[int], None] = lambda done: None,
) -> list[pa.ChunkedArray]:
    """For each adapter the continuation of each request, token ids (list<int32>), in their order. Each may go on after
    the end of its answer.

    One engine per worker of the placement, on its GPU (or its CPUs); with a sharded base one engine on all of them.

    Args:
        asked: the requests to each adapter.
        model: the base.
        ends: token ids that end an answer.
        placement: whose GPUs are used, and how often lost engines are replaced.
        told: called with the number of finished requests.

    Raises:
        CorsaError: the base or an adapter cannot be loaded by vLLM, with its error.
    """
    from ray.exceptions import RayError, UserCodeException

    table = _table(asked)
    if not len(table):
        return [pa.chunked_array([], _ANSWERS.field("tokens").type) for _ in asked]
    parts: list[pa.Table] = []
    processor = _processor(asked, table, model, ends, placement)

    def attempt() -> None:
        parts.clear()
        answered = processor(as_dataset(table, _BLOCK)).iter_batches(batch_size=None, batch_format="pyarrow")
        try:
            for batch in answered:
                parts.append(cast(pa.Table, batch).select(_ANSWERS.names).cast(_ANSWERS))
                told(sum(map(len, parts)))
        except UserCodeException as error:  # not a lost engine: it would fail again
            raise CorsaError(f"vLLM did not answer: {_cause(error)}") from error

    try:
        retried(placement, attempt)
    except RayError as error:
        raise CorsaError(f"vLLM did not answer: {_cause(error)}") from error
    found = pa.concat_tables(parts).sort_by("number")["tokens"]
    starts = [sum(len(one.requests) for one in asked[:i]) for i in range(len(asked))]
    return [found.slice(start, len(one.requests)) for start, one in zip(starts, asked, strict=True)]


def _cause(error: Exception) -> str:
    """The error in the engine's own process, without what Ray adds to it."""
    own = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
    return next((line for line in reversed(own) if "UserCodeException" not in line), type(error).__name__)


def _processor(
    asked: Sequence[Asked], table: pa.Table, model: ModelConfig, ends: Sequence[int], placement: Placement
) -> Callable[[Any], Any]:
    """Ray Data's processor for this base and these adapters."""
    import ray

    logging.getLogger("ray.llm").addHandler(logging.NullHandler())  # else each of its modules prints what it does
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    source, revision = files_of(model)
    sharded = placement.sharding.zero_stage == 3
    adapters = [one.adapter for one in asked if one.adapter]
    prompts = pc.call_function("list_value_length", [table["tokens"]]).to_numpy()
    longest = int((prompts + table["new_tokens"].to_numpy()).max())
    engine: dict[str, Any] = {
        "dtype": model.element,
        "max_model_len": longest + 1,
        "tensor_parallel_size": placement.workers if sharded else 1,
        "disable_log_stats": True,
    }
    engine |= {"revision": revision, "tokenizer_revision": revision} if revision else {}
    if adapters:
        engine |= {
            "enable_lora": True,
            "max_lora_rank": _rank(adapters),
            "max_loras": min(len(adapters), _TOGETHER),
            "max_cpu_loras": len(adapters),
        }
    each = {"CPU": cpus_per_worker(placement)} | ({"GPU": 1.0} if placement.gpu else {})
    engines = 1 if sharded else placement.workers
    config = vLLMEngineProcessorConfig(
        model_source=source,
        engine_kwargs=engine,
        concurrency=(engines, engines),
        batch_size=256,
        placement_group_config={"bundle_per_worker": each},
        dynamic_lora_loading_path=_bucket(asked[0]) or None,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )
    ended = [int(token) for token in ends]

    def request(row: dict[str, Any]) -> dict[str, Any]:
        greedy = row["seed"] is None
        sampling = {
            "temperature": 0.0 if greedy else TEMPERATURE,
            "top_p": 1.0 if greedy else TOP_P,
            "seed": 0 if greedy else row["seed"],
            "max_tokens": row["new_tokens"],
            "stop": [] if row["lines"] else ["\n"],
            "stop_token_ids": ended,
        }
        named = {"model": row["adapter"] or source, "tokenized_prompt": row["tokens"], "sampling_params": sampling}
        return {"number": row["number"], **named}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"number": row["number"], "tokens": row["generated_tokens"]}

    little = {"num_cpus": 0.01}  # a task of a whole CPU might wait forever for one
    with patch.object(ray, "init"):  # building a processor connects once more, and Ray warns of that
        return build_processor(config, request, answer, preprocess_map_kwargs=little, postprocess_map_kwargs=little)


def _bucket(asked: Asked) -> str:
    """The bucket that holds the adapter, as `s3://NAME/`; "" if it is in a directory."""
    found = re.match(r"\w+://[^/]+/", asked.adapter.url) if asked.adapter else None
    return found[0] if found else ""


def _table(asked: Sequence[Asked]) -> pa.Table:
    """All requests, with their number and adapter: its directory, or its path in a bucket; "" for the base.

    No column is called `prompt`: Ray Data would take it for a text.
    """
    named = []
    for one in asked:
        name = one.adapter.path("adapter").removeprefix(_bucket(one)) if one.adapter else ""
        named.append(one.requests.append_column("adapter", pa.repeat(pa.scalar(name), len(one.requests))))
    table = pa.concat_tables(named)
    return table.append_column("number", pa.array(range(len(table)), pa.int64()))


def _rank(adapters: Sequence[Artifact]) -> int:
    """The smallest of vLLM's largest ranks that all adapters fit into."""
    ranks = [json.loads(Path(a.local("adapter/adapter_config.json")).read_text())["r"] for a in adapters]
    fits = [rank for rank in RANKS if rank >= max(ranks)]
    if not fits:
        raise CorsaError(f"vLLM takes adapters of rank {RANKS[-1]} or less, one here has {max(ranks)}")
    return fits[0]
