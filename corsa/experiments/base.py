"""The configuration that all scenarios share. Imports neither torch nor ray: planning a scenario needs neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from corsa.config import SEEDS, RunSettings
from corsa.config.command_line import listed
from corsa.data.benchmarks import BENCHMARKS
from corsa.errors import CorsaError, unknown_name
from corsa.methods import METHODS, known_method

NOT_OF_THE_RESULT = ("config", "dry_run", "cluster", "so_far", "quiet", "show_config")
"""Fields of an experiment that affect only its output or name its configuration file."""


Methods = Annotated[
    tuple[str, ...], listed(str, "A,B"), Field(description=f"compared methods, of {', '.join(METHODS)}")
]


class Experiment(RunSettings):
    """Fields of every scenario."""

    config: str | None = Field(
        default=None, description="YAML file with any of these fields; the command line wins over it"
    )
    benchmark: str = Field(default="world_facts", description=f"one of {', '.join(BENCHMARKS)}")
    data: str | None = Field(
        default=None, description="the benchmark's file; without it the hub's rows, or the shipped file"
    )
    limit: int | None = Field(default=None, description="facts (chains) to use from the benchmark; all by default")
    offset: int = Field(default=0, ge=0, description="facts (chains) to skip, such as those a setting was chosen on")
    on_bad_record: Literal["skip", "stop"] | None = Field(
        default=None,
        description="bad records: skip and list them, or stop at the first; default: published files skip, yours stop",
    )
    on_contradiction: Literal["report", "refuse", "keep-first"] | None = Field(
        default=None,
        description="edits that give one question different new answers: report them, refuse, or keep the first; "
        "default: published files report, yours refuse",
    )
    methods: Methods = ("lora", "corsa")
    seeds: Annotated[tuple[int, ...], listed(int, "N,N")] = Field(
        default=(0,), description="every method is trained once per seed"
    )
    storage: str = Field(
        default="runs",
        description="where results live: a directory (of a submitted job: below its home), s3://... or gs://...",
    )
    track: Annotated[tuple[str, ...], listed(str, "T,T")] = Field(
        default=(), description="send the finished run to tensorboard:DIR, mlflow[:URI] or wandb[:PROJECT]"
    )
    dry_run: bool = Field(default=False, description="draw the steps and show which are done; run nothing")
    cluster: str | None = Field(
        default=None,
        exclude_if=lambda path: path is None,
        description="with --dry-run: YAML file of a cluster; shows hours, cost and schedule of the run there",
    )
    so_far: bool = Field(
        default=False,
        description="report what is done, marked as partial, also while the run goes on; run no more",
    )
    quiet: bool = Field(default=False, description="do not show the progress of steps")
    show_config: bool = Field(default=False, description="print every setting first, not only changed ones")
    mmlu: str | None = Field(
        default=None,
        description="measure specificity on MMLU: directory with its test/ and dev/ files, or 'hub'; else it is not",
    )
    everyday: bool = Field(
        default=False,
        exclude_if=lambda asked: not asked,
        description="measure specificity on 40 everyday questions that come with the project: right, as before",
    )
    mmlu_limit: int | None = Field(default=None, ge=1, description="questions of each subject; all by default")

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("methods", "seeds")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value))

    @property
    def runs(self) -> list[tuple[str, int]]:
        """The (method, seed) pairs to train: every method with every seed."""
        return [(method, seed) for method in self.methods for seed in self.seeds]

    def checked(self) -> Self:
        """Returns itself after checking its names.

        Raises:
            CorsaError: an unknown method or benchmark, no method or no seed.
        """
        if self.benchmark not in BENCHMARKS:
            raise unknown_name("benchmark", self.benchmark, BENCHMARKS)
        for name in self.methods:
            known_method(name)
        if wrong := [seed for seed in self.seeds if not 0 <= seed <= SEEDS]:
            raise CorsaError(f"--seeds {wrong[0]}: a seed is a whole number from 0 to {SEEDS}")
        check_trackers(self.track)
        if not self.methods or not self.seeds:
            raise CorsaError("nothing would be trained: name at least one of --methods and one of --seeds")
        self.evaluation.checked(self.model)
        return self


def check_trackers(where: Sequence[str]) -> None:
    """Raises `CorsaError` if a finished run cannot be sent to a tracker."""
    if where:  # tracker libraries are loaded only if one is named
        from corsa.experiments.trackers import check

        check(where)


def identity(experiment: Experiment) -> dict[str, Any]:
    """The resolved configuration without the settings of how it runs."""
    how = {*NOT_OF_THE_RESULT, "storage", "track", "placement"}
    return {k: v for k, v in experiment.canonical().items() if k not in how}
