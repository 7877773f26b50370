"""Computes the common beginning of prompts once. Examples: wordings after the same few-shot head, or samples of one
long prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

Tokens = Sequence[int]

_SAVES = 0.8
"""A batch runs in two passes, beginnings and rests, if these hold at most this share of its tokens."""


def common(prompts: Sequence[Tokens]) -> int:
    """Number of first tokens that all prompts share. Each prompt keeps at least one token of its own."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


def families(prompts: Sequence[Tokens]) -> list[list[int]]:
    """Indices of the prompts, grouped if they share about half of their tokens or more; the shortest first."""
    found: list[list[int]] = []
    longest = 0  # length of the longest prompt in the current family
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):  # sorts equal beginnings together
        longest = max(longest, len(prompts[i]))
        if found and 2 * common([prompts[found[-1][0]], prompts[i]]) >= longest - 1:
            found[-1].append(i)
        else:
            found.append([i])
            longest = len(prompts[i])
    return [sorted(family, key=lambda i: len(prompts[i])) for family in found]


def batches(prompts: Sequence[Tokens], batch: int) -> Iterator[list[list[int]]]:
    """Batches of families, or of parts of large families, with at most `batch` prompts. Prompts of similar length share
    a batch, so there is little padding.
    """
    parts = [family[start : start + batch] for family in families(prompts) for start in range(0, len(family), batch)]
    filled: list[list[int]] = []
    for part in sorted(parts, key=lambda part: len(prompts[part[-1]])):
        if filled and sum(map(len, filled)) + len(part) > batch:
            yield filled
            filled = []
        filled.append(part)
    if filled:
        yield filled


def begin(
    model: Any,
    cache: DynamicCache,
    together: Sequence[Sequence[Tokens]],
    *,
    new_tokens: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Compute each family's beginning once into `cache`, if that saves a fifth of the tokens.

    Args:
        model: causal language model.
        cache: empty. Afterwards it holds the beginnings, one row per prompt, or stays empty.
        together: the prompts of each family.
        new_tokens: most tokens generated after the prompts.
        device: device of the model.

    Returns:
        The remaining tokens of each prompt, (R, W), padded on the left; and which positions, of the cache and then of
        these, hold tokens, (R, P + W).
    """
    prompts = [prompt for family in together for prompt in family]
    widths = [max(map(len, family)) for family in together]
    rest = max(width - common(family) for family, width in zip(together, widths, strict=True))
    begun = [max(0, width - rest) for width in widths]  # tokens in the first pass: no rest exceeds `rest`
    passed = len(begun) * max(begun) + len(prompts) * rest  # positions computed in two passes
    fits = max(begun) + rest + new_tokens <= window(model)
    if not fits or passed > _SAVES * len(prompts) * max(widths):
        return padded(prompts, device)
    ids, seen = padded([family[0][:n] for family, n in zip(together, begun, strict=True)], device)
    model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    family_of = torch.tensor([f for f, family in enumerate(together) for _ in family], device=device)
    cache.batch_select_indices(family_of)
    left = [prompt[n:] for family, n in zip(together, begun, strict=True) for prompt in family]
    ids, own = padded(left, device)
    return ids, torch.cat([seen[family_of], own], dim=1)


def window(model: Any) -> float:
    """Positions that every layer sees. Padding between a beginning and its rest counts like tokens. So a prompt must
    fit into a sliding window, and layers that carry a state are not supported (0).
    """
    config = model.config.get_text_config()
    if {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        return 0
    return getattr(config, "sliding_window", None) or float("inf")


def padded(rows: Sequence[Tokens], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and where they hold tokens: (R, W) each."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, seen
