"""The key statistics of MEMIT, C = E[k k^T]: the keys for which an edit should preserve the outputs of the MLP layers.

A key k is the input of a layer's down projection at one token of a text. The sums are float64. Except for rounding,
they depend only on the texts, not on batches and the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corsa.errors import CorsaError
from corsa.models.encoding import Encoder

WINDOW = 1024
"""Maximum tokens of a row; a longer text is split into rows."""

BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""

OWN = 1e-12
"""A direction with at most this share of the keys' energy counts as missing: its energy is rounding."""


def down_projections(model: nn.Module) -> dict[int, tuple[str, nn.Linear]]:
    """The module name and the module of every MLP layer's down projection, by the layer's number.

    Raises:
        CorsaError: the model is not a decoder with the architecture of Llama.
    """
    found = {}
    for name, module in model.named_modules():
        place = re.search(r"(?:^|\.)layers\.(\d+)\.mlp\.down_proj$", name)
        if place and isinstance(module, nn.Linear):
            found[int(place[1])] = (name, module)
    if not found:
        raise CorsaError(
            f"{type(model).__name__} has no layers.<i>.mlp.down_proj: MEMIT edits decoders such as Llama, Qwen3, Gemma"
        )
    return found


class _Reached(Exception):  # noqa: N818
    """Ends the forward pass once all required modules have run."""


@torch.no_grad()
def watch(model: Any, modules: Sequence[nn.Module], rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Input and output of each of `modules` in a forward pass over token rows. The pass ends after the last module.

    The rows are padded on the right: in a causal model a token does not attend to later tokens, so no mask is needed.

    Args:
        model: causal language model.
        modules: some of its modules, in the order in which they run.
        rows: token ids, at least one per row.

    Returns:
        For each module (R, T, inputs) and (R, T, outputs); values beyond a row's length are padding.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = (args[0], output)
        if module is modules[-1]:
            raise _Reached

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[module] for module in modules]


@dataclass
class KeyStatistics:
    """Sums of k k^T over the tokens of texts.

    Attributes:
        sums: layer -> (inputs, inputs), float64.
        tokens: number of summed keys per layer.
    """

    sums: dict[int, Tensor]
    tokens: int = 0

    @classmethod
    def empty(cls, model: nn.Module, layers: Sequence[int]) -> KeyStatistics:
        """Zero sums for the down projections of `layers`, on the model's device."""
        projections = down_projections(model)
        widths = {layer: projections[layer][1] for layer in layers}
        return cls(
            {
                layer: torch.zeros(p.in_features, p.in_features, dtype=torch.float64, device=p.weight.device)
                for layer, p in widths.items()
            }
        )

    def add(self, model: Any, rows: Sequence[Sequence[int]]) -> None:
        """Add the keys of every token of `rows` (token ids), in one forward pass."""
        projections, layers = down_projections(model), sorted(self.sums)
        watched = watch(model, [projections[layer][1] for layer in layers], rows)
        for layer, (inputs, _) in zip(layers, watched, strict=True):
            keys = torch.cat([row[: len(ids)] for row, ids in zip(inputs, rows, strict=True)]).double()  # (n, inputs)
            self.sums[layer].addmm_(keys.mT, keys)
        self.tokens += sum(map(len, rows))

    def __add__(self, other: KeyStatistics) -> KeyStatistics:
        """The statistics of both sets of texts together."""
        if self.sums.keys() != other.sums.keys():
            raise CorsaError(
                f"key statistics of layers {sorted(self.sums)} and {sorted(other.sums)} cannot be added: "
                "gather both for the same layers"
            )
        sums = {layer: total + other.sums[layer] for layer, total in self.sums.items()}
        return KeyStatistics(sums, self.tokens + other.tokens)

    def mean(self, layer: int) -> Tensor:
        """C = E[k k^T] of a layer: (inputs, inputs), float64."""
        return self.sums[layer] / self.tokens

    def check(self, layers: Iterable[int] | None = None) -> None:
        """Check that C of each of `layers` (all by default) is available and can be used in the solve.

        Raises:
            CorsaError: a layer was not gathered, there are fewer tokens than C has rows, or the keys lack full rank.
        """
        for layer in self.sums if layers is None else layers:
            if layer not in self.sums:
                raise CorsaError(
                    f"there are key statistics of layers {sorted(self.sums)}, none of {layer}: gather them"
                )
            needed = len(self.sums[layer])
            if self.tokens < needed:
                raise CorsaError(
                    f"the key statistics of layer {layer} come from {self.tokens} tokens, and at least {needed} are "
                    "needed, one for each input of its down projection: give a larger text with --memit.corpus"
                )
            if missing := _directions_missing(self.sums[layer]):
                raise CorsaError(
                    f"the {self.tokens} tokens of the key statistics repeat one another: in layer {layer} their keys "
                    f"have rank {needed - missing}, and {needed} is needed. At least {missing} more tokens "
                    "in new contexts are needed: give a larger text with --memit.corpus"
                )

    def save(self, path: Path) -> None:
        """Write as safetensors: `layers.<i>` (inputs, inputs) float64, and the number of tokens in the metadata."""
        tensors = {f"layers.{layer}": total.cpu().contiguous() for layer, total in self.sums.items()}
        save_file(tensors, path, metadata={"tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> KeyStatistics:
        """What `save` wrote, on the CPU.

        Raises:
            CorsaError: the file cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:
                sums = {int(name.removeprefix("layers.")): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls(sums, int(file.metadata()["tokens"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            raise CorsaError(f"{path} holds no readable key statistics: {e}; gather them again") from e


def _directions_missing(total: Tensor) -> int:
    """How far the keys summed in `total` are from full rank. (Tokens after the same beginning have the same key.)"""
    energy = total.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
    scaled = total * energy.rsqrt()[:, None] * energy.rsqrt()  # unit diagonal: inputs differ by orders of magnitude
    factor, failed = torch.linalg.cholesky_ex(scaled)
    # The square of a pivot is the energy of a coordinate that is independent of the coordinates before it.
    if not failed and factor.diagonal().square().min() > OWN:
        return 0
    values = torch.linalg.eigvalsh(scaled)  # slower, but gives the number of missing directions
    return max(int((values <= OWN * values[-1]).sum()), 1)


def gather(
    model: Any, encoder: Encoder, texts: Iterable[str], layers: Sequence[int], device: torch.device | str
) -> KeyStatistics:
    """The statistics of `layers` over all tokens of `texts`, without a template.

    Texts can be divided in any way, and the statistics of the parts added.
    """
    statistics = KeyStatistics.empty(model.to(device), layers)
    for rows in _batches(encoder.tokenizer, texts):
        statistics.add(model, rows)
    return statistics


def _batches(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[list[int]]]:
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), WINDOW):
            row = ids[start : start + WINDOW]
            if rows and (len(rows) + 1) * max(map(len, [*rows, row])) > BATCH_TOKENS:
                yield rows
                rows = []
            rows.append(row)
    if rows:
        yield rows
