"""The work of a worker group for one step, or for several rounds that are trained together."""

from __future__ import annotations

import time
from collections.abc import Sequence

from corsa.config.steps import RoundConfig
from corsa.flow.task import Task
from corsa.methods import method_of
from corsa.training.prediction_tasks import PREDICTIONS_OF
from corsa.training.training_tasks import teach_lora, teach_method
from corsa.training.worker_context import Post, WorkerContext


def take(tasks: Sequence[Task], context: WorkerContext, post: Post) -> dict[str, str]:
    """Do one step, or several that are trained together, and commit their results. Every worker of the group calls
    this; only the leader reads and writes. Returns {fingerprint: cause} of failed steps.
    """
    started = time.monotonic()
    post({"phase": "loading"})
    context.start_step()
    failed: dict[str, str] = {}
    if type(tasks[0].config) is RoundConfig:
        failed = teach_lora(tasks, context, post)
    else:
        (task,) = tasks
        do = teach_method if method_of(task.config) else PREDICTIONS_OF[type(task.config)]
        metrics = do(task, context, post)
        if context.group.leads:
            task.commit(metrics | context.how_it_ran(), time.monotonic() - started)
    context.spent.clear()
    return failed


def pack_key(task: Task) -> tuple[RoundConfig, tuple[tuple[str, str | None], ...]] | None:
    """Rounds with equal keys can be trained together: they differ only in lambda, beta, rho, learning rate and seed.

    None: the step runs alone.
    """
    if type(task.config) is not RoundConfig or task.config.step.effective().perturb_every > 1:
        return None
    inputs = {name: None if name == "previous" else step.fingerprint for name, step in task.step.inputs.items()}
    step, shared = task.config.step, task.config.shared
    # Edits have one role in all rows: a weight may differ, but not whether it is 0.
    roles = {name: float(getattr(step, name) > 0) for name in ("replay", "anchor")}
    shared = shared.model_copy(update={"step": shared.step.model_copy(update=roles)})
    return shared, tuple(sorted(inputs.items()))
