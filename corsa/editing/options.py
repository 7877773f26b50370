"""The options of the commands edit, undo and evaluate. Imports nothing heavy, because `corsa --help` uses it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from tyro.conf import Suppress

from corsa.config import (
    RIDGE,
    SEEDS,
    AlphaEditConfig,
    Dtype,
    EvaluationConfig,
    Frozen,
    InContextConfig,
    LocFtConfig,
    LoraConfig,
    MemitConfig,
    MethodSettings,
    Placement,
    TrainingConfig,
    plain,
)
from corsa.config.command_line import listed
from corsa.config.evaluation import RecheckConfig
from corsa.methods import METHODS

TEACHING = tuple(name for name, method in METHODS.items() if "adapter" not in method.refuses)
"""Methods whose result is an adapter."""

Share = Annotated[float | None, Field(ge=0, le=1), plain()]


class Thresholds(Frozen):
    """Limits that the answers must meet; shares from 0 to 1. A gate that fails ends the command with status 3."""

    min_success: Share = Field(default=None, description="share of the edit prompts answered with the new answer")
    min_generality: Share = Field(default=None, description="share of the other wordings answered with the new answer")
    max_forgetting: Share = Field(
        default=None,
        description="share of the answers about earlier facts that were right when taught and are wrong now; "
        "questions as taught and in other wordings",
    )


class Gates(Thresholds):
    """What a run must reach, and how much less the model may be able to do after it; otherwise the status is 3."""

    gate: Annotated[tuple[str, ...], listed(str, "G,G"), plain()] = Field(
        default=(),
        description="measure what the model could do before and can do now: capability (everyday questions, and the "
        "perplexity of a neutral text), lm-eval:TASK,TASK (tasks of the evaluation harness, an extra, or a YAML file "
        "with a task of your own)",
    )
    limit: Annotated[int | None, Field(ge=1), plain()] = Field(
        default=None, description="documents of each lm-eval task; default: all"
    )
    max_loss: Annotated[float, Field(ge=0), plain()] = Field(
        default=0.1,
        description="how much worse a measure of --gate may get: points of a mean score (0.1: ten of a hundred right "
        "answers), or the relative rise of the perplexity",
    )


NO_GATES = Gates()


class Options(Frozen):
    """Options that edit, undo and evaluate share."""

    model: str | None = Field(
        default=None,
        description="base model: alias, Hugging Face id, local directory; default: the adapter's, else smollm2-135m",
    )
    revision: str | None = Field(default=None, description="hub revision of the base model")
    dtype: Dtype | None = Field(
        default=None,
        description="data type of the frozen base model (nf4: 4 bits, on a GPU); default: the line's, else float32",
    )
    template: Literal["qa", "chat"] | None = Field(
        default=None, description="qa: 'Q: ...' and 'A:'; chat: the tokenizer's; default: the line's, else qa"
    )
    storage: str = Field(
        default="runs", description="where the results of steps are kept; a finished step is not computed again"
    )
    track: Annotated[tuple[str, ...], listed(str, "T,T")] = Field(
        default=(), description="send the finished run to tensorboard:DIR, mlflow[:URI] or wandb[:PROJECT]"
    )
    dry_run: bool = Field(default=False, description="show the steps and which are done, run nothing")
    quiet: bool = Field(default=False, description="show no progress")
    recheck: int | None = Field(
        default=None,
        ge=1,
        description="earlier facts that are asked again: a random sample of so many, drawn anew for each update; the "
        "gates then judge the worse end of a 95 % interval; default: all",
    )
    recheck_seed: int = Field(default=0, ge=0, le=SEEDS, description="of the draw of --recheck")
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: Placement = Placement()

    @property
    def sample(self) -> RecheckConfig | None:
        """The earlier facts that are asked again; None: all."""
        return RecheckConfig(facts=self.recheck, seed=self.recheck_seed) if self.recheck else None


class Teaching(Options, MethodSettings):
    """How an update is trained. An update has few facts, so a batch has few of them, and the rate is higher than in the
    paper. Half of a batch are facts of earlier updates. The adapter reads little of what everyday questions put into a
    layer, so that their answers stay. The update ends when all facts are learnt.
    """

    method: str = Field(default="lora", description=f"one of {', '.join(TEACHING)}")
    seed: int = Field(
        default=0, ge=0, le=SEEDS, description="seed of LoRA's initial values and of the order of the facts"
    )
    lora: LoraConfig = Field(
        default=LoraConfig(), description="shape of the adapter; a line keeps that of its first adapter"
    )
    memit: Annotated[MemitConfig, Suppress] = MemitConfig()  # this and the next three leave no adapter
    alphaedit: Annotated[AlphaEditConfig, Suppress] = AlphaEditConfig()
    locft: Annotated[LocFtConfig, Suppress] = LocFtConfig()
    in_context: Annotated[InContextConfig, Suppress] = InContextConfig()
    training: TrainingConfig = TrainingConfig(
        batch=8, replay=0.5, ridge=RIDGE, epochs=15, stop_above=0.5, learning_rate=5e-4
    )
    gates: Gates = Gates()
    out: str = Field(description="directory of the new adapter and its report; must be new")


class EditOptions(Teaching):
    """Teach a file of facts."""

    edits: str = Field(
        description="JSONL, CSV or Parquet with the columns prompt, target_new (target_old, ... if known); a path, an "
        "s3:// or gs:// address, or - for standard input"
    )
    adapter: str | None = Field(default=None, description="adapter to continue from: the --out of an earlier update")
    tune: int | None = Field(
        default=None,
        ge=2,
        description="number of trainings that choose the learning rate, ridge, stop_above and epochs, if not given. "
        "Each teaches at most 16 of the facts. Half of their other wordings and of the everyday questions decide",
    )


class EvaluateOptions(Options):
    """Ask a model about facts, with and without an adapter."""

    adapter: str | None = Field(default=None, description="PEFT directory; without it only the base model is asked")
    edits: str | None = Field(
        default=None, description="file of facts; default: the benchmark, else all facts that the adapter was taught"
    )
    benchmark: str | None = Field(default=None, description="a benchmark instead of --edits, see `corsa data`")
    data: str | None = Field(
        default=None, description="file of the benchmark; default: its rows on the hub, or the shipped file"
    )
    limit: int | None = Field(default=None, ge=1, description="number of facts to use; default: all")
    endpoint: str | None = Field(
        default=None,
        description="ask a server with OpenAI's interface, such as http://localhost:8000/v1; --model is the model's "
        "name there, and the base model is --baseline or that of --adapter",
    )
    baseline: str | None = Field(default=None, description="name of the base model on the server")
    concurrency: int = Field(default=8, ge=1, description="requests to the server at a time")
    rate: float | None = Field(default=None, gt=0, description="requests to the server per second at most")
    retries: int = Field(default=5, ge=0, description="further tries of a request that fails")
    timeout: float = Field(default=120.0, gt=0, description="seconds for one request")
    token_variable: str = Field(
        default="OPENAI_API_KEY", description="environment variable with the server's token, which is never shown"
    )
    gates: Thresholds = Thresholds()


class UndoOptions(Teaching):
    """Teach old answers again."""

    adapter: str = Field(description="the adapter to continue from: the --out of an earlier update")
    edit: Annotated[tuple[str, ...], listed(str, "ID,ID")] = Field(
        default=(), description="ids, chains or questions of the facts to undo"
    )
    to: int | None = Field(
        default=None, ge=1, description="roll back to the adapter after this update, instead of --edit; writes to --out"
    )


def differences(options: Frozen, prefix: str = "") -> list[str]:
    """The fields that differ from their defaults, as options of the command line."""
    found: list[str] = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if isinstance(value, Placement) or name in ("storage", "track", "dry_run", "quiet") or value == field.default:
            continue
        option = f"{prefix}{(field.alias or name).replace('_', '-')}"
        if isinstance(value, Thresholds):
            found += [
                word
                for gate, bound in value
                if bound != type(value).model_fields[gate].default
                for word in (f"--{gate.replace('_', '-')}", _word(bound))
            ]
        elif isinstance(value, Frozen):
            for key, inner in type(value).model_fields.items():  # `canonical` leaves out some that are at their default
                if (item := getattr(value, key)) != getattr(field.default, key):
                    found += [f"--{option}.{(inner.alias or key).replace('_', '-')}", _word(item)]
        else:
            found += [f"--{option}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return found


def _word(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
