"""Measures how fast probes are answered and scored, against `transformers.generate` in padded batches (same probes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from corsa.config import EvaluationConfig, ModelConfig, Placement
from corsa.data.edit import Edit
from corsa.evaluation.predict import Predictor, Taught
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer
from corsa.perf.timeline import clock
from corsa.training.worker_group import WorkerGroup

PADDED_BATCH = 32
"""Prompts per call of `transformers.generate`, in input order, padded to the longest."""


@dataclass(frozen=True)
class EvaluationFigures:
    """Medians over the repetitions."""

    probes: int  # distinct prompts
    probes_per_s: float
    transformers_probes_per_s: float
    speedup: float
    different_answers: int
    asked_s: float  # a full evaluation: answers, log-probabilities, matching
    asked_rows_per_s: float
    threads: int
    clock: str
    device: str
    model: str
    dtype: str


def measure_evaluation(
    model: ModelConfig,
    edits: Sequence[Edit],
    *,
    repeats: int,
    placement: Placement,
    cpu_time: bool,
    say: Callable[[str], None] = lambda line: None,
) -> EvaluationFigures:
    """Answer all probes of the edits `repeats` times, alternating with `transformers.generate`."""
    group, config = WorkerGroup.join(placement), EvaluationConfig()
    base, encoder = load_model(model, group.device), Encoder(load_tokenizer(model), model.template)
    predictor = Predictor(base, encoder, config, group.device, placement.probe_batch)
    prompts = list(dict.fromkeys(w for e in edits for p in e.probes if p.kind != "multihop" for w in p.prompts))
    now = clock(group.device, cpu_time)
    predictor.answers(prompts[:2])  # finds the tokens that end a line, once
    ours, theirs, different = [], [], 0
    for number in range(1, repeats + 1):
        start = now()
        answers = predictor.answers(prompts)
        middle = now()
        expected = _padded(base, encoder, predictor.stops(), config.new_tokens, prompts)
        end = now()
        ours.append(middle - start)
        theirs.append(end - middle)
        different = sum(a != e for a, e in zip(answers, expected, strict=True))
        say(f"{number}/{repeats}: {ours[-1]:.1f} s, transformers.generate {theirs[-1]:.1f} s")
    start = now()
    rows = predictor.ask([Taught(edit, 1, "") for edit in edits])
    asked = now() - start
    return EvaluationFigures(
        probes=len(prompts),
        probes_per_s=len(prompts) / median(ours),
        transformers_probes_per_s=len(prompts) / median(theirs),
        speedup=median(t / o for t, o in zip(theirs, ours, strict=True)),
        different_answers=different,
        asked_s=asked,
        asked_rows_per_s=len(rows) / asked,
        threads=torch.get_num_threads(),
        clock="cpu" if cpu_time else "wall",
        device=group.device.type,
        model=model.name,
        dtype=model.dtype,
    )


@torch.no_grad()
def _padded(model: Any, encoder: Encoder, stops: torch.Tensor, new_tokens: int, prompts: Sequence[str]) -> list[str]:
    """The same answers from the library's own loop: a batch runs until its last answer ends."""
    tokenizer = encoder.tokenizer
    pad, ends = tokenizer.eos_token_id, stops.nonzero()[:, 0].tolist()
    answers = []
    for start in range(0, len(prompts), PADDED_BATCH):
        rows = [encoder.prompt(p) for p in prompts[start : start + PADDED_BATCH]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=seen,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=pad,
        )
        for row in output[:, width:].tolist():
            length = next((i for i, token in enumerate(row) if stops[token]), len(row))
            answers.append(tokenizer.decode(row[:length], skip_special_tokens=True).strip())
    return answers
