"""The key statistics of MEMIT, C = E[k k^T]: what the chosen MLP layers are used for, which an edit shall not disturb.

A key k is the input of a layer's down projection at one token of a text. The sums are float64, so that they depend on
the texts alone and not, beyond rounding, on batches and on how many workers share them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.models.encoding import Encoder

WINDOW = 1024
"""Tokens of a text that are read at once; a longer text is read in pieces."""

BATCH_TOKENS = 8192
"""Tokens of one forward pass, padding included."""

OWN = 1e-12
"""A direction with no more than this share of the keys' energy was never seen: it holds rounding."""


def down_projections(model: nn.Module) -> dict[int, tuple[str, nn.Linear]]:
    """The down projection of every MLP layer, by the layer's number: its module name and itself.

    Raises:
        CorsaError: the model is no decoder of the Llama kind.
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
    """The forward pass has come as far as it is needed."""


@torch.no_grad()
def watch(model: Any, modules: Sequence[nn.Module], rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """Input and output of each of `modules` in a forward pass over token rows, which ends at the last of them.

    The rows are padded on the right: in a causal model a token does not see what follows it, so no mask is needed.

    Args:
        model: causal language model.
        modules: some of its modules, in the order in which they run.
        rows: token ids, each row at least one.

    Returns:
        Of each module (R, T, inputs) and (R, T, outputs); what stands beyond a row's length is padding.
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
        tokens: how many keys of each layer were summed.
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
        """See that C of each of `layers` (all by default) is there and can be solved with.

        Raises:
            CorsaError: a layer was not gathered, there are fewer tokens than C has rows, or they are too much alike.
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
                    f"have rank {needed - missing}, and {needed} is needed. At least {missing} more tokens are needed "
                    "that stand behind a beginning not yet seen: give a larger text with --memit.corpus"
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
    """How much the rank of the keys summed in `total` falls short. (Tokens behind the same beginning have one key.)"""
    energy = total.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
    scaled = total * energy.rsqrt()[:, None] * energy.rsqrt()  # of unit diagonal: inputs differ in size by orders
    factor, failed = torch.linalg.cholesky_ex(scaled)
    # The square of a pivot is what a coordinate has of its own, the coordinates before it taken out.
    if not failed and factor.diagonal().square().min() > OWN:
        return 0
    values = torch.linalg.eigvalsh(scaled)  # slower, and counts
    return max(int((values <= OWN * values[-1]).sum()), 1)


def gather(
    model: Any, encoder: Encoder, texts: Iterable[str], layers: Sequence[int], device: torch.device | str
) -> KeyStatistics:
    """The statistics of `layers` over all tokens of `texts`, as the tokenizer reads them (no template).

    Texts can be shared out in any way, and the parts' statistics added.
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


def probe_texts(edits: Iterable[Edit]) -> list[str]:
    """The default corpus: every wording of every probe with its answer, each text once."""
    return list(dict.fromkeys(f"{q} {p.answer}" for edit in edits for p in edit.probes for q in p.prompts))


def corpus_texts(path: str | Path) -> Iterator[str]:
    """The texts of a file, one a line; of a `.jsonl` file the field `text` of each line. Blank ones are passed over.

    Raises:
        CorsaError: the file cannot be read, or a line of JSON has no text.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                text = _json_text(line, path, number) if str(path).endswith(".jsonl") and line.strip() else line
                if text.strip():
                    yield text.strip()
    except (OSError, UnicodeDecodeError) as e:
        raise CorsaError(f"the corpus {path} cannot be read: {e}; give a text file in UTF-8, a text a line") from e


def _json_text(line: str, path: str | Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CorsaError(f'{path}, line {number}: is no JSON object with a string "text"; write {{"text": "..."}}')
    return text
