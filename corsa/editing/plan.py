"""Plans the steps of `corsa edit`, `corsa undo` and `corsa evaluate`, from a file of facts to the report.

The steps are the same as in the pipelines. Checks files, names and all else that needs no model. Imports neither torch
nor ray.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corsa.config import LoraConfig, MethodSettings, ModelConfig, TrainingConfig
from corsa.config.steps import (
    AskedFactsConfig,
    FactsConfig,
    FactsPlace,
    LineConfig,
    LinePlace,
    ReportConfig,
    RoundsConfig,
    Shown,
    TakenBackConfig,
)
from corsa.data.benchmarks import BENCHMARKS
from corsa.data.benchmarks.file import Draft, drafts_of
from corsa.data.benchmarks.files import regular, stem
from corsa.editing.gates import capability_steps
from corsa.editing.history import FILE, Line, file_digest, join, open_line, taken_back, unanswered
from corsa.editing.kinds import ASKED_FACTS, FACTS, LINE, STANDING, TAKEN_BACK
from corsa.editing.options import (
    NO_GATES,
    TEACHING,
    EditOptions,
    EvaluateOptions,
    Gates,
    Options,
    Teaching,
    UndoOptions,
    differences,
)
from corsa.errors import CorsaError, unknown_name
from corsa.experiments.base import Experiment, check_trackers
from corsa.experiments.kinds import REPORT
from corsa.experiments.planner import Facts, Planner
from corsa.experiments.runner import lasting
from corsa.flow import Step
from corsa.methods import METHODS

HEADLINES = ("edit_success", "generality", "forgetting", "retention", "neighborhood", "agreement")


@dataclass(frozen=True)
class Plan:
    """The steps to run: the training step of the update and its report."""

    experiment: Experiment
    line: Line | None
    number: int
    facts: int
    round: Step
    edits: Step
    report: Step
    tuned: Tuned | None = None


@dataclass(frozen=True)
class Tuned:
    """The settings that trials chose (`corsa.editing.tuning`), and the choice in sentences."""

    setting: Mapping[str, float]
    told: Sequence[str]


@dataclass(frozen=True)
class Update:
    """An update before its training is planned. `facts`: how many its file has; `name`: what steps call the file."""

    planner: Planner[Experiment]
    line: Line | None
    edits: Step
    facts: int
    name: str

    @property
    def number(self) -> int:
        return len(self.line.updates) + 1 if self.line else 1

    @property
    def after(self) -> Step | None:
        """The step that brings in the adapter to continue from."""
        return self.edits.inputs.get("line")

    def schedule(self, taught: Facts) -> Step:
        """Every edit of the line, in the update that taught it (its `round`)."""
        return self.planner.schedule(taught, RoundsConfig(rounds=self.number, update_share=1.0))


def plan_edit(options: EditOptions, tuned: Tuned | None = None) -> Plan:
    """Plans the steps that teach a file of facts, with the settings that `tuned` chose.

    Raises:
        CorsaError: a file, a name or a fact is wrong, or `out` is not free.
    """
    return _plan(options, plan_facts(options, tuned), tuned)


def plan_facts(options: EditOptions, tuned: Tuned | None = None) -> Update:
    """Plans the step that reads a file of facts.

    Raises:
        CorsaError: a file, a name or a fact is wrong.
    """
    line = open_line(options.adapter) if options.adapter else None
    path = regular(options.edits).absolute()
    drafts = drafts_of(path)
    planner = _planner(options, line)
    if tuned:
        planner = planner.changed(training=with_setting(options.training, tuned.setting))
    return Update(planner, line, facts_step(planner, path, drafts, line, options), len(drafts), stem(path))


def with_setting(training: TrainingConfig, setting: Mapping[str, float]) -> TrainingConfig:
    """The training with the values of a setting."""
    return TrainingConfig.model_validate({**dict(training), **setting})


def plan_undo(options: UndoOptions) -> Plan:
    """Plans the steps that teach the old answers of some facts again.

    Raises:
        CorsaError: a name is wrong, or `out` is not free.
    """
    line = open_line(options.adapter)
    if not options.edit:
        raise CorsaError("nothing would be taken back: name facts with --edit, or an update with --to")
    number = len(line.updates) + 1
    taken_back(line.standing, options.edit, number)
    config = TakenBackConfig(benchmark="facts taken back", edits=options.edit, update=number)
    planner = _planner(options, line)
    edits = Step(f"edits/undo/update{number}", TAKEN_BACK, config, {"line": _line_step(line, options)})
    return _plan(options, Update(planner, line, edits, len(set(options.edit)), "undo"))


def plan_evaluation(options: EvaluateOptions) -> tuple[Experiment, Step]:
    """Plans the steps that ask a model and report its answers.

    Raises:
        CorsaError: a file or a name is wrong, or no facts are given.
    """
    if options.endpoint:
        from corsa.editing.served import plan_served  # which takes the other steps from here

        return plan_served(options)
    if options.baseline:
        raise CorsaError("--baseline is a name on a server: give --endpoint with it")
    line = open_line(options.adapter) if options.adapter else None
    planner = evaluation_planner(options, base_model(options, line))
    experiment = planner.experiment
    experiment.evaluation.checked(experiment.model)
    check_trackers(options.track)
    taught, rounds, adapter = asked_facts(planner, options, line)
    schedule = planner.schedule(taught, RoundsConfig(rounds=rounds, update_share=1.0))
    answers: list[Step] = []
    if line and adapter:
        # Asked as a round after all updates, so that answers that were right and are now wrong count as forgetting.
        own = taught.name == "taught" and line.answered
        step = planner.answers("edited", taught, schedule, adapter, round_=rounds + own)
        answers = [*([adapter] if own else []), step]
    shown = [Shown(answers=step.name, method="edited") for step in answers]
    title = f"{taught.name} asked of {experiment.model.name}" + (
        f" with {Path(options.adapter or '').name}" if adapter else ""
    )
    return experiment, reported(planner, taught, schedule, title, shown, answers, adapter)


def evaluation_planner(options: EvaluateOptions, model: ModelConfig) -> Planner[Experiment]:
    """The planner of an evaluation of this base model, here or on a server."""
    experiment = Experiment(
        model=model,
        benchmark=options.benchmark or "file",
        data=options.data,
        limit=options.limit,
        methods=("edited",),
        storage=options.storage,
        dry_run=options.dry_run,
        evaluation=options.evaluation,
        placement=options.placement,
    )
    planner = Planner.of(experiment, shlex.join(["corsa", "evaluate", *differences(options)]))
    return replace(planner, recheck=options.sample)


def asked_facts(planner: Planner, options: EvaluateOptions, line: Line | None) -> tuple[Facts, int, Step | None]:
    """The facts that an evaluation asks, the number of their rounds, and the step that brings in the adapter.

    Raises:
        CorsaError: a file or a name is wrong, or no facts are given.
    """
    rounds = 1
    if options.edits and options.benchmark:
        raise CorsaError("give --edits or --benchmark, not both")
    if options.recheck and (options.edits or options.benchmark or options.endpoint):
        raise CorsaError(
            "--recheck draws among the facts that an adapter was taught: give --adapter alone, without --edits, "
            "--benchmark and --endpoint"
        )
    if options.edits:
        path = regular(options.edits).absolute()
        taught = planner.with_reference(stem(path), facts_step(planner, path, drafts_of(path), None, options))
    elif options.benchmark:
        if options.benchmark not in BENCHMARKS:
            raise unknown_name("benchmark", options.benchmark, BENCHMARKS)
        taught = planner.facts()
    elif line and line.edits:
        rounds = len(line.updates)
        config = FactsConfig(benchmark="facts taught", digest="", update=rounds)
        edits = Step("edits/taught", STANDING, config, {"line": _line_step(line, options)})
        taught = planner.with_reference("taught", edits)
    else:
        raise CorsaError(
            "nothing would be asked: give --edits FILE, --benchmark NAME, or an --adapter with its history"
        )
    return taught, rounds, _line_step(line, options) if line else None


def facts_step(
    planner: Planner[Experiment], path: Path, drafts: Sequence[Draft], line: Line | None, options: Options
) -> Step:
    """The step that makes edits from drafts. It asks the model for old answers that neither file nor line has."""
    experiment = planner.experiment
    number = len(line.updates) + 1 if line else 1
    before = line.standing if line else []
    missing = unanswered(before, drafts)
    join(before, drafts, number, {d.fields["prompt"]: f"not {d.fields['target_new']}" for d in missing})  # checked now
    known: dict[str, Any] = {"benchmark": stem(path), "digest": f"{stem(path)}:{file_digest(path)}", "update": number}
    inputs = {"line": _line_step(line, options)} if line else {}
    place = FactsPlace(**dict(experiment.placement), data=str(path))
    kind, config = FACTS, FactsConfig(**known)
    if missing:
        tokens = experiment.evaluation.new_tokens
        kind, config = ASKED_FACTS, AskedFactsConfig(**known, model=planner.model, new_tokens=tokens)
    return Step(f"edits/{stem(path)}/update{number}", kind, config, inputs, place)


def _line_step(line: Line, options: Options) -> Step:
    method, seed = getattr(options, "method", "edited"), getattr(options, "seed", 0)
    config = LineConfig(digest=line.digest(), method=method, seed=seed)
    place = LinePlace(directory=str(line.directory.absolute()))
    return Step(f"line/update{len(line.updates)}", LINE, config, placement=place)


def _planner(options: Teaching, line: Line | None) -> Planner[Experiment]:
    if options.method in METHODS and (why := METHODS[options.method].refuses.get("adapter")):
        raise CorsaError(f"{why}: choose another --method")
    if options.method not in TEACHING:
        raise unknown_name("method", options.method, TEACHING)
    lora = line.lora if line and options.lora == LoraConfig() else options.lora
    if line and METHODS[options.method].keeps_shape and lora != line.lora:
        raise CorsaError(
            f"adapter {line.directory} has rank {line.lora.rank}, alpha {line.lora.alpha:g} and its own target layers. "
            "An update keeps them: leave the --lora options out"
        )
    settings: dict[str, Any] = {name: getattr(options, name) for name in MethodSettings.model_fields} | {"lora": lora}
    experiment = Experiment(
        model=base_model(options, line),
        benchmark="file",
        methods=(options.method,),
        seeds=(options.seed,),
        storage=options.storage,
        dry_run=options.dry_run,
        **settings,
        evaluation=options.evaluation,
        placement=options.placement,
    )
    planner = Planner.of(experiment, _command(options))  # an unknown model is refused before anything else is done
    experiment.evaluation.checked(experiment.model)
    check_trackers(options.track)
    return replace(planner, recheck=options.sample)


def _plan(options: Teaching, update: Update, tuned: Tuned | None = None) -> Plan:
    planner, line, number, count, after = update.planner, update.line, update.number, update.facts, update.after
    taught = planner.with_reference(f"{update.name}/update{number}", update.edits)
    schedule = update.schedule(taught)
    step = planner.round(options.method, options.seed, taught, schedule, number=number, after=after)
    title = f"Update {number}: {count} fact{'s' * (count > 1)} on {planner.experiment.model.name}"
    answers = [*([after] if after and line and line.answered else []), step]
    shown = [Shown(answers=s.name, method=options.method) for s in answers]
    notes = tuned.told if tuned else ()
    report = reported(planner, taught, schedule, title, shown, answers, step, gates=options.gates, notes=notes)
    out = Path(lasting(options.out))
    check_free(out, step.fingerprint)
    check_place(out, options.storage)
    return Plan(planner.experiment, line, number, count, step, update.edits, report, tuned)


def reported(
    planner: Planner[Experiment],
    taught: Facts,
    schedule: Step,
    title: str,
    shown: Sequence[Shown],
    answers: Sequence[Step],
    adapter: Step | None,
    before: Step | None = None,
    gates: Gates = NO_GATES,
    notes: Sequence[str] = (),
) -> Step:
    """The step that reports answers next to the base model's (`before`, if they come from elsewhere), and the adapter's
    side effects.
    """
    experiment, tables = planner.experiment, [taught.edits] if before else list(taught.tables.values())
    before = before or planner.base(taught, answers[-1] if answers else None)
    checked = [planner.everyday_answers(None)] + ([planner.everyday_answers(adapter)] if adapter else [])
    measured, measures = capability_steps(planner, adapter, gates)
    inputs = [before, *answers, *tables, schedule, *(checked if adapter else []), *measured]
    config = ReportConfig(
        title=title,
        scenario="update",
        command=planner.command,
        experiment={k: v for k, v in experiment.canonical().items() if k in _TOLD},
        rule=experiment.evaluation.rule,
        protocol=experiment.evaluation.protocol,
        kinds=experiment.evaluation.kinds,
        taught_questions=True,
        headlines=HEADLINES,
        shown=(Shown(answers=before.name, method="base", trained=0 if planner.recheck else None), *shown),
        controls=tuple(Shown(answers=step.name, method="controls") for step in checked) if adapter else (),
        capability=tuple(measures),
        notes=tuple(notes),
    )
    return Step(f"report/{taught.name}", REPORT, config, {step.name: step for step in inputs})


_TOLD = (
    "model",
    "methods",
    "seeds",
    "evaluation",
    *(set(MethodSettings.model_fields) - {"memit", "alphaedit", "locft", "in_context"}),
)


def base_model(options: Options, line: Line | None) -> ModelConfig:
    """The base model of the options or the line. Raises CorsaError if the line's adapter has another one."""
    known = line.model(None) if line and (line.history or options.model is None) else ModelConfig()
    given = {name: getattr(options, name) for name in ("revision", "dtype", "template")} | {"name": options.model}
    wanted = known.model_copy(update={name: value for name, value in given.items() if value is not None})
    return line.model(wanted) if line else wanted


def check_free(out: Path, fingerprint: str) -> None:
    """Raises CorsaError if this update would overwrite files in `out`; an earlier result of the same update is fine."""
    out = out.expanduser()
    if out.is_file():
        raise CorsaError(f"--out {out} is a file: name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / FILE).is_file():
        raise CorsaError(f"--out {out} is not empty: name a new directory")
    if open_line(out).updates[-1].fingerprint != fingerprint:
        raise CorsaError(f"--out {out} holds the adapter of another update, which is kept: name a new directory")


def check_place(out: Path, storage: str) -> None:
    """Raises CorsaError if the directory `out` cannot be made, or is inside the storage."""
    out = out.expanduser().absolute()
    if "://" not in storage:
        root = Path(storage).expanduser().absolute()
        if out.resolve() == root.resolve() or root.resolve() in out.resolve().parents:
            raise CorsaError(f"--out {out} lies inside the storage {root}, which holds steps alone: name another place")
    above = next(parent for parent in (out, *out.parents) if parent.exists())
    try:
        Path(tempfile.mkdtemp(dir=above, prefix=".corsa-")).rmdir()
    except OSError as error:
        raise CorsaError(f"--out {out} cannot be made: {above}: {error.strerror}. Name another directory") from error


def _command(options: Teaching) -> str:
    """The command that repeats the update."""
    verb = "edit" if isinstance(options, EditOptions) else "undo"
    return shlex.join(["corsa", verb, *differences(options, "")])
