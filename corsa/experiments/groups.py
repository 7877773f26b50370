"""The resources that a model needs: the smallest worker group in which it fits, and its sharding."""

from __future__ import annotations

from corsa.config import STEPS, ModelConfig, Placement
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.planning.lengths import ASSUMED
from corsa.planning.plan import Job, Plan, plan
from corsa.planning.preflight import available
from corsa.planning.rates import rate


def placement_of(model: ModelConfig, experiment: Experiment) -> Placement:
    """The experiment's placement, with the number of workers (at most its own) and the sharding that this model needs.

    Raises:
        CorsaError: the model fits in no group of at most that many workers.
    """
    placement = experiment.placement
    memory = available(placement)
    if memory is None or placement.force:
        return placement
    sizes = [n for n in (2**i for i in range(12)) if n < placement.workers] + [placement.workers]
    found: Plan | None = None
    for workers in sizes:
        found = plan(_job(model, experiment, workers), rate(placement.gpu, 1.0, None, None), memory, None)
        if found.recommended is not None:
            chosen = {"workers": workers, "sharding": found.recommended.holding.sharding}
            return placement.model_copy(update=chosen)
    why = found.why if found else ""
    raise CorsaError(f"{model.name} fits in no group of up to {placement.workers} workers: {why}")


def _job(model: ModelConfig, experiment: Experiment, workers: int) -> Job:
    steps = [STEPS[m](experiment.corsa) for m in experiment.methods if m in STEPS] or [STEPS["lora"](experiment.corsa)]
    heaviest = max(steps, key=lambda step: (step.objectives, step.rho > 0))
    training, placement = experiment.training, experiment.placement
    return Job(
        model=model,
        step=heaviest.effective(),
        lora=experiment.lora,
        tokens=ASSUMED,
        edits=experiment.limit or 1000,
        epochs=training.epochs,
        batch=training.batch,
        micro_batch=placement.micro_batch,
        workers=workers,
        gpu=placement.gpu,
        pack=placement.pack,
    )
