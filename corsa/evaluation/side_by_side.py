"""Asks a base model and adapters on it the same question, in this process. `corsa ask` shows the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.config import EvaluationConfig, ModelConfig
from corsa.errors import CorsaError
from corsa.evaluation.predict import Predictor
from corsa.lora.attached import Change, attached
from corsa.lora.peft_format import read_factors
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.models.registry import hub_name


@dataclass(frozen=True)
class Answer:
    """The answer of one model, and the probability of each candidate as the whole answer, end of text included."""

    model: str
    output: str
    probabilities: dict[str, float]


class SideBySide:
    """A base model and adapters on it, loaded once. Each adapter is attached once at the start, as a test.

    Attributes:
        model: the base model.
        encoder: its tokenizer with the template.
        changes: {"base": no change, path of an adapter: its change}.

    Raises:
        CorsaError: a model or adapter cannot be loaded, or an adapter belongs to another base model.
    """

    def __init__(
        self, model: ModelConfig, adapters: Sequence[str | Path] = (), device: torch.device | str = "cpu"
    ) -> None:
        self.changes: dict[str, Change] = {"base": {}}
        for path in adapters:
            change, base = read_factors(path)
            if base and hub_name(base) != hub_name(model.name):
                raise CorsaError(
                    f"adapter {path} is of base model {base!r}, not of {model.name!r}: give --model {base}"
                )
            self.changes[str(path)] = change
        self.device = torch.device(device)
        self.model = load_model(model, self.device)
        self.encoder = Encoder(load_tokenizer(model), model.template)
        for change in self.changes.values():
            with attached(self.model, change):  # refuses an adapter for other layers now
                pass

    def ask(self, question: str, candidates: Sequence[str] = (), new_tokens: int = 32) -> list[Answer]:
        """The greedy answer of the base model and of each adapter.

        Args:
            question: the question without a template.
            candidates: answers to compute the probabilities of.
            new_tokens: most tokens of an answer. A newline or the end token stops earlier.

        Raises:
            CorsaError: the question or a candidate is blank.
        """
        if not question.strip():
            raise CorsaError("the question is empty: ask something")
        if any(not candidate.strip() for candidate in candidates):
            raise CorsaError("a candidate is empty: give answers, such as --candidates 'Ada Byron,Grace Murray'")
        predictor = Predictor(
            self.model, self.encoder, EvaluationConfig(new_tokens=new_tokens), self.device, batch=1, packed=False
        )
        answers = []
        for name, change in self.changes.items():
            with attached(self.model, change):
                (output,) = predictor.answers([question.strip()])
                answers.append(Answer(name, output, self._probabilities(question.strip(), candidates)))
        return answers

    @torch.no_grad()
    def _probabilities(self, question: str, candidates: Sequence[str]) -> dict[str, float]:
        if not candidates:
            return {}
        prompt = self.encoder.prompt(question)
        answers = [self.encoder.answer(candidate.strip()) for candidate in candidates]
        triplets = [Triplet(prompt, answer, answer) for answer in answers]
        rows = [r.to(self.device) for r in pack(triplets, dtype=self.model.dtype, packed=False)]
        logp = answer_logprobs(self.model, rows, len(triplets))[0].tolist()  # nats
        return {candidate: math.exp(value) for candidate, value in zip(candidates, logp, strict=True)}
