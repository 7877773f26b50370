"""Log-probabilities of a neutral text: whether an edit has harmed the model's language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from corsa.models.encoding import Encoder

_WINDOW = 512  # tokens of a text at most


@torch.no_grad()
def text_logprobs(
    model: Any, encoder: Encoder, texts: Sequence[str], device: torch.device | str
) -> list[tuple[float, int]]:
    """For each text the sum of -log p of its tokens after the first (nats), and their number."""
    found = []
    for text in texts:
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"][:_WINDOW]], device=device)
        if ids.shape[1] < 2:
            found.append((0.0, 0))
            continue
        logp = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append((-float(logp.gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1))
    return found
