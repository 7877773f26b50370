"""Asking an edited model its probes: one row per wording, in the predictions table all metrics are computed from."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.config import EvaluationConfig
from corsa.data.edit import Edit, Probe
from corsa.evaluation.generation import generate, newline_tokens
from corsa.evaluation.matching import matches
from corsa.models.encoding import Encoder

PREDICTIONS = pa.schema(
    [
        ("method", pa.string()),
        ("seed", pa.int32()),
        ("trained", pa.int32()),  # the round after which it was asked; 0: the base model
        ("edit", pa.string()),
        ("chain", pa.string()),
        ("learnt", pa.int32()),  # the round in which the edit is taught
        ("part", pa.string()),  # "update", or "evaluation": taught in round 1 and never revised
        ("kind", pa.string()),
        ("probe", pa.int32()),
        ("wording", pa.int32()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("target_old", pa.string()),
        ("output", pa.string()),
        (
            "logp_new",
            pa.float64(),
        ),  # nats, sum over the answer's tokens; the edit wording and the first paraphrase only
        ("logp_old", pa.float64()),
        ("matched_new", pa.bool_()),
        ("matched_old", pa.bool_()),
        ("exact_new", pa.bool_()),
        ("exact_old", pa.bool_()),
    ]
)
"""One row per wording asked."""


@dataclass(frozen=True)
class Taught:
    """An edit with its place in the scenario: the round that teaches it, and whether it is of the revised part."""

    edit: Edit
    learnt: int
    part: str


@dataclass
class Asker:
    """Asks one model on one worker. `batch` bounds how many probes are generated (or scored) together."""

    model: Any
    encoder: Encoder
    config: EvaluationConfig
    device: torch.device
    batch: int
    packed: bool = True

    def __post_init__(self) -> None:
        self._stops: tuple[Tensor, Tensor] | None = None  # of a fact's answer, of one at length

    def ask(self, taught: Sequence[Taught], only: Container[str] | None = None) -> list[dict[str, Any]]:
        """The rows of the predictions table for these edits, without method, seed and round.

        `only`: the prompts that are asked; all by default.
        """
        wordings = [
            (t, p, w)
            for t in taught
            for p, probe in enumerate(t.edit.probes)
            for w in range(self._asked(probe))
            if only is None or probe.prompts[w] in only
        ]
        outputs: dict[tuple[bool, str], str] = {}
        for reasoned in (False, True):
            probes = [
                (t.edit.probes[p], w) for t, p, w in wordings if (t.edit.probes[p].kind == "multihop") == reasoned
            ]
            prompts = list(dict.fromkeys(probe.prompts[w] for probe, w in probes))  # a chain repeats its wordings
            outputs |= {(reasoned, p): o for p, o in zip(prompts, self.answers(prompts, reasoned), strict=True)}
        scores = self._scores(wordings)
        rows = []
        for t, p, w in wordings:
            probe = t.edit.probes[p]
            rows.append(self._row(t, p, w, outputs[probe.kind == "multihop", probe.prompts[w]], scores))
        return rows

    def _asked(self, probe: Probe) -> int:
        """How many wordings of a probe are asked."""
        one = self.config.protocol == "paper" and probe.kind == "paraphrase"
        return 1 if one else len(probe.prompts)

    def answers(self, prompts: Sequence[str], reasoned: bool = False) -> list[str]:
        """The model's outputs; `reasoned`: at length, newlines included."""
        if not prompts:
            return []
        ids = generate(
            self.model,
            [self.encoder.prompt(p) for p in prompts],
            stops=self.stops(reasoned),
            new_tokens=self.config.reasoning_tokens if reasoned else self.config.new_tokens,
            batch=self.batch,
            device=self.device,
        )
        return [self.encoder.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]

    def stops(self, reasoned: bool = False) -> Tensor:
        """The tokens that end an answer: (V,) bool."""
        if self._stops is None:
            lines = newline_tokens(self.encoder.tokenizer)
            end = torch.zeros_like(lines)
            end[self.encoder.tokenizer.eos_token_id] = True
            self._stops = (lines | end, end)
        return self._stops[reasoned]

    @torch.no_grad()
    def _scores(self, wordings: Sequence[tuple[Taught, int, int]]) -> dict[tuple[str, int, int], tuple[float, float]]:
        """Log p of both answers (nats) for the edit wording and the first paraphrase of each edit."""
        scored = [(t, p, w) for t, p, w in wordings if w == 0 and t.edit.probes[p].kind in ("edit", "paraphrase")]
        triplets = [
            Triplet(
                self.encoder.prompt(t.edit.probes[p].prompts[w]),
                self.encoder.answer(t.edit.target_new),
                self.encoder.answer(t.edit.target_old),
            )
            for t, p, w in scored
        ]
        order = sorted(range(len(scored)), key=lambda i: len(triplets[i].prompt))
        found = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            rows = [
                r.to(self.device)
                for r in pack([triplets[i] for i in chosen], dtype=self.model.dtype, packed=self.packed)
            ]
            logp = answer_logprobs(self.model, rows, len(chosen)).tolist()
            for i, new, old in zip(chosen, *logp, strict=True):
                t, p, w = scored[i]
                found[t.edit.id, p, w] = (new, old)
        return found

    def _row(
        self, taught: Taught, p: int, w: int, output: str, scores: dict[tuple[str, int, int], tuple[float, float]]
    ) -> dict[str, Any]:
        edit, probe = taught.edit, taught.edit.probes[p]
        of_the_edit = probe.kind in ("edit", "paraphrase")
        old = (edit.target_old, edit.aliases_old) if of_the_edit else ("", ())
        match = matches(output, new=(probe.answer, probe.aliases), old=old)
        new_logp, old_logp = scores.get((edit.id, p, w), (None, None))
        return {
            "edit": edit.id,
            "chain": edit.chain,
            "learnt": taught.learnt,
            "part": taught.part,
            "kind": probe.kind,
            "probe": p,
            "wording": w,
            "prompt": probe.prompts[w],
            "answer": probe.answer,
            "target_old": old[0],
            "output": output,
            "logp_new": new_logp,
            "logp_old": old_logp,
            "matched_new": match.new,
            "matched_old": match.old,
            "exact_new": match.exact_new,
            "exact_old": match.exact_old,
        }
