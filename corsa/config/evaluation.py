"""How an edited model is asked, and which rule judges its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from tyro.constructors import PrimitiveConstructorSpec

from corsa.config.base import Frozen
from corsa.config.model import ModelConfig
from corsa.errors import CorsaError

ProbeKind = Literal[
    "edit", "paraphrase", "neighbor", "multihop", "history", "reversal", "negation", "choice", "template"
]
"""What a probe asks about: the fact in its own words or in others, a neighboring fact, a conclusion, the old value; and
the kinds of `SHALLOW`.
"""

SHALLOW: tuple[ProbeKind, ...] = ("reversal", "negation", "choice", "template")
"""Kinds that shallow edits fail: generated (`corsa.evaluation.shallow_edit_probes`), and asked only on demand."""

Rule = Literal["words", "contains", "exact"]
"""How an answer is matched (`corsa.evaluation.matching`)."""

Protocol = Literal["full", "paper", "authors"]

_AUTHORS_TOKENS = 128
_COUNTED: dict[str, tuple[ProbeKind, ...]] = {
    "full": ("edit", "paraphrase", "neighbor", "multihop", "history"),
    "paper": ("edit", "paraphrase", "multihop"),
    "authors": ("edit", "paraphrase", "multihop"),
}


_KINDS = PrimitiveConstructorSpec(
    nargs=1,
    metavar="K,K|all",
    instance_from_str=lambda words: (
        "all" if words[0] == "all" else tuple(word.strip() for word in words[0].split(",") if word.strip())
    ),
    is_instance=lambda value: isinstance(value, str | tuple),
    str_from_instance=lambda value: [value if isinstance(value, str) else ",".join(value)],
)
"""Probe kinds on the command line: one word."""


class EvaluationConfig(Frozen):
    """How the edited model is asked, and how its answers are judged.

    The protocol decides what is asked, how answers are generated and which rule counts:

    - full: every probe, greedy, one line per answer; rule `words`.
    - paper: the same generation, only the edit prompt, the first paraphrase and multi-hop questions; rule `contains`.
    - authors: as the published evaluation code. The probes of `paper`, sampled at temperature 0.7 and top-p 1, 128
      tokens, no stop at a newline, in the chat template; rule `contains` as a plain lower-cased substring test of the
      target, without aliases.
    """

    protocol: Protocol = Field(
        default="full",
        description="full: every probe, greedy, rule words; paper: first paraphrase of each edit, greedy, rule "
        "contains; authors: the same probes as the published code asks and judges them (sampled, chat template)",
    )
    match: Rule | None = Field(
        default=None,
        description="rule of the reported numbers (all three are stored); default: words; paper and authors: contains",
    )
    probes: Annotated[tuple[ProbeKind, ...] | Literal["all"], _KINDS] = Field(
        default="all",
        description="kinds of probes that protocol full asks: edit, paraphrase, neighbor, multihop, history (all); "
        "reversal, negation, choice, template (shallow: probes that shallow edits fail); `all,shallow` asks all nine",
    )
    draws: int = Field(default=1, ge=1, description="answers sampled for each probe, in protocol authors; otherwise 1")
    new_tokens: int = Field(
        default=32,
        ge=1,
        description="tokens generated per probe; a newline or an end token stops earlier (protocol authors: 128, end "
        "tokens only)",
    )
    reasoning_tokens: int = Field(
        default=200,
        ge=1,
        description="tokens generated per multi-hop question; only an end token stops earlier (protocol authors: 128)",
    )
    thinking: bool = Field(
        default=False,
        description="let a reasoning model think before it answers, if its chat template supports that; its "
        "thinking never counts as the answer",
    )
    thinking_tokens: int = Field(default=2048, ge=1, description="additional tokens of each answer if thinking is on")

    @field_validator("probes", mode="before")
    @classmethod
    def _named(cls, probes: Any) -> Any:
        """The groups `all` and `shallow` among other names as the kinds they stand for."""
        if isinstance(probes, str) or not isinstance(probes, list | tuple):
            return probes
        groups = {"all": _COUNTED["full"], "shallow": SHALLOW}
        return tuple(dict.fromkeys(kind for name in probes for kind in groups.get(name, (name,))))

    @model_validator(mode="after")
    def _meant(self) -> EvaluationConfig:
        if self.draws > 1 and not self.sampled:
            raise ValueError(
                f"draws {self.draws}: protocol {self.protocol} is greedy, so every draw would be the same: "
                "set protocol authors, or leave draws out"
            )
        if self.probes != "all" and self.protocol != "full":
            raise ValueError(
                f"probes chooses what protocol full asks, and protocol {self.protocol} asks its own: leave probes out"
            )
        if self.probes == ():
            raise ValueError("probes names no kind: nothing would be asked")
        return self

    @property
    def rule(self) -> Rule:
        """The rule of the reported numbers."""
        return self.match or ("words" if self.protocol == "full" else "contains")

    @property
    def kinds(self) -> tuple[ProbeKind, ...]:
        """The kinds of probes that are asked."""
        known = _COUNTED[self.protocol]
        return known if self.probes == "all" else tuple(kind for kind in (*known, *SHALLOW) if kind in self.probes)

    @property
    def sampled(self) -> bool:
        """Whether answers are drawn (temperature 0.7, top-p 1) and not greedy."""
        return self.protocol == "authors"

    @property
    def answer_tokens(self) -> int:
        """Bound on the tokens of an answer, thinking aside."""
        return _AUTHORS_TOKENS if self.sampled else self.new_tokens

    def for_predictions(self) -> EvaluationConfig:
        """What the answers depend on, with all other fields at their defaults. The rule that judges the
        answers afterwards is not part of it.
        """
        kinds = self.kinds if self.kinds != _COUNTED[self.protocol] else "all"
        default = EvaluationConfig()
        idle = {"new_tokens", "reasoning_tokens"} if self.sampled else set()
        idle |= set() if self.thinking else {"thinking_tokens"}
        idle |= set() if "multihop" in self.kinds else {"reasoning_tokens"}
        reset = {name: getattr(default, name) for name in idle}
        return self.model_copy(update={"match": None, "probes": kinds, **reset})

    def checked(self, model: ModelConfig) -> EvaluationConfig:
        """Itself, if a model can be asked this way.

        Raises:
            CorsaError: the protocol or thinking needs the chat template.
        """
        needs = (
            "protocol authors asks" if self.protocol == "authors" else "thinking is switched" if self.thinking else ""
        )
        if needs and model.template != "chat":
            raise CorsaError(
                f"--evaluation: {needs} in the chat template, and the template is {model.template!r}: add --template "
                "chat (a model is taught and asked in the same one), or choose another protocol"
            )
        return self


class SamplingConfig(Frozen):
    """How programs are drawn from a model: as CodeUpdateArena's published code does."""

    samples: int = Field(default=5, ge=1, description="programs drawn for each problem")
    temperature: float = Field(default=0.8, gt=0, description="the logits are divided by it")
    top_p: float = Field(
        default=0.7,
        gt=0,
        le=1,
        description="nucleus sampling: the smallest set of tokens with this total probability is kept",
    )
    new_tokens: int = Field(default=512, ge=1, description="maximum tokens of a program")


class RecheckConfig(Frozen):
    """How many facts of earlier rounds are asked again, and which: a random sample, drawn anew for every round."""

    facts: int = Field(ge=1, description="size of the sample; all are asked if there are no more")
    seed: int = Field(default=0, ge=0, description="of the draw")
