"""Routers choose one of several adapters for a query, with the unedited model: by a prompt, or by embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import DynamicCache

from corsa.errors import CorsaError
from corsa.models.encoding import Encoder


class PromptRouter:
    """Shows the model a description of every part and takes the part whose letter has the highest likelihood. The
    paper's router prompts the model too; comparing likelihoods always gives a decision.

    Args:
        model: causal language model, adapters off.
        encoder: its tokenizer.
        descriptions: one per part; at most 26.
        batch: queries scored together.

    Raises:
        CorsaError: there are more parts than letters, or a letter is not a single token.
    """

    def __init__(self, model: Any, encoder: Encoder, descriptions: Sequence[str], batch: int) -> None:
        if len(descriptions) > len(ascii_uppercase):
            raise CorsaError(f"{len(descriptions)} parts: the router has letters for {len(ascii_uppercase)}")
        self.model, self.tokenizer, self.batch = model, encoder.tokenizer, batch
        lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, descriptions, strict=False)]
        self._shared = self._tokens("Which collection answers the question?\n" + "\n".join(lines) + "\n")
        letters = [self._tokens(f" {letter}") for letter in ascii_uppercase[: len(descriptions)]]
        if any(len(ids) != 1 for ids in letters) or len({ids[0] for ids in letters}) < len(letters):
            raise CorsaError("this tokenizer has no single token for each letter: use the embedding router")
        self._letters = torch.tensor([ids[0] for ids in letters], device=model.device)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def scores(self, queries: Sequence[str]) -> Tensor:
        """Log p of each part's letter after each query, nats: (Q, parts), float32."""
        device = self.model.device
        prefix = DynamicCache(config=self.model.config)  # the descriptions, computed once for all queries
        self.model(input_ids=torch.tensor([self._shared], device=device), past_key_values=prefix, use_cache=True)
        rows = [self._tokens(f"Question: {query}\nCollection:") for query in queries]
        found = torch.empty(len(rows), len(self._letters))
        for chosen in _batches([len(row) for row in rows], self.batch):
            width = max(len(rows[i]) for i in chosen)
            ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen], device=device)
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(chosen))
            # Padded on the right: earlier tokens do not attend to it.
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            last = torch.tensor([len(rows[i]) - 1 for i in chosen], device=device)
            logp = logits[torch.arange(len(chosen), device=device), last].float().log_softmax(-1)
            found[chosen] = logp[:, self._letters].cpu()
        return found

    def route(self, queries: Sequence[str]) -> list[int]:
        """The part of each query, from 0."""
        return self.scores(queries).argmax(1).tolist()


class EmbeddingRouter:
    """Takes the part with the nearest training questions: cosine of the query's embedding and their centroid.

    An embedding is the mean of the last hidden states, minus the mean over all training questions (the states of a
    language model share a large common direction, which would dominate the cosine).
    """

    def __init__(self, model: Any, encoder: Encoder, prompts: Sequence[Sequence[str]], batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, encoder.tokenizer, batch
        taught = [self._embedded(own) for own in prompts]
        self._mean = torch.cat(taught).mean(0)
        self._centroids = normalize(torch.stack([(own - self._mean).mean(0) for own in taught]), dim=-1)  # (parts, H)

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> Tensor:
        """(T, H), float32, on the CPU."""
        device = self.model.device
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        found: dict[int, Tensor] = {}
        for chosen in _batches([len(row) for row in rows], self.batch):
            width = max(len(rows[i]) for i in chosen)
            ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen], device=device)
            states = self._states(ids).float()
            kept = torch.tensor([[j < len(rows[i]) for j in range(width)] for i in chosen], device=device)
            means = (states * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
            found |= dict(zip(chosen, means.cpu(), strict=True))
        return torch.stack([found[i] for i in range(len(rows))])

    def _states(self, ids: Tensor) -> Tensor:
        """The last hidden states (R, T, H). The whole model runs: if it is sharded, all passes must be alike."""
        found: list[Tensor] = []
        decoder = self.model.get_decoder()
        handle = decoder.register_forward_hook(lambda module, args, output: found.append(output.last_hidden_state))
        try:
            self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return found[0]

    def scores(self, queries: Sequence[str]) -> Tensor:
        """Cosine of each query with each part: (Q, parts)."""
        return normalize(self._embedded(queries) - self._mean, dim=-1) @ self._centroids.T

    def route(self, queries: Sequence[str]) -> list[int]:
        """The part of each query, from 0."""
        return self.scores(queries).argmax(1).tolist()


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Positions in batches of neighbours in length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + size] for i in range(0, len(order), size)]
