"""Runs tasks of the EleutherAI evaluation harness on the base model or an edited one, on the cluster.

The harness reads its tasks' data from the Hugging Face hub. A task in a file of one's own may read local files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from corsa.config import Placement
from corsa.config.bounded_yaml import read_yaml
from corsa.config.steps import HarnessConfig
from corsa.errors import CorsaError, nearest
from corsa.evaluation.capability import MEASURED
from corsa.flow.task import Task


def check_harness(names: Sequence[str] = ()) -> None:
    """Check that the harness is installed and knows tasks, groups or tags of these names.

    Raises:
        CorsaError: it is not installed, or it has no task of one of the names.
    """
    if find_spec("lm_eval") is None:
        raise CorsaError("--gate lm-eval:TASK needs the evaluation harness: pip install 'corsa[harness]'")
    for name in names:
        if name not in known_tasks():
            near = nearest(name, known_tasks())
            raise CorsaError(
                f"--gate lm-eval: the harness has no task {name!r}"
                f"{f', did you mean {near!r}' if near else ''}; `lm-eval ls tasks` lists them, and FILE.yaml describes "
                "a task of your own"
            )


@cache
def known_tasks() -> tuple[str, ...]:
    """The names of the harness's tasks, groups and tags. Reads some 10,000 files: it takes seconds."""
    return tuple(import_module("lm_eval.tasks").TaskManager().all_tasks)


def own_task(path: str) -> dict[str, Any]:
    """The task that a file of the harness's form describes. Code in it (`!function`) is not run.

    Data files that lie beside the file are named by absolute paths, because workers run in directories of their own.

    Raises:
        CorsaError: the file cannot be read, or describes no task.
    """
    file = Path(path).expanduser()
    try:
        found = read_yaml(file)
    except OSError as error:
        raise CorsaError(f"--gate lm-eval: {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise CorsaError(f"--gate lm-eval: {path} is not plain YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not isinstance(found.get("task"), str):
        raise CorsaError(f"--gate lm-eval: {path} describes no task: it has no field 'task' with a name")
    folder = file.absolute().parent

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(item) for name, item in value.items()}
        if isinstance(value, list):
            return [placed(item) for item in value]
        return str(folder / value) if isinstance(value, str) and (folder / value).is_file() else value

    given = found.get("dataset_kwargs") or {}
    return found | {
        "dataset_kwargs": given | {"data_files": placed(given["data_files"])} if "data_files" in given else given
    }


def run_tasks(task: Task) -> dict[str, Any]:
    """Step function: the tasks' documents -> measured.parquet."""
    import ray

    from corsa.lora.peft_format import read_factors
    from corsa.training.resources import cpus_per_worker

    placement: Placement = task.placement
    change = read_factors(task.inputs["adapter"].local("adapter"))[0] if "adapter" in task.inputs else {}
    options: dict[str, Any] = {"num_cpus": cpus_per_worker(placement), "num_gpus": int(placement.gpu)}
    worker = ray.remote(_measure).options(**options, max_retries=placement.max_failures)
    task.progress.post({"chain": task.name, "phase": f"running {', '.join(task.config.tasks)}"})
    rows = ray.get(worker.remote(task.config, placement, change))
    task.progress.post({"chain": task.name, "phase": "done"})
    pq.write_table(pa.Table.from_pylist(rows, schema=MEASURED), task.output / "measured.parquet")
    return {"items": len(rows)}


def _measure(config: HarnessConfig, placement: Placement, change: Any) -> list[dict[str, Any]]:
    import torch

    from corsa.lora.attached import attached
    from corsa.models.loading import load_model, load_tokenizer

    check_harness()
    simple_evaluate = import_module("lm_eval").simple_evaluate
    wrapped = import_module("lm_eval.models.huggingface").HFLM
    if placement.threads:
        torch.set_num_threads(placement.threads)
    device = torch.device("cuda" if placement.gpu else "cpu")
    model, tokenizer = load_model(config.model, device), load_tokenizer(config.model)
    chat = config.model.template == "chat"
    with attached(model, change):
        language_model = wrapped(
            pretrained=model, tokenizer=tokenizer, device=str(device), batch_size=placement.probe_batch
        )
        try:
            found = simple_evaluate(
                language_model,
                tasks=[config.own.get(name, name) for name in config.tasks],
                limit=config.limit,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
        except OSError as error:  # with the ConnectionError of the datasets package
            raise CorsaError(
                f"--gate lm-eval: the data of {', '.join(config.tasks)} cannot be loaded: {error}. The harness reads "
                "the Hugging Face hub: make it reachable from the workers, or describe a task with local files "
                "(lm-eval:FILE.yaml)"
            ) from error
    return measured_rows(found)


def measured_rows(found: Any) -> list[dict[str, Any]]:
    """The result of `lm_eval.simple_evaluate` with its samples as rows of `MEASURED`: every numeric score of every
    document, as "<task> <metric>, <filter>".
    """
    rows = []
    for task, samples in found["samples"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        for sample in samples:
            for name in sample.get("metrics", ()):
                value = sample[name]
                if isinstance(value, bool | int | float):
                    rows.append(
                        {
                            "measure": f"{task} {name}, {sample.get('filter', 'none')}",
                            "item": str(sample["doc_id"]),
                            "numerator": float(value),
                            "denominator": 1.0,
                            "higher_is_better": bool(better.get(name, True)),
                        }
                    )
    return rows
