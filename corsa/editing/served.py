"""Measures what a server answers: `corsa evaluate --endpoint URL --model NAME`.

The steps are those of an evaluation; the answers come from the server. They depend on what is loaded there at that
moment, so they are never taken from an earlier run.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from corsa.config.steps import RoundsConfig, ServedConfig, ServedPlace, Shown
from corsa.editing.kinds import SERVED
from corsa.editing.options import EvaluateOptions
from corsa.errors import CorsaError
from corsa.flow import Step
from corsa.flow.task import Task

if TYPE_CHECKING:
    import pandas as pd

    from corsa.experiments.base import Experiment


def plan_served(options: EvaluateOptions) -> tuple[Experiment, Step]:
    """Plans the steps that ask a server and report its answers.

    The base model is asked here if `adapter` names it, else under the name `baseline` on the same server.

    Raises:
        CorsaError: a file, a name or the address is wrong, or the base model cannot be asked.
    """
    from corsa.editing.history import open_line
    from corsa.editing.plan import asked_facts, base_model, evaluation_planner, reported
    from corsa.evaluation.endpoint import checked_address
    from corsa.experiments.base import check_trackers

    if options.model is None:
        raise CorsaError("--endpoint needs --model NAME: the model's name on the server")
    if options.evaluation.sampled:
        raise CorsaError("protocol authors samples its answers, a server is asked for the likeliest: use full or paper")
    if not options.adapter and not options.baseline:
        raise CorsaError(
            "nothing to compare the served answers with: give --baseline NAME, the base model's name on the server, or "
            "--adapter DIR, whose base model is then asked here"
        )
    line = open_line(options.adapter) if options.adapter else None
    if line and not options.edits and not options.benchmark and not line.edits:
        raise CorsaError("nothing would be asked: give --edits FILE or --benchmark NAME")
    model = base_model(options.model_copy(update={"model": None}), line)
    planner = evaluation_planner(options, model)
    check_trackers(options.track)
    taught, rounds, adapter = asked_facts(planner, options, line)
    if taught.edits.kind.on_cluster and not options.adapter:
        raise CorsaError(
            f"{options.edits} has facts without target_old, which the base model would be asked for here: add it, or "
            "give --adapter DIR"
        )
    schedule = planner.schedule(taught, RoundsConfig(rounds=rounds, update_share=1.0))
    own = bool(line and line.answered and not options.edits and not options.benchmark)
    known = {
        "address": checked_address(options.endpoint or ""),
        "template": model.template,
        "evaluation": options.evaluation.for_predictions(),
        "asked": datetime.now(UTC).isoformat(),
    }
    place = ServedPlace.model_validate({name: getattr(options, name) for name in ServedPlace.model_fields})
    inputs = {"edits": taught.edits, "schedule": schedule}

    def served(name: str, round_: int, **more: Step) -> Step:
        config = ServedConfig(model=name, round=round_, **known)
        return Step(f"served/{name}/{taught.name}", SERVED, config, {**inputs, **more}, place)

    if options.baseline == options.model:
        raise CorsaError(f"--baseline {options.baseline} is the --model itself: name the base model on the server")
    before = served(options.baseline, 0) if options.baseline else planner.base(taught)
    step = served(options.model, rounds + own, base=before)
    answers = [*([adapter] if own and adapter else []), step]
    title = f"{taught.name} asked of {options.model} at {known['address']}"
    shown = [Shown(answers=one.name, method="edited") for one in answers]
    return planner.experiment, reported(planner, taught, schedule, title, shown, answers, None, before)


def answer(task: Task) -> dict[str, Any]:
    """Step function: edits and a schedule -> predictions.parquet, from a server; compared with the input `base`."""
    from corsa.data.edit import from_table
    from corsa.data.schedule import valid_after
    from corsa.evaluation.endpoint import Endpoint
    from corsa.evaluation.predict import PREDICTIONS, Taught
    from corsa.evaluation.served_predictor import ServedPredictor
    from corsa.evaluation.shallow_edit_probes import with_shallow_edit_probes

    config: ServedConfig = task.config
    read = from_table(pq.read_table(task.inputs["edits"].local("edits.parquet")))
    edits = {edit.id: edit for edit in with_shallow_edit_probes(read, config.evaluation.kinds)}
    schedule = pq.read_table(task.inputs["schedule"].local("schedule.parquet"))
    if config.round:
        facts = [fact for fact in valid_after(schedule, config.round) if fact["edit"] in edits]
        taught = [Taught(edits[fact["edit"]], fact["learnt"], fact["part"]) for fact in facts]
    else:
        taught = [Taught(edit, edit.round, "") for edit in edits.values()]
    thinking = config.evaluation.thinking
    server = Endpoint(config.address, config.model, config.template, thinking, **dict(task.placement))

    def told(done: int, of: int) -> None:
        task.progress.post({"chain": task.name, "phase": "evaluating", "answered": done, "probes": of})

    rows = ServedPredictor(server, config.evaluation, told).ask(taught)
    labels = {"seed": 0, "trained": config.round}
    rows = [{**labels, **row} for row in sorted(rows, key=lambda row: (row["edit"], row["probe"], row["wording"]))]
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS), task.output / "predictions.parquet")
    metrics: dict[str, Any] = {"probes": len(rows)}
    if "base" in task.step.inputs:
        before = pq.read_table(task.inputs["base"].local("predictions.parquet")).to_pylist()
        metrics["notes"] = [str(compared(rows, before))]
    return metrics


class Comparison(NamedTuple):
    """How a server's answers compare with the base model's.

    Attributes:
        same: answers in the base model's words.
        alike: answers that begin with the same word as the base model's.
        of: questions that both were asked.
        gained: questions about the facts that the server answers with the new answer (rule `words`) and the base model
            does not.
    """

    same: int
    alike: int
    of: int
    gained: int

    @property
    def applied(self) -> bool:
        """False if nothing of the facts shows, and at least half of the answers begin as the base model's. A server's
        arithmetic is not this machine's (quantised weights, for one), so the base model may go on in other words.
        """
        return not self.of or bool(self.gained) or 2 * self.alike < self.of

    def __str__(self) -> str:
        same = f"{self.same} of {self.of} served answers are the base model's, word for word"
        if self.applied:
            return f"{same}; {self.gained} have a new answer that the base model's lack"
        return (
            f"THE ADAPTER IS NOT APPLIED: {same}, and none has a new answer that the base model's lack. Check the "
            "server's options (vLLM: --enable-lora --lora-modules NAME=DIR) and that --model names the adapter"
        )


def compared(served: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> Comparison:
    """Compares rows of the predictions table, question by question."""
    before = {row["prompt"]: row for row in base}
    pairs = [(row, before[row["prompt"]]) for row in served if row["prompt"] in before]
    taught = [(now, was) for now, was in pairs if now["kind"] in ("edit", "paraphrase")]
    return Comparison(
        same=sum(now["output"] == was["output"] for now, was in pairs),
        alike=sum(now["output"].split()[:1] == was["output"].split()[:1] for now, was in pairs),
        of=len(pairs),
        gained=sum(now["words_new"] and not was["words_new"] for now, was in taught),
    )


def last_compared(predictions: pd.DataFrame) -> Comparison:
    """`compared`, from the predictions table of a report."""
    last = predictions[(predictions.method != "base") & (predictions.trained == predictions.trained.max())]
    first = predictions[predictions.method == "base"]
    return compared(*(table.to_dict("records") for table in (last, first)))  # type: ignore[arg-type]
