"""The cost of MMLU if each subject's worked examples are computed once, compared with once per question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from corsa.config import ModelConfig, Placement
from corsa.evaluation.mmlu import LETTERS, MmluQuestions
from corsa.evaluation.multiple_choice import MultipleChoice
from corsa.models.loading import load_model, load_tokenizer
from corsa.perf.timeline import clock
from corsa.training.worker_group import WorkerGroup


@dataclass(frozen=True)
class MmluFigures:
    """Medians over the repetitions."""

    questions: int
    subjects: int
    questions_per_s: float
    recomputed_questions_per_s: float
    speedup: float
    tokens: int  # processed, padding included
    recomputed_tokens: int
    different_answers: int
    largest_difference: float  # of a letter's log-probability, nats
    threads: int
    clock: str
    device: str
    model: str
    dtype: str


def measure_mmlu(
    model: ModelConfig,
    questions: MmluQuestions,
    *,
    repeats: int,
    placement: Placement,
    cpu_time: bool,
    say: Callable[[str], None] = lambda line: None,
) -> MmluFigures:
    """Answer all questions both ways, alternating, `repeats` times."""
    group = WorkerGroup.join(placement)
    base, tokenizer = load_model(model, group.device), load_tokenizer(model)
    shared = MultipleChoice(base, tokenizer, group.device, placement.probe_batch)
    whole = replace(shared, share=False)
    now = clock(group.device, cpu_time)
    shared.answers(MmluQuestions(questions.subjects[:1]))  # to warm up
    seconds: dict[str, list[float]] = {"shared": [], "whole": []}
    passed: list[int] = []
    hook = base.register_forward_pre_hook(
        lambda module, args, inputs: passed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    ours, theirs, tokens, recomputed = [], [], 0, 0
    for number in range(1, repeats + 1):
        passed.clear()
        start = now()
        ours = shared.answers(questions)
        middle = now()
        tokens = sum(passed)
        theirs = whole.answers(questions)
        end = now()
        recomputed = sum(passed) - tokens
        seconds["shared"].append(middle - start)
        seconds["whole"].append(end - middle)
        say(f"{number}/{repeats}: {middle - start:.1f} s, recomputed {end - middle:.1f} s")
    hook.remove()
    pairs = list(zip(ours, theirs, strict=True))
    return MmluFigures(
        questions=len(pairs),
        subjects=len(questions.subjects),
        questions_per_s=len(pairs) / median(seconds["shared"]),
        recomputed_questions_per_s=len(pairs) / median(seconds["whole"]),
        speedup=median(w / s for s, w in zip(seconds["shared"], seconds["whole"], strict=True)),
        tokens=tokens,
        recomputed_tokens=recomputed,
        different_answers=sum(a["chosen"] != b["chosen"] for a, b in pairs),
        largest_difference=max(abs(a[f"logp_{x}"] - b[f"logp_{x}"]) for a, b in pairs for x in LETTERS),
        threads=torch.get_num_threads(),
        clock="cpu" if cpu_time else "wall",
        device=group.device.type,
        model=model.name,
        dtype=model.dtype,
    )
