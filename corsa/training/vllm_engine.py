"""Generation by vLLM on the cluster, through Ray Data's processor: many adapters of one base at once."""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from corsa.config import ModelConfig, Placement
from corsa.errors import CorsaError
from corsa.evaluation.deferred_predictor import Request
from corsa.evaluation.predict import TEMPERATURE, TOP_P
from corsa.flow.ray_data import as_dataset, retried
from corsa.flow.store import Artifact
from corsa.models.loading import files_of
from corsa.training.resources import cpus_per_worker

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of its adapters."""

_BLOCK = 1024  # requests per block
_TOGETHER = 8  # adapters on a GPU at a time


@dataclass(frozen=True)
class Asked:
    """What one adapter, or the base (`adapter` None), is to continue."""

    adapter: Artifact | None
    requests: Sequence[Request]


def continuations(
    asked: Sequence[Asked],
    model: ModelConfig,
    ends: Sequence[int],
    placement: Placement,
    told: Callable[[int], None] = lambda done: None,
) -> list[list[list[int]]]:
    """The continuation of each request, token ids, in their order. They may go on after the end of an answer.

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

    table = _table(asked, _names(asked))
    if not len(table):
        return [[] for _ in asked]
    processor = _processor(asked, table, model, ends, placement)
    found: list[list[int]] = [[] for _ in range(len(table))]

    def attempt() -> None:
        done = 0
        batches = processor(as_dataset(table, _BLOCK)).iter_batches(batch_size=None, batch_format="pyarrow")
        try:
            for batch in batches:
                for number, tokens in zip(batch["number"].to_pylist(), batch["tokens"].to_pylist(), strict=True):
                    found[number] = tokens
                done += len(batch)
                told(done)
        except UserCodeException as error:  # not a lost engine: it would fail again
            raise CorsaError(f"vLLM did not answer: {_cause(error)}") from error

    try:
        retried(placement, attempt)
    except RayError as error:
        raise CorsaError(f"vLLM did not answer: {_cause(error)}") from error
    starts = [sum(len(one.requests) for one in asked[:i]) for i in range(len(asked))]
    return [found[start : start + len(one.requests)] for start, one in zip(starts, asked, strict=True)]


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
    longest = max(
        len(prompt) + tokens
        for prompt, tokens in zip(table["tokens"].to_pylist(), table["new_tokens"].to_pylist(), strict=True)
    )
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
        greedy = row["seed"] < 0
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


def _names(asked: Sequence[Asked]) -> list[str]:
    """What each adapter is called: its directory, or its path in a bucket; "" for the base."""
    return ["" if one.adapter is None else one.adapter.path("adapter").removeprefix(_bucket(one)) for one in asked]


def _bucket(asked: Asked) -> str:
    """The bucket that holds the adapter, as `s3://NAME/`; "" if it is in a directory."""
    found = re.match(r"\w+://[^/]+/", asked.adapter.url) if asked.adapter else None
    return found[0] if found else ""


def _table(asked: Sequence[Asked], names: Sequence[str]) -> pa.Table:
    """All requests. `seed`: -1 for a greedy one. No column is called `prompt`: Ray Data would take it for a text."""
    every = [(name, request) for name, one in zip(names, asked, strict=True) for request in one.requests]
    seeds = [-1 if r.seed is None else zlib.crc32(repr(r.seed).encode()) for _, r in every]
    return pa.table(
        {
            "number": pa.array(range(len(every)), pa.int64()),
            "adapter": pa.array([name for name, _ in every], pa.string()),
            "tokens": pa.array([list(r.prompt) for _, r in every], pa.list_(pa.int32())),
            "new_tokens": pa.array([r.new_tokens for _, r in every], pa.int32()),
            "lines": pa.array([r.lines for _, r in every], pa.bool_()),
            "seed": pa.array(seeds, pa.int64()),
        }
    )


def _rank(adapters: Sequence[Artifact]) -> int:
    """The smallest of vLLM's largest ranks that all adapters fit into."""
    ranks = [json.loads(Path(a.local("adapter/adapter_config.json")).read_text())["r"] for a in adapters]
    fits = [rank for rank in RANKS if rank >= max(ranks)]
    if not fits:
        raise CorsaError(f"vLLM takes adapters of rank {RANKS[-1]} or less, one here has {max(ranks)}")
    return fits[0]
