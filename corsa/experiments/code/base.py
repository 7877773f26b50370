"""The steps of the code domain: models learn API updates, and programs that use the APIs measure the result.

As in `corsa.experiments.base`, planning imports neither torch nor ray.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from corsa.config import LoraConfig, SamplingConfig, TrainingConfig, plain
from corsa.config.code_steps import (
    CodeReportConfig,
    CodeShown,
    JudgingPlace,
    OldAnswersConfig,
    ProblemsConfig,
    ProblemsPlace,
    ProgramEditsConfig,
    SamplesConfig,
    VerdictsConfig,
)
from corsa.config.sandbox import Limits
from corsa.data.benchmarks.code_prompt import digest_of, read_template
from corsa.data.benchmarks.files import regular
from corsa.data.benchmarks.programs import digest, kind_of
from corsa.errors import CorsaError, unknown_name
from corsa.experiments.base import Experiment, Methods, identity
from corsa.experiments.kinds import ROUND
from corsa.experiments.planner import Facts, Planner, absolute
from corsa.flow import Kind, Step, StepFunction
from corsa.methods import METHODS


def _read_problems() -> StepFunction:
    from corsa.experiments.code.steps import read

    return read


def _old_answers() -> StepFunction:
    from corsa.training.old_programs import compute

    return compute


def _run_tests() -> StepFunction:
    from corsa.training.running_tests import compute

    return compute


def _make_edits() -> StepFunction:
    from corsa.experiments.code.steps import as_edits

    return as_edits


def _make_report() -> StepFunction:
    from corsa.experiments.code.steps import make_report

    return make_report


PROBLEMS = Kind("problems", _read_problems, version=2)
OLD_ANSWERS = Kind("old-answers", _old_answers, version=2, on_cluster=True)
VERDICTS = Kind("judging", _run_tests, version=2, on_cluster=True)
PROGRAM_EDITS = Kind("program-edits", _make_edits, version=1)
REPORT = Kind("report", _make_report, version=2)

TAUGHT = ("lora", "f-learning", "corsa")
CODE_METHODS = ("prepend", *TAUGHT)
SUBSET = "sampled_humaneval_task_ids.json"


class CodeExperiment(Experiment):
    """An experiment on programs. `data` is CodeUpdateArena's file, or one in the same format."""

    benchmark: str = Field(default="updates", description="always updates: what --data names")
    methods: Methods = CODE_METHODS
    humaneval: str | None = Field(
        default=None, description="HumanEval.jsonl(.gz), for SPass; without it SPass is not measured"
    )
    humaneval_limit: int | None = Field(default=None, ge=1, description="tasks of it; all by default")
    humaneval_subset: str | None = Field(
        default=None, description=f"JSON list of task ids counted once more; by default {SUBSET} beside --data"
    )
    prompt_template: str | None = Field(
        default=None,
        description="text file with {scenario}, {problem}, {solution_signature} and {unit_tests} that words the "
        "question about an update; by default the project's own wording",
    )
    prepend_implementation: bool = Field(
        default=False, description="prepend shows the update's code as well as its description"
    )
    sampling: SamplingConfig = SamplingConfig()
    limits: Limits = Limits()
    allow_code_execution: bool = Field(default=False, description="run the programs that the models write")
    sandbox: Annotated[Literal["auto", "bubblewrap", "namespaces", "none"], plain()] = Field(
        default="auto", description="what isolates these programs; none: no isolation, they run with all your rights"
    )
    lora: LoraConfig = LoraConfig(rank=128, alpha=256.0)
    training: TrainingConfig = TrainingConfig(learning_rate=2e-5)

    def checked(self) -> Self:
        """Returns itself after checking that it can run.

        Raises:
            CorsaError: no file is named, a method is unknown or not supported here, or running programs is not allowed.
        """
        if self.data is None:
            raise CorsaError("give CodeUpdateArena's arena.jsonl, or a file of the same record, with --data")
        for method in self.methods:
            if method in METHODS and (why := METHODS[method].refuses.get("programs")):
                raise CorsaError(
                    f"method {method!r} cannot learn an update: {why}. Choose from {', '.join(CODE_METHODS)}"
                )
            if method not in CODE_METHODS and not method.startswith("corsa-"):
                raise unknown_name("method", method, CODE_METHODS)
        known = [method for method in self.methods if method != "prepend"]
        if known:
            self.model_copy(update={"methods": tuple(known), "benchmark": "file"})._names_checked()
        if not self.allow_code_execution and not self.dry_run:
            raise CorsaError(
                "this runs programs that a model writes: read docs/sandbox.md, then say so with --allow-code-execution"
            )
        return self

    def _names_checked(self) -> None:
        super().checked()


class _Domain:
    """The steps of one experiment. Each is created once."""

    def __init__(self, planner: Planner[CodeExperiment]) -> None:
        self.planner = planner
        self.experiment = experiment = planner.experiment
        self.sandbox = JudgingPlace(allow_code_execution=experiment.allow_code_execution, sandbox=experiment.sandbox)
        assert experiment.data is not None
        self.updates = _problems(
            "updates",
            experiment.data,
            experiment.limit,
            experiment.offset,
            taught=True,
            template=experiment.prompt_template,
        )
        self.humaneval = (
            _problems("humaneval", experiment.humaneval, experiment.humaneval_limit, 0, taught=False)
            if experiment.humaneval
            else None
        )
        self.benchmarks: dict[Literal["updates", "humaneval"], Step | None] = {
            "updates": self.updates,
            "humaneval": self.humaneval,
        }

    def verdicts(self, name: str, problems: Step, answers: Step) -> Step:
        """The step that runs the tests of problems on answers."""
        config = VerdictsConfig(limits=self.experiment.limits, isolated=self.experiment.sandbox != "none")
        inputs = {"problems": problems, "answers": answers}
        return Step(f"{name}/verdicts", VERDICTS, config, inputs, self.sandbox)

    def taught(self) -> Facts:
        """The taught problems as edits: y_new is the reference solution, y_old the base model's output."""
        config = OldAnswersConfig(model=self.planner.model, new_tokens=self.experiment.sampling.new_tokens)
        old = Step("updates/old-answers", OLD_ANSWERS, config, {"problems": self.updates}, self.experiment.placement)
        verdicts = self.verdicts("updates/old-answers", self.updates, old)
        inputs = {"problems": self.updates, "answers": old, "verdicts": verdicts}
        edits = Step("edits/updates", PROGRAM_EDITS, ProgramEditsConfig(), inputs)
        return self.planner.with_reference("updates", edits)

    def programs(self, name: str, problems: Step, adapter: Step | None, *, described: bool, seed: int) -> Step:
        """Programs sampled from the unedited or an edited model, and their verdicts."""
        config = SamplesConfig(
            model=self.planner.model,
            sampling=self.experiment.sampling,
            described=described,
            implementation=described and self.experiment.prepend_implementation,
            seed=seed,
        )
        inputs = {"problems": problems} | ({"adapter": adapter} if adapter else {})
        samples = Step(f"{name}/samples", ROUND, config, inputs, self.experiment.placement)
        return self.verdicts(name, problems, samples)


def _problems(
    name: str, path: str, limit: int | None, offset: int, *, taught: bool, template: str | None = None
) -> Step:
    if limit is not None and limit < 1:
        raise CorsaError(f"--limit {limit}: nothing would be taught; give 1 or more, or leave it out to take all")
    if (kind := kind_of(path)) != name:
        options = {"updates": "CodeUpdateArena's record (--data)", "humaneval": "HumanEval (--humaneval)"}
        raise CorsaError(f"{path} holds {options[kind]}, and stands where {options[name]} belongs")
    wording = digest_of(read_template(template)) if taught else None
    config = ProblemsConfig(digest=digest(path), limit=limit, offset=offset, taught=taught, template=wording)
    place = ProblemsPlace(data=str(regular(path).absolute()), template=absolute(template))
    return Step(f"problems/{name}", PROBLEMS, config, placement=place)


def code_report(planner: Planner[CodeExperiment], *, primary: Sequence[str], published: Sequence[str] = ()) -> Step:
    """Base, prepend and every trained method on the problems that were not taught, and on HumanEval."""
    experiment, domain = planner.experiment, _Domain(planner)
    facts = domain.taught()
    schedule = planner.schedule(facts)
    inputs: dict[str, Step] = {}
    shown = []
    for seed in experiment.seeds:
        edited: dict[str, Step | None] = {"base": None}
        for method in experiment.methods:
            edited[method] = None if method == "prepend" else planner.round(method, seed, facts, schedule)
        for method, adapter in edited.items():
            for benchmark, problems in domain.benchmarks.items():
                if problems is None or (method == "prepend" and benchmark == "humaneval"):
                    continue  # no update to describe: the same as the base model
                name = f"{benchmark}/{method}/seed{seed}"
                verdicts = domain.programs(name, problems, adapter, described=method == "prepend", seed=seed)
                inputs |= {verdicts.name: verdicts, problems.name: problems}
                names = {"answers": verdicts.name, "problems": problems.name}
                shown.append(CodeShown(**names, method=method, benchmark=benchmark, seed=seed))
    config = CodeReportConfig(
        title=f"Code updates: {Path(experiment.data or '').name} on {experiment.model.name}",
        command=planner.command,
        experiment=identity(experiment),
        shown=tuple(shown),
        primary=tuple(primary),
        subset=_subset(experiment),
        published=tuple(published),
    )
    return Step("report/code update", REPORT, config, {**inputs, facts.edits.name: facts.edits})


def _subset(experiment: CodeExperiment) -> tuple[str, ...]:
    """The HumanEval tasks that the benchmark's authors chose."""
    named = experiment.humaneval_subset
    path = Path(named).expanduser() if named else Path(experiment.data or "").expanduser().with_name(SUBSET)
    if experiment.humaneval is None or (named is None and not path.is_file()):
        return ()
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorsaError(f"{path} is not a JSON list of HumanEval task ids: {error}") from error
    if not isinstance(ids, list) or not all(isinstance(id_, str) for id_ in ids):
        raise CorsaError(f"{path} is not a JSON list of HumanEval task ids")
    return tuple(ids)
