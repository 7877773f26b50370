"""Generation, greedy or sampled. Prompts are batched by length, and common beginnings are computed once. An answer
leaves the batch when it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from corsa.evaluation.prefix_cache import batches, begin


@lru_cache(maxsize=1)  # every round of a worker asks with the same tokenizer
def newline_tokens(tokenizer: Any) -> Tensor:
    """Which tokens end a line: (V,) bool."""
    size = len(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in range(size)])
    return torch.tensor(["\n" in text for text in texts], dtype=torch.bool)


def end_tokens(model: Any, tokenizer: Any) -> Tensor:
    """Every token that ends an answer, (V,) bool: the tokenizer's end token, and the end tokens in the model's
    `generation_config` (an instruct model ends a turn and a text with different tokens).
    """
    stops = torch.zeros(len(tokenizer), dtype=torch.bool)
    published = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(published if isinstance(published, list | tuple) else [published])]
    stops[[token for token in ends if token is not None and 0 <= token < len(stops)]] = True
    return stops


Said = Callable[[int, int], None]


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Tensor,
    new_tokens: int,
    batch: int,
    device: torch.device | str,
    told: Callable[[int], None] = lambda done: None,
    said: Said = lambda prompt, token: None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to the first token of `stops` (excluded), at most `new_tokens` long.

    Args:
        model: causal language model.
        prompts: token ids, at least one per prompt.
        stops: (V,) bool, tokens that end an answer.
        new_tokens: most tokens of an answer.
        batch: prompts per batch. Prompts of similar length share a batch (little padding), and so do prompts with the
            same beginning (computed once).
        device: device of the model.
        told: called after each batch with the number of finished prompts.
        said: called with the index of a prompt and each token of its answer. What it raises ends the generation.
    """
    return _generate(model, prompts, stops, new_tokens, batch, device, _likeliest, told, said)


def _likeliest(logits: Tensor, alive: Sequence[int], step: int) -> Tensor:
    del alive, step
    return logits.argmax(-1)


Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""The next tokens (R,) from logits (R, V), the indices of their prompts, and the number of tokens before."""


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[Sequence[int]],
    temperature: float,
    top_p: float,
    stops: Tensor,
    new_tokens: int,
    batch: int,
    device: torch.device | str,
    told: Callable[[int], None] = lambda done: None,
    said: Said = lambda prompt, token: None,
) -> list[list[int]]:
    """As `generate`, but samples each token from the likeliest ones that hold `top_p` of softmax(logits / temperature).

    `seeds`: the seed of each prompt (whole numbers). The random numbers of a prompt do not depend on other prompts.
    """
    draws = [np.random.default_rng(list(seed)).random(new_tokens) for seed in seeds]

    def choose(logits: Tensor, alive: Sequence[int], step: int) -> Tensor:
        p = (logits.double() / temperature).softmax(-1)
        if top_p < 1:
            p = nucleus(p, top_p)
        # In vocabulary order: in order of probability, rounding in a batch could swap tokens of nearly equal
        # probability.
        drawn = torch.tensor([draws[i][step] for i in alive], device=logits.device, dtype=p.dtype)[:, None]
        heights = p.cumsum(-1)
        place = torch.searchsorted(heights, drawn * heights[:, -1:], right=True)
        return place.clamp(max=p.shape[-1] - 1)[:, 0]

    return _generate(model, prompts, stops, new_tokens, batch, device, choose, told, said)


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Probabilities (R, V) with all but the likeliest tokens that hold `top_p` set to 0 (Holtzman et al. 2020, arXiv
    1904.09751). The likeliest token always stays. Of equally likely ones the first stay.

    The few likeliest are searched first: to sort a whole vocabulary takes several times as long.
    """
    size = p.shape[-1]
    for few in (min(256, size), min(8192, size), size):
        likeliest = p.topk(few).values
        before = likeliest.cumsum(-1) - likeliest
        if few == size or bool((before[:, -1] >= top_p).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    least = likeliest.gather(-1, kept - 1)
    more, equal = p > least, p == least
    return p.masked_fill(~(more | (equal & (equal.cumsum(-1) <= kept - more.sum(-1, keepdim=True)))), 0.0)


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Tensor,
    new_tokens: int,
    batch: int,
    device: torch.device | str,
    choose: Choose,
    told: Callable[[int], None] = lambda done: None,
    said: Said = lambda prompt, token: None,
) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in prompts]
    stops, done = stops.to(device), 0
    for together in batches(prompts, batch):
        _generate_batch(model, prompts, together, outputs, stops, new_tokens, device, choose, said)
        done += sum(map(len, together))
        told(done)
    return outputs


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    together: Sequence[Sequence[int]],
    outputs: list[list[int]],
    stops: Tensor,
    new_tokens: int,
    device: torch.device | str,
    choose: Choose,
    said: Said,
) -> None:
    cache = DynamicCache(config=model.config)
    asked = [[prompts[i] for i in family] for family in together]
    ids, seen = begin(model, cache, asked, new_tokens=new_tokens, device=device)
    alive = [i for family in together for i in family]
    for step in range(new_tokens):
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token = choose(logits, alive, step)  # (R,)
        going = ~(stops[token.clamp(max=len(stops) - 1)] | (token >= len(stops)))
        for i, t, goes in zip(alive, token.tolist(), going.tolist(), strict=True):
            if goes:
                outputs[i].append(t)
                said(i, t)
        kept = going.nonzero()[:, 0]
        if len(kept) == 0:
            return
        if len(kept) < len(alive):  # drop the rows of finished answers
            cache.batch_select_indices(kept)
            alive = [alive[k] for k in kept.tolist()]
            seen, token = seen[kept], token[kept]
        ids = token[:, None]
        seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=1)
