"""LoRA (Hu et al. 2022) on a frozen model, with all its parameters in one flat tensor.

phi is one contiguous float32 leaf of shape (K, P) outside the module tree: K adapters of P parameters each. K is 1
unless several adapters are trained together. Forward hooks on the frozen linear layers add `scale * x A^T B^T`.
Gradients are therefore flat; PCGrad, SAM, clipping and AdamW are vector operations on one tensor; and sharding the base
does not touch phi.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corsa.config import LoraConfig
from corsa.errors import CorsaError, nearest
from corsa.lora.branch import ApplyA, ApplyB
from corsa.lora.factors import Adapter, Factors

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that transformers calls with the same input."""


@dataclass(frozen=True)
class Site:
    """A linear layer with LoRA: its module name and sizes."""

    name: str
    inputs: int
    outputs: int


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Every linear layer but the output head, in module order (PEFT's "all-linear")."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def target_layers(model: nn.Module, config: LoraConfig) -> list[tuple[str, nn.Linear]]:
    """The linear layers that `config.targets` and `config.layers` choose, by PEFT's rules, in module order.

    Raises:
        CorsaError: the model has no linear layer, or a target or a layer number matches none.
    """
    every = linear_layers(model)
    if not every:
        raise CorsaError(f"{type(model).__name__} has no torch.nn.Linear layer for LoRA to add to")
    chosen = every
    if config.targets != ("all-linear",):
        for target in config.targets:
            if not any(_is_target(name, target) for name, _ in every):
                known = sorted({name.rsplit(".", 1)[-1] for name, _ in every})
                near = nearest(target, [*known, "all-linear"])
                raise CorsaError(
                    f"--lora.targets {target}: no linear layer has this name"
                    f"{f', did you mean {near}' if near else ''}; this model has {', '.join(known)}"
                )
        chosen = [(name, m) for name, m in every if any(_is_target(name, target) for target in config.targets)]
    if config.layers is not None:
        numbers = {number for name, _ in every if (number := _layer_number(name)) is not None}
        if missing := sorted(set(config.layers) - numbers):
            raise CorsaError(f"--lora.layers {missing[0]}: this model has layers 0 to {max(numbers, default=-1)}")
        chosen = [(name, m) for name, m in chosen if _layer_number(name) in config.layers]
    if not chosen:
        raise CorsaError("--lora.targets and --lora.layers together choose no layer of this model")
    return chosen


def _is_target(name: str, target: str) -> bool:
    """PEFT's rule for a list of target_modules."""
    return name == target or name.endswith(f".{target}")


def _layer_number(name: str) -> int | None:
    """The number of the decoder layer that a module belongs to, as in `model.layers.3.mlp.up_proj`."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _shortest(chosen: list[str], every: list[str]) -> list[str]:
    ends = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    same = [name for name in every if any(_is_target(name, end) for end in ends)]
    return ends if same == chosen else sorted(chosen)


class Lora:
    """Adapters attached to `model` by forward hooks.

    Attributes:
        phi: (K, P) float32 leaf that requires grad. Within a row, the sites follow one another, each as its A factor
            (rank, inputs) and then its B factor (outputs, rank), row-major.
        sites: the linear layers, in the order of phi.
        target_modules: the sites as PEFT names them: ends of names, or whole names where an end is ambiguous.
        trains_a: whether gradients reach the A factors. Without, those entries of phi have gradient 0.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, *, seed: int = 0, adapters: int = 1) -> None:
        layers = target_layers(model, config)
        self.config = config
        self.target_modules = _shortest([name for name, _ in layers], [name for name, _ in linear_layers(model)])
        self.sites = [Site(name, m.in_features, m.out_features) for name, m in layers]
        self.scale = config.alpha / config.rank
        self._shapes = [shape for s in self.sites for shape in ((config.rank, s.inputs), (s.outputs, config.rank))]
        self._sizes = [a * b for a, b in self._shapes]
        self.trains_a = True
        self._active = True
        self._only: int | None = None
        self._factors: list[Tensor] = []
        self._together = _same_input([s.name for s in self.sites])
        self._input: Any = None  # of the group that runs, and what A made of it for each site that has not run
        self._narrow: dict[int, Tensor] = {}
        self._device = layers[0][1].weight.device
        self.resize(adapters)
        self.initialise(seed)
        model.register_forward_pre_hook(self._open, with_kwargs=True)
        for i, (_, layer) in enumerate(layers):
            layer.register_forward_hook(lambda module, args, output, i=i: self._add(i, args[0], output))

    def resize(self, adapters: int) -> None:
        """Make room for this many adapters. All are zero until they are initialised."""
        self.phi = nn.Parameter(torch.zeros(adapters, sum(self._sizes), dtype=torch.float32, device=self._device))

    def initialise(self, *seeds: int) -> None:
        """Initialise A as PEFT does (Kaiming uniform with a = sqrt(5): within 1 / sqrt(inputs)) and B as zero. Values
        depend on the seed alone, not on the device. Give one seed per adapter, or one for all.
        """
        for row, seed in enumerate(seeds * len(self.phi) if len(seeds) == 1 else seeds):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for a, b in zip(self.factors()[0::2], self.factors()[1::2], strict=True):
                    bound = 1 / math.sqrt(a.shape[-1])
                    a[row].copy_(torch.empty(a.shape[1:]).uniform_(-bound, bound, generator=generator))
                    b[row].zero_()

    def factors(self) -> list[Tensor]:
        """Views of phi: A (K, rank, inputs) and B (K, outputs, rank) of each site in turn."""
        parts = self.phi.split(self._sizes, dim=1)
        return [p.view(len(self.phi), *shape) for p, shape in zip(parts, self._shapes, strict=True)]

    def adapter(self, row: int = 0) -> Adapter:
        """A copy of adapter `row`: the factors of every site, with the scale in B."""
        pairs = zip(self.sites, self.factors()[0::2], self.factors()[1::2], strict=True)
        return {s.name: Factors(a[row].detach().clone(), self.scale * b[row].detach()) for s, a, b in pairs}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch LoRA off inside the block."""
        was, self._active = self._active, False
        try:
            yield
        finally:
            self._active = was

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Use adapter `row` for every row of the inputs inside the block."""
        was, self._only = self._only, row
        try:
            yield
        finally:
            self._only = was

    def _open(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        factors = self.factors()  # split once a forward: autograd then joins the gradients in one operation
        if not self.trains_a:
            factors[0::2] = [a.detach() for a in factors[0::2]]
        self._factors = factors if self._only is None else [f[self._only : self._only + 1] for f in factors]
        self._input, self._narrow = None, {}

    def _add(self, i: int, x: Any, output: Any) -> Tensor | None:
        if not self._active:
            return None
        if self._input is not x or i not in self._narrow:  # the first site of a group computes for the others too
            group = self._together[i]
            self._input = x
            self._narrow = dict(
                zip(group, ApplyA.apply(x, self.scale, *(self._factors[2 * j] for j in group)), strict=True)
            )
        narrow = self._narrow.pop(i)
        if not self._narrow:
            self._input = None  # so that it is freed where nothing keeps it
        return ApplyB.apply(narrow, output, self._factors[2 * i + 1])


def _same_input(names: list[str]) -> list[list[int]]:
    """For each site, the numbers of all sites with the same input, its own among them."""
    groups: list[list[int]] = []
    found: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        module, _, layer = name.rpartition(".")
        key = module, next((layers for layers in SAME_INPUT if layer in layers), layer)
        groups.append(found.setdefault(key, []))
        groups[-1].append(i)
    return groups
