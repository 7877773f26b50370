"""Answers multiple-choice questions by the log-likelihood of the four letters. The common part of a subject's prompts
(its worked examples) is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import DynamicCache

from corsa.errors import CorsaError
from corsa.evaluation.mmlu import LETTERS, MmluQuestions, Subject
from corsa.evaluation.prefix_cache import common

ANSWERS = pa.schema(
    [
        ("subject", pa.string()),
        ("index", pa.int32()),
        ("answer", pa.int8()),  # 0 to 3
        ("chosen", pa.int8()),  # the most likely letter; the first in a tie
        ("logp_A", pa.float64()),  # nats, of " A" after the prompt
        ("logp_B", pa.float64()),
        ("logp_C", pa.float64()),
        ("logp_D", pa.float64()),
        ("correct", pa.bool_()),
        ("shots_dropped", pa.int8()),  # worked examples left out because the prompt was too long for the model
    ]
)
"""One row per question."""

_CACHED = 1 << 15
"""Most cache positions of one batch, over all its rows: 1.5 GB for the embedded model (float32), 5 GB for 14B in
bfloat16.
"""


@dataclass
class MultipleChoice:
    """Asks one model on one worker.

    Attributes:
        batch: most questions per batch; fewer if their prompts are long (`_CACHED`).
        share: compute the common part of a subject's prompts once. False gives the same answers more slowly, to measure
            the saving.
    """

    model: Any
    tokenizer: Any
    device: torch.device | str
    batch: int
    share: bool = True

    def answers(self, questions: MmluQuestions) -> list[dict[str, Any]]:
        """The rows of `ANSWERS`, in the order of the questions.

        If a prompt has more tokens than the model has positions, it keeps only the first worked examples, like a run
        with fewer shots. (The harness cuts it on the left, in the middle of an example.)

        Raises:
            CorsaError: a question is too long even without worked examples, or a letter is not one token.
        """
        letters = self._letter_tokens()
        return [row for subject in questions.subjects for row in self._answers(subject, letters)]

    def _answers(self, subject: Subject, letters: Tensor) -> Iterator[dict[str, Any]]:
        prompts = self._prompts(subject)
        dropped = [len(subject.shots) - shots for shots, _ in prompts]
        logp = torch.empty(len(prompts), len(LETTERS))
        for number in set(dropped):  # prompts with equally many examples share the most tokens
            alike = [i for i, d in enumerate(dropped) if d == number]
            logp[alike] = self._scores([prompts[i][1] for i in alike], letters)
        for question, d, scores in zip(subject.questions, dropped, logp.tolist(), strict=True):
            chosen = scores.index(max(scores))  # the first in a tie, as in the harness
            yield {
                "subject": subject.name,
                "index": question.index,
                "answer": question.answer,
                "chosen": chosen,
                **{f"logp_{letter}": score for letter, score in zip(LETTERS, scores, strict=True)},
                "correct": chosen == question.answer,
                "shots_dropped": d,
            }

    def _prompts(self, subject: Subject) -> list[tuple[int, list[int]]]:
        """For each question, the number of worked examples that fit, and the token ids of the whole prompt."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        found: dict[int, tuple[int, list[int]]] = {}
        left = list(range(len(subject.questions)))
        for shots in range(len(subject.shots), -1, -1):
            prompts = self._tokens([subject.prompt(subject.questions[i], shots) for i in left])
            found |= {i: (shots, ids) for i, ids in zip(left, prompts, strict=True) if len(ids) <= positions}
            left = [i for i in left if i not in found]
            if not left:
                break
        if left:
            raise CorsaError(
                f"MMLU {subject.name}, question {subject.questions[left[0]].index}: longer than the model's "
                f"{positions} positions, even without worked examples; ask a model with a longer context"
            )
        return [found[i] for i in range(len(subject.questions))]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with a begin token if the tokenizer adds one, but never with an end token."""
        end = self.tokenizer.eos_token_id
        return [ids[:-1] if ids[-1] == end else ids for ids in self.tokenizer(list(texts))["input_ids"]]

    def _letter_tokens(self) -> Tensor:
        """The token of each letter after the prompt: (4,)."""
        prompt, *answered = self._tokens(["Answer:", *(f"Answer: {letter}" for letter in LETTERS)])
        if any(ids[:-1] != prompt for ids in answered):
            raise CorsaError(
                f"the tokenizer of {self.model.config.name_or_path or 'the model'} does not make one token of a letter "
                "after 'Answer:', and MMLU is answered by the likelihood of that token; ask another model"
            )
        return torch.tensor([ids[-1] for ids in answered], device=self.device)

    @torch.no_grad()
    def _scores(self, prompts: Sequence[list[int]], letters: Tensor) -> Tensor:
        """Log p of each letter after each prompt, in nats: (prompts, 4), float32."""
        # Split the tokens of whole prompts: tokenizing examples and question separately may differ at the boundary.
        shared = common(prompts) if self.share else 0
        prefix = DynamicCache(config=self.model.config)
        if shared:
            ids = torch.tensor([prompts[0][:shared]], device=self.device)
            self.model(input_ids=ids, past_key_values=prefix, use_cache=True, logits_to_keep=1)
        logp = torch.empty(len(prompts), len(letters))
        for rows in self._batches([len(p) for p in prompts]):
            last = torch.tensor([[len(prompts[i]) - shared - 1] for i in rows], device=self.device)  # (R, 1)
            width = int(last.max()) + 1
            # Padded on the right, where no earlier token sees it, so no mask or positions are needed.
            ids = [prompts[i][shared:] + [0] * (width - len(prompts[i]) + shared) for i in rows]
            cache = copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(rows))
            logits = self.model(
                input_ids=torch.tensor(ids, device=self.device),
                past_key_values=cache if shared else None,
                use_cache=shared > 0,
                logits_to_keep=last,
            ).logits[:, 0]  # (R, V)
            logp[rows] = logits.float().log_softmax(-1)[:, letters].cpu()
        return logp

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of the prompts of each batch. Prompts of similar length share a batch, so there is little padding."""
        rows: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if rows and (len(rows) == self.batch or (len(rows) + 1) * lengths[i] > _CACHED):
                yield rows
                rows = []
            rows.append(i)
        yield rows
