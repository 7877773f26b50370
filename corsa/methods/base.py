"""The record of a method. Training, experiments and reports look it up.

Nothing here imports torch: methods are listed and planned before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from corsa.config import RunSettings
from corsa.config.steps import PredictionConfig
from corsa.flow.step import Step

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

    from corsa.algorithm.packing import Triplet
    from corsa.data.edit import Edit
    from corsa.evaluation.retrieval import Memory
    from corsa.lora.attached import Change
    from corsa.lora.flat import Lora
    from corsa.models.encoding import Encoder


class Train(Protocol):
    """Trains parameters in place (`Round.train`)."""

    def __call__(
        self, triplets: Sequence[Triplet], name: str, phi: Parameter | None = None, /
    ) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Round:
    """The input of a method for teaching one round. Every worker of the group has one, and makes the same calls.

    Attributes:
        config: the round's configuration, of the type that the method's `round_config` returns.
        edits: the edits of the round; `triplets`: the same as token ids, with their reference.
        earlier: the facts that earlier rounds taught and that still hold, as `triplets`.
        model: the frozen base model, with `lora` attached to it; `encoder` makes its prompts and answers.
        before: the change of the base model by the earlier rounds; None in the first round.
        leads: whether this worker is the leader, which does the work that is done once for all workers.
        share: returns the leader's value on every worker.
        train: trains `lora.phi`, or another leaf (1, P) that the model depends on, on triplets by the step of Algorithm
            1, resumable under a name; returns its curves.
        input_file: the local path of an input's file, by the names of the input and the file (leader only).
        post: adds information to the progress line.
    """

    config: Any
    edits: Sequence[Edit]
    triplets: Sequence[Triplet]
    earlier: Sequence[Triplet]
    model: PreTrainedModel
    encoder: Encoder
    lora: Lora
    before: Change | None
    leads: bool
    share: Callable[[Any], Any]
    train: Train
    input_file: Callable[[str, str], Path]
    post: Callable[[dict[str, Any]], None]


STATE = "state.safetensors"
"""The file of `Taught.state`, among those of a round."""


@dataclass(frozen=True)
class Taught:
    """The result of teaching a round.

    Attributes:
        change: the change of the base by all rounds so far.
        metrics: of the round.
        curves: rows of `corsa.training.loop.CURVES`, if it has any.
        state: what the next round needs besides the change, on the leader; it reads the file `STATE` of its input
            "previous". Empty: nothing.
        memory: facts that stand before every question that the edited model is asked; None: none do.
    """

    change: Change
    metrics: Mapping[str, Any]
    curves: list[dict[str, Any]] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    memory: Memory | None = None


CHANGES_WEIGHTS = "it writes into weights, and a block of 4 bits would round the change away"
"""Why methods that write into weights cannot edit a base in 4 bits."""

Teach = Callable[[Round], Taught]


def _no_inputs(settings: RunSettings) -> dict[str, Step]:
    return {}


def _no_notes(name: str, metrics: Mapping[str, Any]) -> list[str]:
    return []


def _at_nothing(config: Any) -> bool:
    return False


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: its name on the command line and in tables of answers.
        label: its name in tables and figures.
        round_config: makes a round's configuration (all that it depends on besides its inputs) from the settings, the
            seed and the round's number. Raises `CorsaError` for settings under which the method cannot run.
        config: the type of this configuration. The workers find the method by it.
        load_teach: imports and returns the function that teaches a round. None: the round is trained by the step of
            Algorithm 1 alone, under the settings in its configuration.
        inputs: further inputs of each round, by name.
        notes: makes sentences for the report, from the name of a round's step and the metrics of the round.
        refuses: purposes that the method cannot serve, each with the reason: "adapter" (leaving a PEFT adapter),
            "programs" (learning updates of APIs), "routing" (being one of several parts that a router chooses from),
            "specificity" (answering MMLU; the report leaves it out), "4 bits" (editing a base in 4 bits).
        keeps_shape: whether an update leaves the rank of the adapter as it was.
        continues: whether a round goes on from the previous round's adapter.
        looks_back: whether a round with this configuration is given earlier rounds' facts again. Reports mark it.
        colour, symbol: its look in figures, by plotly's names; an unused one by default.
    """

    name: str
    label: str
    round_config: Callable[[RunSettings, int, int], PredictionConfig]
    config: type[PredictionConfig]
    load_teach: Callable[[], Teach] | None = None
    inputs: Callable[[RunSettings], dict[str, Step]] = _no_inputs
    notes: Callable[[str, Mapping[str, Any]], list[str]] = _no_notes
    looks_back: Callable[[Any], bool] = _at_nothing
    refuses: Mapping[str, str] = field(default_factory=dict)
    keeps_shape: bool = True
    continues: bool = True
    colour: str | None = None
    symbol: str | None = None
