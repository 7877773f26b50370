"""The predictions table of a model on a server: as `corsa.evaluation.predict`, without log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from corsa.config import EvaluationConfig
from corsa.evaluation.endpoint import Endpoint
from corsa.evaluation.matching import first_line
from corsa.evaluation.predict import Mode, Predictor, Taught
from corsa.models.encoding import Encoder, without_thoughts


class ServedPredictor(Predictor):
    """Asks a server in place of a model on this machine."""

    def __init__(self, endpoint: Endpoint, config: EvaluationConfig, told: Callable[[int, int], None]) -> None:
        super().__init__(None, cast(Encoder, None), config, torch.device("cpu"), batch=1, told=told)
        self.endpoint = endpoint

    @property
    def has_other_template(self) -> bool:
        """The server has both interfaces, completions and chat."""
        return True

    def _generated(
        self, questions: Sequence[str], mode: Mode, draw: int | None, told: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        endpoint = self.endpoint
        if mode.other:
            endpoint = replace(endpoint, template="qa" if endpoint.template == "chat" else "chat")
        tokens = mode.tokens + self.config.thinking * self.config.thinking_tokens
        texts = endpoint.ask(questions, tokens=tokens, lines=mode.lines, told=told)
        texts = [without_thoughts(text).strip() for text in texts]
        return texts if mode.lines else [first_line(text) for text in texts]

    def _scores(self, wordings: Sequence[tuple[Taught, int, int]]) -> dict[Any, tuple[float, float]]:
        return {}
