"""Rounds of editing on Ray Train. Each round is trained, asked its probes, and committed as its own result.

`run` is the step function. It takes any list of pending rounds, of one or several chains, through one worker group, so
the group starts once and rounds share a loaded model. After an interruption, committed rounds stay done, and the
current round continues from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from corsa.config import Placement
from corsa.errors import CorsaError
from corsa.flow.task import Progress, Task
from corsa.training.loop import RoundFailedError
from corsa.training.start_group import in_group
from corsa.training.tokens import TokenTable
from corsa.training.vllm_rounds import run_with_vllm
from corsa.training.worker_context import WorkerContext
from corsa.training.worker_group import WorkerGroup
from corsa.training.worker_tasks import pack_key, take


def run(tasks: list[Task], progress: Progress) -> dict[str, str]:
    """Step function (together): run `tasks` on one Ray Train worker group. Returns {fingerprint: cause} of failures.

    Raises:
        CorsaError: the group failed more often than `placement.max_failures` (with the worker's own error), or the
            cluster had no room for it within `placement.start_timeout`.
    """
    engine = tasks[0].placement.engine
    return run_with_vllm(tasks, progress, _in_one_group) if engine == "vllm" else _in_one_group(tasks, progress)


def _in_one_group(tasks: Sequence[Task], progress: Progress) -> dict[str, str]:
    inputs = [t.inputs[name] for t in tasks for name in ("reference", "known_reference") if name in t.step.inputs]
    tables = {artifact.fingerprint: str(artifact.local("reference.parquet")) for artifact in inputs}
    config = {"tasks": list(tasks), "progress": progress, "tables": list(tables)}
    return in_group(work, config, tasks[0].placement, tasks[0].store.url, tables)


def work(config: dict[str, Any]) -> dict[str, str]:
    """Runs on each Ray Train worker: streams the token tables, then takes the rounds."""
    tasks: list[Task] = config["tasks"]
    placement: Placement = tasks[0].placement
    group = WorkerGroup.join(placement)
    context = WorkerContext(group, placement, {})
    with context.timed("stream"):
        context.tables |= {name: streamed_table(name) for name in config["tables"]}
    return take_rounds(tasks, context, config["progress"])


def streamed_table(name: str) -> TokenTable:
    """The reference table that the group streams under this name, read on this worker."""
    from ray.train import get_dataset_shard

    shard: Any = get_dataset_shard(name)
    return TokenTable(shard.iter_batches(batch_size=4096, batch_format="pyarrow"))


def take_rounds(tasks: Sequence[Task], context: WorkerContext, progress: Progress) -> dict[str, str]:
    """Train, ask and commit each round in turn, or up to `placement.pack` compatible rounds together. If a round fails,
    only the later rounds of its chain are not run.
    """
    group = context.group
    done = group.share([group.leads and task.finished is not None for task in tasks])
    # With sharding, the optimizer and the passes of the workers support one adapter only.
    most = context.placement.pack if context.placement.sharding.zero_stage == 0 else 1
    waiting = [task for task, finished in zip(tasks, done, strict=True) if not finished]
    failed: dict[str, str] = {}
    while waiting:
        pack = _together(waiting, failed, most)
        waiting = [task for task in waiting if task not in pack]
        before = [step.name for step in pack[0].step.inputs.values() if step.fingerprint in failed]
        if before:
            failed[pack[0].fingerprint] = f"not run: {before[0]} failed"
            waiting = [*pack[1:], *waiting]
            continue
        line = _Line(pack[0], tasks, group, progress)
        try:
            failed |= take(pack, context, line.post)
        except CorsaError as e:
            if group.size > 1 and not isinstance(e, RoundFailedError):
                raise  # only this worker knows of it: raise, so that the others do not wait
            failed |= dict.fromkeys((task.fingerprint for task in pack), str(e))
        line.post({"phase": "done"})
    return failed


def _together(waiting: Sequence[Task], failed: Mapping[str, str], most: int) -> list[Task]:
    """The first waiting round, and others with the same pack key whose inputs are all available."""
    first, missing = waiting[0], {task.fingerprint for task in waiting} | failed.keys()
    key = pack_key(first) if most > 1 else None
    free = [
        task
        for task in (() if key is None else waiting[1:])
        if pack_key(task) == key and not any(needed.fingerprint in missing for needed in task.step.inputs.values())
    ]
    return [first, *free[: most - 1]]


class _Line:
    """The progress line of the chain of `task`, one of `tasks`. Posted values are added to those of the same phase."""

    def __init__(self, task: Task, tasks: Sequence[Task], group: WorkerGroup, progress: Progress) -> None:
        self._progress = progress if group.leads else None
        chain = _chain(task)
        self._shown: dict[str, Any] = {"chain": chain}
        if chain != task.name:
            last = max(t.config.round for t in tasks if _chain(t) == chain)
            self._shown |= {"round": task.config.round, "rounds": last}
        self._of_chain = self._shown

    def post(self, more: dict[str, Any]) -> None:
        begins = "phase" in more and more["phase"] != self._shown.get("phase")
        self._shown = (self._of_chain if begins else self._shown) | more
        if self._progress:
            self._progress.post(self._shown)


def _chain(task: Task) -> str:
    return task.name.removesuffix(f"/round{getattr(task.config, 'round', 0)}")
