"""What the commands that teach and ask can be told. Imports nothing heavy: `corsa --help` is made from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from corsa.config import (
    METHODS,
    EvaluationConfig,
    FLearningConfig,
    Frozen,
    LoraConfig,
    Placement,
    StepConfig,
    TrainingConfig,
    plain,
)
from corsa.config.command_line import listed

TEACHING = tuple(method for method in METHODS if method != "memit")
"""Methods that leave an adapter; MEMIT leaves a dense change of the weights."""

Share = Annotated[float | None, Field(ge=0, le=1), plain()]


class Gates(Frozen):
    """What an update must reach; shares from 0 to 1. A gate that does not hold ends the command with status 3."""

    min_success: Share = Field(default=None, description="edit prompts answered with the new answer")
    min_generality: Share = Field(default=None, description="other wordings answered with the new answer")
    max_forgetting: Share = Field(default=None, description="of the earlier facts once right, those that are wrong now")


class Options(Frozen):
    """What teaching, taking back and asking have in common."""

    model: str | None = Field(
        default=None,
        description="base model: alias, Hugging Face id, local directory; default: the adapter's, else smollm2-135m",
    )
    revision: str | None = Field(default=None, description="hub revision of the base model")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="of the frozen base; default: the line's, else float32"
    )
    template: Literal["qa", "chat"] | None = Field(
        default=None, description="qa: 'Q: ...' and 'A:'; chat: the tokenizer's; default: the line's, else qa"
    )
    storage: str = Field(default="runs", description="where steps are kept, so that nothing is computed twice")
    track: Annotated[tuple[str, ...], listed(str, "T,T")] = Field(
        default=(), description="send the finished run to tensorboard:DIR, mlflow[:URI] or wandb[:PROJECT]"
    )
    dry_run: bool = Field(default=False, description="draw the steps, say what is done, run nothing")
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: Placement = Placement()


class Teaching(Options):
    """How an update is trained. Fewer facts than a benchmark's: smaller batches than the paper's, and more epochs."""

    method: str = Field(default="corsa", description=f"one of {', '.join(TEACHING)}")
    seed: int = Field(default=0, ge=0, description="of LoRA's initial values and the order of the facts")
    lora: LoraConfig = Field(default=LoraConfig(), description="shape of the adapter; a line keeps that of its first")
    corsa: StepConfig = StepConfig()
    f_learning: FLearningConfig = FLearningConfig()
    training: TrainingConfig = TrainingConfig(batch=4, epochs=15, learning_rate=5e-4)
    gates: Gates = Gates()
    out: str = Field(description="directory of the new adapter and its report; must be new")


class EditOptions(Teaching):
    """Teach a file of facts."""

    edits: str = Field(
        description="JSONL, CSV or Parquet with the columns prompt, target_new (target_old, ... if known)"
    )
    adapter: str | None = Field(default=None, description="adapter to go on from: the --out of an earlier update")


class EvaluateOptions(Options):
    """Ask a model, and what an adapter makes of it."""

    adapter: str | None = Field(default=None, description="PEFT directory; without it the base model alone is asked")
    edits: str | None = Field(
        default=None, description="file of facts; without it and a benchmark, all that the adapter was taught"
    )
    benchmark: str | None = Field(default=None, description="instead: a benchmark, see `corsa data`")
    data: str | None = Field(default=None, description="its file; without it the hub's rows, or the shipped file")
    limit: int | None = Field(default=None, ge=1, description="facts taken from it; all by default")
    gates: Gates = Gates()


class UndoOptions(Teaching):
    """Teach old answers again."""

    adapter: str = Field(description="the adapter to go on from: the --out of an earlier update")
    edit: Annotated[tuple[str, ...], listed(str, "ID,ID")] = Field(
        default=(), description="ids, chains or questions of the facts taken back"
    )
    to: int | None = Field(default=None, ge=1, description="instead: roll back to the adapter after this update")


def differences(options: Frozen, prefix: str = "") -> list[str]:
    """Every field that differs from its default, as options of the command line."""
    found: list[str] = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if isinstance(value, Placement) or name in ("storage", "track", "dry_run") or value == field.default:
            continue
        option = f"{prefix}{(field.alias or name).replace('_', '-')}"
        if isinstance(value, Gates):
            found += [
                w for gate, bound in value if bound is not None for w in (f"--{gate.replace('_', '-')}", str(bound))
            ]
        elif isinstance(value, Frozen):
            mine, default = value.canonical(), field.default.canonical()
            changed = {key: item for key, item in mine.items() if item != default[key]}
            found += [w for key, item in changed.items() for w in (f"--{option}.{key.replace('_', '-')}", str(item))]
        else:
            found += [f"--{option}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return found
