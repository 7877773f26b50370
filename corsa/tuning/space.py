"""The search space of a sweep: a range or a list of values per setting. Imports neither torch, ray nor optuna."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated

from pydantic import Field
from tyro.conf import arg

from corsa.config import Frozen
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment

Setting = Mapping[str, float]
"""A value for every name of the space."""

_WHOLE = ("rank", "epochs")
_TEXT = "LOW:HIGH on a log scale, LOW:HIGH:linear, 0|LOW:HIGH with 0 as well, or values V,V"


class Space(Frozen):
    """The settings to search. All others keep the experiment's values."""

    lambda_: Annotated[str | None, arg(name="lambda")] = Field(default=None, alias="lambda", description=_TEXT)
    rho: str | None = Field(default=None, description=f"likewise; by default {'0|0.005:0.5'}")
    beta: str | None = Field(default=None, description="likewise")
    learning_rate: str | None = Field(default=None, description="likewise; only searched if named")
    rank: str | None = Field(default=None, description="rank of LoRA, alpha in proportion; only searched if named")
    epochs: str | None = Field(default=None, description="only searched if named")

    def domains(self, *, grid: bool) -> dict[str, Domain]:
        """The domains to search, by name. Default: lambda, rho and beta; for a grid, with sensitivity.py's values.

        Raises:
            CorsaError: a range or value cannot be parsed, is empty or is not allowed.
        """
        named = {
            (field.alias or name): value
            for name, field in Space.model_fields.items()
            if (value := getattr(self, name)) is not None
        }
        found = {name: Domain.read(name, text) for name, text in (named or (GRID if grid else RANGES)).items()}
        if grid and (ranges := [name for name, domain in found.items() if not domain.values]):
            raise CorsaError(
                f"--space.{ranges[0]} is a range, and a grid takes values: give them, such as 0.02,0.05,0.1"
            )
        return found


RANGES = {"lambda": "0.1:10", "rho": "0|0.005:0.5", "beta": "0.01:1"}
GRID = {"lambda": "0.2,0.5,1,2,5", "rho": "0,0.02,0.05,0.1,0.2", "beta": "0.02,0.05,0.1,0.2,0.5"}


@dataclass(frozen=True)
class Domain:
    """The allowed values of a setting: `values`, or the range low to high; with `zero`, also 0.

    If 0 is added to a log scale, the study's parameter goes down to half of `low`, and all values below `low` mean 0.
    The parameter stays a single number, so samplers, importances and dashboards need no special case.
    """

    name: str
    text: str
    values: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = True
    zero: bool = False

    @property
    def whole(self) -> bool:
        return self.name in _WHOLE

    @property
    def floor(self) -> float:
        """The minimum of the study's parameter."""
        return self.low / 2 if self.zero else self.low

    def value(self, drawn: float) -> float:
        """Converts a value of the study's parameter to the setting, rounded to four significant digits."""
        if self.zero and drawn < self.low:
            return 0.0
        return int(drawn) if self.whole else float(f"{drawn:.4g}")

    def drawn(self, value: float) -> float:
        """Converts a setting to the value of the study's parameter."""
        return self.floor if self.zero and value == 0 else value

    def at(self, share: float) -> float:
        """The value at a share (0 to 1) of the range, on its scale; of values, the one at that share of the list."""
        if self.values:
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        if self.whole and not self.log:
            return int(min(self.low + share * (self.high - self.low + 1), self.high))
        if self.log:
            return self.value(min(self.floor * (self.high / self.floor) ** share, self.high))
        return self.value(self.low + share * (self.high - self.low))

    @classmethod
    def read(cls, name: str, text: str) -> Domain:
        """Parses a domain from a text such as `0|0.005:0.5`.

        Raises:
            CorsaError: the text is no domain, the domain is empty, or the setting does not allow its values.
        """
        where = f"--space.{name.replace('_', '-')} {text}"
        zero, _, rest = text.rpartition("|")
        try:
            if zero.strip() not in ("", "0"):
                raise ValueError
            if ":" in rest:
                low, high, *scale = (part.strip() for part in rest.split(":"))
                if scale not in ([], ["linear"], ["log"]):
                    raise ValueError
                domain = cls(name, text, (), float(low), float(high), scale != ["linear"], bool(zero.strip()))
            else:
                values = tuple(dict.fromkeys(float(v) for v in rest.split(",") if v.strip()))
                domain = cls(name, text, (0.0, *values) if zero.strip() else values)
        except ValueError:
            raise CorsaError(f"{where}: cannot be read; give {_TEXT}") from None
        ends = domain.values or (domain.low, domain.high)
        if not domain.values and ":" not in rest:
            raise CorsaError(f"{where}: holds no value")
        if not all(math.isfinite(end) for end in ends):
            raise CorsaError(f"{where}: a value is not finite")
        if not domain.values and domain.low >= domain.high:
            raise CorsaError(f"{where}: an empty range, {domain.low:g} is not below {domain.high:g}")
        least = 1.0 if domain.whole else 0.0
        bad = [end for end in ends if end < least or (end == 0 and name not in ("lambda", "rho"))]
        if bad:
            raise CorsaError(f"{where}: {name} cannot be {bad[0]:g}")
        if domain.whole and any(end != int(end) for end in ends):
            raise CorsaError(f"{where}: {name} is a whole number")
        if not domain.values and domain.log and domain.low <= 0:
            raise CorsaError(f"{where}: a log scale starts above 0; 0|LOW:HIGH has 0 as well")
        return domain


def with_default(domains: Mapping[str, Domain], default: Setting) -> dict[str, Domain]:
    """The domains, extended to contain the default setting, which is always the first trial."""
    return {name: _with(domain, default[name]) for name, domain in domains.items()}


def _with(domain: Domain, value: float) -> Domain:
    if domain.values:
        return replace(domain, values=tuple(sorted({*domain.values, value})))
    if value == 0 and domain.log:
        return replace(domain, zero=True)
    return replace(domain, low=min(domain.low, value), high=max(domain.high, value))


def default_setting(experiment: Experiment, domains: Mapping[str, Domain]) -> dict[str, float]:
    """The experiment's value for each name of the space: the paper's setting unless configured otherwise."""
    step, training = experiment.corsa, experiment.training
    known = {"lambda": step.lambda_, "rho": step.rho, "beta": step.beta, "learning_rate": training.learning_rate}
    known |= {"rank": experiment.lora.rank, "epochs": training.epochs}
    return {name: known[name] for name in domains}


def applied(experiment: Experiment, setting: Setting) -> Experiment:
    """The experiment with its own values replaced by a setting."""
    step = {
        ("lambda_" if name == "lambda" else name): setting[name] for name in ("lambda", "rho", "beta") & setting.keys()
    }
    training = {name: setting[name] for name in ("learning_rate", "epochs") & setting.keys()}
    lora = experiment.lora
    if "rank" in setting:
        rank = int(setting["rank"])
        lora = lora.model_copy(update={"rank": rank, "alpha": lora.alpha * rank / lora.rank})
    return experiment.model_copy(
        update={
            "corsa": experiment.corsa.model_copy(update=step),
            "training": experiment.training.model_copy(update=training),
            "lora": lora,
        }
    )


def label(experiment: Experiment, setting: Setting) -> str:
    """A trial's name: `lambda=1.0,rho=0.05,beta=0.1`, and the other searched settings."""
    step = experiment.corsa
    shown = {"lambda": step.lambda_, "rho": step.rho, "beta": step.beta} | dict(setting)
    return ",".join(f"{name}={value}" for name, value in shown.items())


def grid(domains: Mapping[str, Domain], default: Setting) -> Iterator[dict[str, float]]:
    """Every combination of the values, nearest to the default first: the default, then one value changed, and so on.

    With the same values, the first trials are those of `pipelines/sensitivity.py`.
    """
    names = list(domains)
    points = [dict(zip(names, values, strict=True)) for values in product(*(domains[n].values for n in names))]
    yield from sorted(points, key=lambda point: sum(point[name] != default[name] for name in names))
