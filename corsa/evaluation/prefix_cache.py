"""Prompts that begin alike, such as the wordings of a subject after one head or the samples of one long prompt: what
they have in common is computed once.
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
"""A batch is computed in two passes, beginnings and rests, where these hold at most this share of its tokens."""


def common(prompts: Sequence[Tokens]) -> int:
    """Tokens at the beginning that all prompts have in common; each keeps at least one of its own."""
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


def families(prompts: Sequence[Tokens]) -> list[list[int]]:
    """Places of the prompts, those together that have half of their tokens or more in common, the shortest first."""
    found: list[list[int]] = []
    longest = 0  # prompt of the family at hand
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):  # those that begin alike become neighbours
        longest = max(longest, len(prompts[i]))
        if found and 2 * common([prompts[found[-1][0]], prompts[i]]) >= longest - 1:
            found[-1].append(i)
        else:
            found.append([i])
            longest = len(prompts[i])
    return [sorted(family, key=lambda i: len(prompts[i])) for family in found]


def batches(prompts: Sequence[Tokens], batch: int) -> Iterator[list[list[int]]]:
    """The families, or parts of large ones, of at most `batch` prompts together; neighbours in length share a batch, so
    that little is padded.
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
    """Compute the families' beginnings into `cache`, each once, where that saves a fifth of the tokens.

    Args:
        model: causal language model.
        cache: empty; after it the rows' beginnings, one row a prompt, or empty as before.
        together: the families, each its prompts.
        new_tokens: bound on what will be generated after the prompts.
        device: where the model is.

    Returns:
        What is left to compute of each prompt, (R, W), padded on the left, and which of the cache's and its positions
        hold tokens, (R, P + W).
    """
    prompts = [prompt for family in together for prompt in family]
    widths = [max(map(len, family)) for family in together]
    rest = max(width - common(family) for family, width in zip(together, widths, strict=True))
    begun = [max(0, width - rest) for width in widths]  # so much of each that no rest is wider than the widest
    passed = len(begun) * max(begun) + len(prompts) * rest  # positions computed in two passes
    fits = max(begun) + rest + new_tokens <= _window(model)
    if not fits or passed > _SAVES * len(prompts) * max(widths):
        return _padded(prompts, device)
    ids, seen = _padded([family[0][:n] for family, n in zip(together, begun, strict=True)], device)
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
    ids, own = _padded(left, device)
    return ids, torch.cat([seen[family_of], own], dim=1)


def _window(model: Any) -> float:
    """Positions that every layer looks back on. The padding between a beginning and its rest counts there as tokens do,
    so a layer that slides, or carries a state on, must not come to its end.
    """
    config = model.config.get_text_config()
    if {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        return 0
    return getattr(config, "sliding_window", None) or float("inf")


def _padded(rows: Sequence[Tokens], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rows padded on the left, and where they hold tokens: (R, W) each."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, seen
