"""What the steps of the code domain depend on, besides their inputs: the configurations that enter their identity.

Imports neither torch nor ray: steps are planned from these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from corsa.config import Frozen, ModelConfig, SamplingConfig
from corsa.config.sandbox import Limits


class ProblemsConfig(Frozen):
    """Which problems of a benchmark of programs are read."""

    digest: str = Field(description="of the file's content")
    offset: int = Field(default=0, ge=0, description="records to skip")
    limit: int | None = Field(default=None, ge=1, description="records: updates, or HumanEval's tasks")
    taught: bool = Field(default=False, description="the first problem of each update is taught, not asked")
    template: str | None = Field(default=None, description="digest of the prompt's template; HumanEval has none")


class ProblemsPlace(Frozen):
    """Where the problems and the prompt's template are read from; what they hold is in `ProblemsConfig`."""

    data: str
    template: str | None = Field(default=None, description="file; None: the project's own template")


class OldAnswersConfig(Frozen):
    """What the base model's answers before the update depend on, besides the problems."""

    model: ModelConfig
    new_tokens: int = Field(ge=1)


class ProgramEditsConfig(Frozen):
    """How problems become edits; what they are is in the inputs."""

    benchmark: str = "updates"
    on_contradiction: Literal["report"] = "report"


class SamplesConfig(Frozen):
    """What a model's programs depend on, besides the problems and the adapter."""

    model: ModelConfig
    sampling: SamplingConfig
    described: bool = Field(default=False, description="the update's description stands before the question")
    implementation: bool = Field(default=False, description="and after it the update's code")
    seed: int = Field(default=0, ge=0, description="of the draws")


class VerdictsConfig(Frozen):
    """What verdicts depend on, besides programs and tests."""

    limits: Limits
    isolated: bool = Field(default=True, description="verdicts made without isolation never stand for isolated ones")


class JudgingPlace(Frozen):
    """How programs are isolated. Never part of an identity."""

    allow_code_execution: bool = False
    sandbox: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto"


class CodeShown(Frozen):
    """Verdicts of one method on one benchmark, by the names of the inputs."""

    answers: str = Field(description="name of the input with the verdicts")
    problems: str = Field(description="name of the input with the problems")
    method: str
    benchmark: Literal["updates", "humaneval"]
    seed: int = 0


class CodeReportConfig(Frozen):
    """What a report of the code domain shows, besides what its inputs hold."""

    title: str
    command: str
    experiment: dict[str, Any]
    shown: tuple[CodeShown, ...]
    primary: tuple[str, ...] = Field(
        default=(), description="the few rates that verdicts are given on; all others are exploratory"
    )
    subset: tuple[str, ...] = Field(
        default=(), description="HumanEval tasks that are also counted as a group of their own"
    )
    published: tuple[str, ...] = ()
