"""Gates on capability: what is measured, how a change and its interval are computed, what fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_update_plan import options

from corsa.config import ModelConfig
from corsa.config.steps import HarnessConfig, PerplexityConfig
from corsa.editing import harness
from corsa.editing.gates import tasks_of
from corsa.editing.harness import measured_rows
from corsa.editing.options import Gates, differences
from corsa.editing.plan import plan_edit
from corsa.editing.thresholds import judged
from corsa.errors import CorsaError
from corsa.evaluation.capability import EVERYDAY, PERPLEXITY, changes, everyday, told
from corsa.evaluation.perplexity import text_logprobs
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model


def rows(measure: str, values: list[tuple[float, float]], high: bool) -> list[dict[str, Any]]:
    return [
        {"measure": measure, "item": str(i), "numerator": a, "denominator": b, "higher_is_better": high}
        for i, (a, b) in enumerate(values)
    ]


def test_the_perplexity_is_the_exponential_of_the_mean_and_its_rise_is_paired() -> None:
    random = np.random.default_rng(3)
    tokens = random.integers(50, 150, 40)
    before = tokens * random.normal(3.0, 0.3, 40)
    now = before + tokens * random.normal(0.1, 0.05, 40)
    (found,) = changes(
        rows(PERPLEXITY, list(zip(before, tokens, strict=True)), False),
        rows(PERPLEXITY, list(zip(now, tokens, strict=True)), False),
    )
    assert found["before"] == pytest.approx(math.exp(before.sum() / tokens.sum()))
    assert found["loss"] == pytest.approx(found["now"] / found["before"] - 1)
    # the ratio estimator's linearised variance, by hand
    ratio = (now - before).sum() / tokens.sum()
    residual = (now - before) - ratio * tokens
    error = math.sqrt(40 / 39 * (residual**2).sum()) / tokens.sum()
    half = stats.t.ppf(0.975, 39) * error
    assert (found["low"], found["high"]) == (
        pytest.approx(math.expm1(ratio - half), rel=0.02),
        pytest.approx(math.expm1(ratio + half), rel=0.02),
    )


def test_right_answers_are_compared_question_by_question() -> None:
    asked = [{"question": f"q{i}", "right_before": i < 30, "right": i < 24} for i in range(40)]
    (found,) = changes(everyday(asked, "right_before"), everyday(asked, "right"))
    assert (found["measure"], found["items"], found["before"], found["now"]) == (EVERYDAY, 40, 0.75, 0.6)
    differences_ = np.array([1.0] * 6 + [0.0] * 34)
    theirs = stats.ttest_1samp(differences_, 0).confidence_interval()
    assert (found["loss"], found["low"], found["high"]) == (
        pytest.approx(0.15),
        pytest.approx(theirs.low, abs=1e-9),
        pytest.approx(theirs.high, abs=1e-9),
    )
    assert told(found) == "0.75 before, 0.6 now: 15.0 % worse, 3.4 % to 26.6 % (40 items)"


def test_a_loss_above_the_bound_fails_and_nothing_measured_fails() -> None:
    metrics: dict[str, Any] = {"rows": [{"metrics": {}}]}
    change = {"items": 40, "before": 0.75, "now": 0.6, "low": 0.03, "high": 0.27}
    metrics["capability"] = [
        {"measure": EVERYDAY, "loss": 0.15, **change},
        {"measure": PERPLEXITY, "loss": 0.02, **change},
        {"measure": "gsm8k exact_match, none", "loss": 0.2, **change},
    ]
    found = {v.gate: v.passed for v in judged(Gates(gate=("capability",)), metrics)}
    assert found == {
        f"--gate capability, {EVERYDAY}, --max-loss": False,
        f"--gate capability, {PERPLEXITY}, --max-loss": True,
    }
    assert all(v.passed for v in judged(Gates(gate=("capability",), max_loss=0.2), metrics))
    (verdict,) = judged(Gates(gate=("lm-eval:gsm8k",)), metrics)
    assert not verdict.passed
    assert "NOT PASSED (0.75 before, 0.6 now" in str(verdict)
    (verdict,) = judged(Gates(gate=("lm-eval:gsm8k",)), metrics | {"capability": []})
    assert not verdict.passed
    assert "nothing to measure" in str(verdict)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness with two tasks."""
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    monkeypatch.setattr(harness, "known_tasks", lambda: ("gsm8k", "ifeval"))


def test_names_of_gates(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tasks_of(Gates(gate=("lm-eval:gsm8k", "ifeval"))) == ("gsm8k", "ifeval")
    assert tasks_of(Gates(gate=("capability",))) == ()
    with pytest.raises(CorsaError, match="unknown gate 'capabilty'"):
        tasks_of(Gates(gate=("capabilty",)))
    with pytest.raises(CorsaError, match="the harness has no task 'gms8k', did you mean 'gsm8k'; `lm-eval ls tasks`"):
        tasks_of(Gates(gate=("lm-eval:gms8k",)))
    with pytest.raises(CorsaError, match="--limit bounds the documents"):
        tasks_of(Gates(gate=("capability",), limit=3))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(CorsaError, match="pip install 'corsa\\[harness\\]'"):
        tasks_of(Gates(gate=("lm-eval:gsm8k",)))


def test_a_gate_adds_steps_and_changes_no_other(installed: None, tmp_path: Any) -> None:
    plain = plan_edit(options(tmp_path))
    gates = Gates(gate=("capability", "lm-eval:gsm8k"), limit=100)
    gated = plan_edit(options(tmp_path, gates=gates))
    assert gated.round.fingerprint == plain.round.fingerprint
    more = {name: step for name, step in gated.report.inputs.items() if name not in plain.report.inputs}
    kinds = [type(step.config) for step in more.values()]
    assert kinds == [PerplexityConfig, HarnessConfig] * 2
    assert [bool(step.inputs) for step in more.values()] == [False, False, True, True]
    assert {step.config.limit for step in more.values() if isinstance(step.config, HarnessConfig)} == {100}
    assert "--gate capability,lm-eval:gsm8k --limit 100" in gated.report.config.canonical()["command"]
    assert "capability" not in plain.report.config.canonical()
    assert "--max-loss" not in " ".join(differences(options(tmp_path, gates=gates)))


def test_a_task_of_ones_own_is_read_from_its_file_and_part_of_the_identity(installed: None, tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("{}")
    file = tmp_path / "own.yaml"
    file.write_text("task: own\ndataset_path: json\ndataset_kwargs: {data_files: {test: asked.jsonl, more: [none]}}\n")
    found = harness.own_task(str(file))
    assert found["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "asked.jsonl"), "more": ["none"]}}

    def measured(*tasks: str) -> HarnessConfig:
        plan = plan_edit(options(tmp_path, gates=Gates(gate=(f"lm-eval:{tasks[0]}", *tasks[1:]))))
        return next(s.config for s in plan.report.inputs.values() if isinstance(s.config, HarnessConfig))

    before = measured("gsm8k", str(file))
    assert (before.tasks, before.own) == (("gsm8k", str(file)), {str(file): found})
    assert "own" not in measured("gsm8k").canonical()
    file.write_text("task: own\nnum_fewshot: 2\n")
    assert measured("gsm8k", str(file)).own[str(file)]["num_fewshot"] == 2
    for text, reason in (("task: !function x.y", "is not plain YAML"), ("group: x", "describes no task")):
        file.write_text(text)
        with pytest.raises(CorsaError, match=f"--gate lm-eval: {file} {reason}"):
            measured(str(file))
    with pytest.raises(CorsaError, match=r"none\.yaml cannot be read"):
        measured(str(tmp_path / "none.yaml"))


def test_every_score_of_the_harness_s_documents_is_read() -> None:
    sample = {
        "doc_id": 7,
        "filter": "strict-match",
        "metrics": ["exact_match", "bypass"],
        "exact_match": 1.0,
        "bypass": 999,
    }
    found = measured_rows({"samples": {"gsm8k": [sample]}, "higher_is_better": {"gsm8k": {"bypass": False}}})
    assert [(row["measure"], row["item"], row["numerator"], row["higher_is_better"]) for row in found] == [
        ("gsm8k exact_match, strict-match", "7", 1.0, True),
        ("gsm8k bypass, strict-match", "7", 999.0, False),
    ]


@pytest.mark.usefixtures("one_thread")
def test_log_probabilities_are_transformers_own_loss(encoder: Encoder) -> None:
    model = load_model(ModelConfig(name="random:tiny-llama"))
    texts = ["The river flows past the old village.", "a", "Honey is made by bees."]
    for text, (nats, tokens) in zip(texts, text_logprobs(model, encoder, texts, "cpu"), strict=True):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        assert tokens == ids.shape[1] - 1
        if tokens:
            assert nats / tokens == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-4)
