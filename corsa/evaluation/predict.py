"""Asks an edited model its probes and makes the predictions table, one row per wording and draw. All metrics use it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.config import EvaluationConfig
from corsa.data.edit import Edit, Probe
from corsa.evaluation.generation import end_tokens, generate, newline_tokens, sample
from corsa.evaluation.matching import contains, first_line, matches, plain_matches, several_lines, words
from corsa.evaluation.shallow_edit_probes import OptionsProbe
from corsa.models.encoding import Encoder

PREDICTIONS = pa.schema(
    [
        ("method", pa.string()),
        ("seed", pa.int32()),
        ("trained", pa.int32()),  # the model was asked after this round; 0: the base model
        ("edit", pa.string()),
        ("chain", pa.string()),
        ("learnt", pa.int32()),  # the round in which the edit is taught
        ("part", pa.string()),  # "update", or "evaluation": taught in round 1 and never revised
        ("kind", pa.string()),
        ("probe", pa.int32()),
        ("wording", pa.int32()),
        ("draw", pa.int32()),  # from 0; greedy answers have one
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("target_old", pa.string()),
        ("output", pa.string()),
        # nats, summed over the answer's tokens; only for the edit wording and the first paraphrase, in the first draw
        ("logp_new", pa.float64()),
        ("logp_old", pa.float64()),
        ("words_new", pa.bool_()),  # rule `words`
        ("words_old", pa.bool_()),
        ("matched_new", pa.bool_()),  # rule `contains`
        ("matched_old", pa.bool_()),
        ("exact_new", pa.bool_()),  # rule `exact`
        ("exact_old", pa.bool_()),
        ("weight", pa.float64()),  # facts that this one stands for: more than 1 in a sample of the earlier facts
    ]
)
"""One row per wording and draw."""

_OF_THE_FACT = ("edit", "paraphrase", "template")
"""Kinds of probes whose old answer is the edit's."""

TEMPERATURE, TOP_P = 0.7, 1.0
"""How the protocol `authors` samples, as the published evaluation code does."""


def with_values(rows: pa.Table, **values: Any) -> pa.Table:
    """The rows with other columns: each named one has the same value in every row, in the type that it had."""
    for name, value in values.items():
        field = rows.schema.field(name)
        same = pa.repeat(pa.scalar(value, field.type), len(rows))
        rows = rows.set_column(rows.schema.get_field_index(name), field, same)
    return rows


class Mode(NamedTuple):
    """How to generate an answer. `tokens`: most tokens; `lines`: it may have several lines (newlines do not end it);
    `other`: the question is asked in the other prompt template.
    """

    tokens: int
    lines: bool
    other: bool = False


@dataclass(frozen=True)
class Taught:
    """An edit with its place in the scenario: the round that teaches it, and its part ("update" or "evaluation").

    weight: the number of facts that it stands for, if a sample of the earlier facts is asked.
    """

    edit: Edit
    learnt: int
    part: str
    weight: float = 1.0


@dataclass
class Predictor:
    """Asks one model on one worker. `batch`: most probes generated or scored together. `seed`: the seed of the draws if
    the protocol samples. `told`: called with the number of answered prompts and their total. `context`: makes the texts
    that the model is asked in place of questions (`corsa.evaluation.retrieval`).
    """

    model: Any
    encoder: Encoder
    config: EvaluationConfig
    device: torch.device
    batch: int
    packed: bool = True
    seed: int = 0
    told: Callable[[int, int], None] = lambda answered, of: None
    context: Callable[[Sequence[str]], list[str]] = list

    def __post_init__(self) -> None:
        self._stops: tuple[Tensor, Tensor] | None = None  # for answers of one line, and of several

    def ask(self, taught: Sequence[Taught], only: Container[str] | None = None) -> list[dict[str, Any]]:
        """The rows of the predictions table for these edits, without method, seed and round.

        `only`: ask only these prompts; by default all.
        """
        wordings = [
            (t, p, w)
            for t in taught
            for p, w in self._asked(t.edit)
            if only is None or t.edit.probes[p].prompts[w] in only
        ]
        modes = [self._mode(t.edit, t.edit.probes[p]) for t, p, _ in wordings]
        asked: dict[Mode, list[str]] = {}
        for mode in dict.fromkeys(modes):
            own = [t.edit.probes[p].prompts[w] for (t, p, w), m in zip(wordings, modes, strict=True) if m == mode]
            asked[mode] = list(dict.fromkeys(own))  # the edits of a chain have the same wordings
        outputs: dict[tuple[Mode, str, int], str] = {}
        total = self.config.draws * sum(map(len, asked.values()))
        for mode, prompts in asked.items():
            for draw in range(self.config.draws):
                before = len(outputs)
                found = self._generated(
                    prompts,
                    mode,
                    draw if self.config.sampled else None,
                    lambda done, before=before: self.told(before + done, total),
                )
                outputs |= {(mode, p, draw): output for p, output in zip(prompts, found, strict=True)}
        scores = self._scores(wordings)
        return [
            self._row(t, p, w, draw, outputs[mode, t.edit.probes[p].prompts[w], draw], scores)
            for (t, p, w), mode in zip(wordings, modes, strict=True)
            for draw in range(self.config.draws)
        ]

    def _asked(self, edit: Edit) -> list[tuple[int, int]]:
        """The probes and wordings of an edit that the protocol asks."""
        first = next((p for p, probe in enumerate(edit.probes) if probe.kind == "paraphrase"), None)
        return [
            (p, w)
            for p, probe in enumerate(edit.probes)
            if probe.kind in self.config.kinds and (probe.kind != "template" or self.has_other_template)
            for w in range(len(probe.prompts))
            if self.config.protocol == "full" or probe.kind != "paraphrase" or (p, w) == (first, 0)
        ]

    def _mode(self, edit: Edit, probe: Probe) -> Mode:
        """How a probe is answered. A newline ends answers that should have one line."""
        if self.config.sampled:
            return Mode(self.config.answer_tokens, lines=True)
        if probe.kind == "multihop":
            return Mode(self.config.reasoning_tokens, lines=True)
        old = (edit.target_old, *edit.aliases_old) if probe.kind in _OF_THE_FACT else ()
        lines = several_lines((probe.answer, *probe.aliases, *old))
        return Mode(self.config.answer_tokens, lines, other=probe.kind == "template")

    @property
    def has_other_template(self) -> bool:
        """Whether the model can be asked in the other prompt template: for chat, its tokenizer must have one."""
        return self.encoder.template == "chat" or bool(self.encoder.tokenizer.chat_template)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """The model's greedy one-line answers."""
        mode = Mode(self.config.new_tokens, lines=False)
        return self._generated(prompts, mode, None, lambda done: self.told(done, len(prompts)))

    def _generated(
        self, questions: Sequence[str], mode: Mode, draw: int | None, told: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The answers to questions. `draw`: number of the sampled answer; None: greedy answers. `told`: called with the
        number of finished questions.
        """
        if not questions:
            return []
        thinking = self.config.thinking
        encoder = self.encoder
        if mode.other:
            encoder = replace(encoder, template="qa" if encoder.template == "chat" else "chat", answer_end="end_token")
        prompts = encoder.prompts(self.context(questions), thinking)
        seeds = None if draw is None else [(self.seed, zlib.crc32(question.encode()), draw) for question in questions]
        tokens = mode.tokens + thinking * self.config.thinking_tokens
        ids = self._continued(prompts, tokens, mode.lines or thinking, seeds, told)
        texts = [encoder.read(answer, thinking).strip() for answer in ids]
        return texts if mode.lines else [first_line(text) for text in texts]

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        lines: bool,
        seeds: Sequence[tuple[int, int, int]] | None,
        told: Callable[[int], None],
    ) -> list[list[int]]:
        """The continuation of each prompt, token ids. `lines`: a newline does not end it. `seeds`: those of sampled
        answers; None: greedy ones.
        """
        how: dict[str, Any] = {
            "stops": self.stops(lines),
            "new_tokens": new_tokens,
            "batch": self.batch,
            "device": self.device,
            "told": told,
        }
        if seeds is None:
            return generate(self.model, prompts, **how)
        return sample(self.model, prompts, seeds=seeds, temperature=TEMPERATURE, top_p=TOP_P, **how)

    def stops(self, lines: bool = False) -> Tensor:
        """The tokens that end an answer: (V,) bool. `lines`: the answer may have several lines."""
        if self._stops is None:
            ends = end_tokens(self.model, self.encoder.tokenizer)
            self._stops = (newline_tokens(self.encoder.tokenizer) | ends, ends)
        return self._stops[lines]

    @torch.no_grad()
    def _scores(self, wordings: Sequence[tuple[Taught, int, int]]) -> dict[tuple[str, int, int], tuple[float, float]]:
        """Log p of both answers (nats), without thinking, for the edit wording and the first paraphrase."""
        scored = [(t, p, w) for t, p, w in wordings if w == 0 and t.edit.probes[p].kind in ("edit", "paraphrase")]
        asked = self.context([t.edit.probes[p].prompts[w] for t, p, w in scored])
        triplets = [
            Triplet(
                self.encoder.prompt(question),
                self.encoder.answer(t.edit.target_new),
                self.encoder.answer(t.edit.target_old),
            )
            for question, (t, _, _) in zip(asked, scored, strict=True)
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
        self,
        taught: Taught,
        p: int,
        w: int,
        draw: int,
        output: str,
        scores: dict[tuple[str, int, int], tuple[float, float]],
    ) -> dict[str, Any]:
        edit, probe = taught.edit, taught.edit.probes[p]
        old = (edit.target_old, edit.aliases_old) if probe.kind in _OF_THE_FACT else ("", ())
        if self.config.protocol == "authors":
            match = plain_matches(output, probe.answer, old[0])
        else:
            match = matches(output, new=(probe.answer, probe.aliases), old=old)
        if isinstance(probe, OptionsProbe):
            given = [any(rule(output, name) for name in probe.wrong) for rule in (contains, words)]
            match = match._replace(new=match.new and not given[0], words_new=match.words_new and not given[1])
        new_logp, old_logp = scores.get((edit.id, p, w), (None, None)) if draw == 0 else (None, None)
        return {
            "edit": edit.id,
            "chain": edit.chain,
            "learnt": taught.learnt,
            "part": taught.part,
            "kind": probe.kind,
            "probe": p,
            "wording": w,
            "draw": draw,
            "prompt": probe.prompts[w],
            "answer": probe.answer,
            "target_old": old[0],
            "output": output,
            "logp_new": new_logp,
            "logp_old": old_logp,
            "words_new": match.words_new,
            "words_old": match.words_old,
            "matched_new": match.new,
            "matched_old": match.old,
            "exact_new": match.exact_new,
            "exact_old": match.exact_old,
            "weight": taught.weight,
        }
