"""Predictions: greedy generation compared with transformers, and the rows of the predictions table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny import CPU, FAMILIES, LORA, SLIDING, shaken, tiny_model

from corsa.algorithm.logprobs import answer_logprobs
from corsa.algorithm.packing import Triplet, pack
from corsa.config import EvaluationConfig, ModelConfig, Placement
from corsa.config.steps import AnchorsConfig, SanityQuestionsConfig
from corsa.data.edit import Edit
from corsa.evaluation.anchor_questions import anchor_questions
from corsa.evaluation.generation import generate, newline_tokens
from corsa.evaluation.predict import PREDICTIONS, Predictor, Taught
from corsa.evaluation.sanity_questions import sanity_questions
from corsa.experiments.kinds import ROUND
from corsa.flow import Step, Store
from corsa.flow.task import Task
from corsa.lora.flat import Lora
from corsa.models.encoding import Encoder
from corsa.training.rounds import take_rounds
from corsa.training.worker_context import WorkerContext
from corsa.training.worker_group import WorkerGroup

pytestmark = pytest.mark.usefixtures("one_thread")

# Generation


def prompts(count: int = 9) -> list[list[int]]:
    """Prompts of 1 to 14 tokens, unsorted."""
    random = np.random.default_rng(7)
    return [random.integers(10, 1000, n).tolist() for n in random.permutation(np.linspace(1, 14, count).astype(int))]


@pytest.fixture(scope="module", params=[*FAMILIES, "sliding"])
def model(request: pytest.FixtureRequest) -> Any:
    """An edited tiny model of each family, and one whose attention window is shorter than most prompts."""
    found = tiny_model("gemma", **SLIDING) if request.param == "sliding" else tiny_model(request.param)
    shaken(Lora(found, LORA))
    return found


def theirs(model: Any, prompt: Sequence[int], stops: torch.Tensor, new_tokens: int) -> list[int]:
    """What transformers generates for a single prompt, without the final end token."""
    ids = torch.tensor([prompt])
    ends = stops.nonzero()[:, 0].tolist()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[:-1] if out and out[-1] in ends else out


def ours(model: Any, asked: Sequence[Sequence[int]], stops: torch.Tensor, new_tokens: int, batch: int) -> list[Any]:
    return generate(model, asked, stops=stops, new_tokens=new_tokens, batch=batch, device=CPU)


def no_stops(size: int = 1024) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool)


def test_batched_generation_is_transformers_own(model: Any) -> None:
    expected = [theirs(model, p, no_stops(), 8) for p in prompts()]
    assert len({tuple(e) for e in expected}) > 5, "outputs that hardly differ would show little"
    assert all(len(e) == 8 for e in expected)
    for batch in (4, 16):
        assert ours(model, prompts(), no_stops(), 8, batch) == expected


def test_an_answer_ends_before_the_first_token_that_ends_it(model: Any) -> None:
    endless = ours(model, prompts(), no_stops(), 8, 16)
    stops = no_stops()
    firsts = {output[0] for output in endless[1:]}
    for i, output in enumerate(endless):  # answers end after 0, 1, 2, ... tokens, while others continue
        stops[[t for t in output[i % 6 :] if t not in firsts or i == 0][:1]] = True
    expected = [theirs(model, p, stops, 8) for p in prompts()]
    assert len({len(e) for e in expected}) >= 4
    assert [] in expected
    for batch in (1, 4, 16):
        assert ours(model, prompts(), stops, 8, batch) == expected


def test_no_answer_is_longer_than_asked(model: Any) -> None:
    assert ours(model, prompts(3), no_stops(), 1, 16) == [theirs(model, p, no_stops(), 1) for p in prompts(3)]


def test_nothing_is_generated_for_no_prompt(model: Any) -> None:
    assert ours(model, [], no_stops(), 8, 16) == []


def test_a_token_that_the_tokenizer_does_not_know_ends_an_answer() -> None:
    """Models have more rows in their embedding than their tokenizer has tokens."""
    model = tiny_model()
    (output,) = ours(model, [[5, 6, 7]], no_stops(), 8, 1)
    known = output[0] + 1
    end = next((i for i, token in enumerate(output) if token >= known), len(output))
    assert ours(model, [[5, 6, 7]], no_stops(known), 8, 1) == [output[:end]]
    assert 0 < end < 8


def test_newline_tokens_are_those_with_a_newline_in_them(encoder: Encoder) -> None:
    stops = newline_tokens(encoder.tokenizer)
    assert len(stops) == len(encoder.tokenizer)
    for text, expected in (("\n", True), ("\n\n", True), (" Paris", False), (".", False)):
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [bool(stops[i]) for i in ids] == [expected] * len(ids)
    assert not stops[encoder.tokenizer.eos_token_id], "the end token is not of a line"
    assert 0 < int(stops.sum()) < 1000


# Rows


def edits() -> list[Taught]:
    """Two updates of one fact, and another fact. Both updates have the same wordings."""
    wordings = ["Acme is led by", "Who is Acme's chief?", "The head of Acme is"]
    first = Edit.build(
        id="x/a/1",
        chain="x/a",
        prompt="Who leads Acme?",
        target_new="Bo Berg",
        target_old="Al Ahn",
        aliases_new=["B. Berg"],
        aliases_old=["Ahn"],
        paraphrases=wordings,
        neighbors=[("Who leads Umbrella?", "Di Dahl", ["D. Dahl"]), ("Who leads Initech?", "Ed Eng", [])],
        history=["Who led Acme before?"],
    )
    second = Edit.build(
        id="x/a/2",
        chain="x/a",
        round=2,
        prompt="Who leads Acme?",
        target_new="Cy Cole",
        target_old="Bo Berg",
        paraphrases=wordings[:2],
        neighbors=[("Who leads Umbrella?", "Di Dahl", [])],
    )
    third = Edit.build(id="x/b", prompt="Where is the Louvre?", target_new="Rome", target_old="Paris")
    return [Taught(first, 1, "update"), Taught(second, 2, "update"), Taught(third, 1, "evaluation")]


@pytest.fixture(scope="module")
def speaker(encoder: Encoder) -> Any:
    """A tiny model with the tokenizer's whole vocabulary."""
    found = tiny_model(vocabulary=len(encoder.tokenizer))
    shaken(Lora(found, LORA))
    return found


@pytest.fixture
def predictor(speaker: Any, encoder: Encoder) -> Callable[..., Predictor]:
    def make(batch: int = 16, packed: bool = True, **fields: Any) -> Predictor:
        return Predictor(speaker, encoder, EvaluationConfig(new_tokens=4, **fields), CPU, batch, packed)

    return make


def test_rows_are_those_of_the_predictions_table(predictor: Callable[..., Predictor]) -> None:
    rows = predictor().ask(edits())
    labels = {"method": "corsa", "seed": 0, "trained": 2}
    assert all({*labels, *row} == set(PREDICTIONS.names) for row in rows)
    table = pa.Table.from_pylist([labels | row for row in rows], schema=PREDICTIONS)
    assert table.to_pylist() == [labels | row for row in rows]
    nullable = {"logp_new", "logp_old"}
    assert all(table[name].null_count == 0 for name in PREDICTIONS.names if name not in nullable)


def test_answers_are_counted_while_they_come(predictor: Callable[..., Predictor]) -> None:
    told: list[tuple[int, int]] = []
    asking = predictor(batch=2)
    asking.told = lambda done, of: told.append((done, of))
    assert len(asking.answers(["Who?", "Where?", "When?"])) == 3
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize(("kind", "of"), [(SanityQuestionsConfig, sanity_questions), (AnchorsConfig, anchor_questions)])
def test_steps_that_ask_everyday_questions_say_how_far_they_are(kind: Any, of: Any, tmp_path: Path) -> None:
    config, questions = kind(model=ModelConfig(name="random:tiny-llama"), digest="d", new_tokens=1), len(of())
    posted: list[dict[str, Any]] = []

    class Board:
        def post(self, line: Mapping[str, Any]) -> None:
            posted.append(dict(line))

    context = WorkerContext(WorkerGroup(0, 1, CPU), Placement(threads=1, probe_batch=20), {})
    assert take_rounds([Task(Step("asked", ROUND, config), Store(tmp_path))], context, Board()) == {}
    counts = [line["answered"] for line in posted if line.get("answered") and line["phase"] == "evaluating"]
    assert counts == sorted(set(counts))
    assert (len(counts) >= questions // 20, counts[-1]) == (True, questions)
    assert {line["probes"] for line in posted if line.get("answered")} == {questions}


def test_every_wording_is_asked_once_in_the_order_of_the_probes(predictor: Callable[..., Predictor]) -> None:
    rows = predictor().ask(edits())
    assert [(row["edit"], row["kind"], row["probe"], row["wording"]) for row in rows] == [
        ("x/a/1", "edit", 0, 0),
        ("x/a/1", "paraphrase", 1, 0),
        ("x/a/1", "paraphrase", 1, 1),
        ("x/a/1", "paraphrase", 1, 2),
        ("x/a/1", "neighbor", 2, 0),
        ("x/a/1", "neighbor", 3, 0),
        ("x/a/1", "history", 4, 0),
        ("x/a/2", "edit", 0, 0),
        ("x/a/2", "paraphrase", 1, 0),
        ("x/a/2", "paraphrase", 1, 1),
        ("x/a/2", "neighbor", 2, 0),
        ("x/b", "edit", 0, 0),
    ]
    first, neighbor, history, third = rows[0], rows[4], rows[6], rows[11]
    assert (first["chain"], first["learnt"], first["part"]) == ("x/a", 1, "update")
    assert (first["prompt"], first["answer"], first["target_old"]) == ("Who leads Acme?", "Bo Berg", "Al Ahn")
    assert (neighbor["prompt"], neighbor["answer"], neighbor["target_old"]) == ("Who leads Umbrella?", "Di Dahl", "")
    assert (history["prompt"], history["answer"], history["target_old"]) == ("Who led Acme before?", "Al Ahn", "")
    assert (third["chain"], third["learnt"], third["part"]) == ("x/b", 1, "evaluation")


def test_the_paper_s_protocol_asks_what_it_counts_alone(predictor: Callable[..., Predictor]) -> None:
    full = predictor().ask(edits())
    paper = predictor(protocol="paper").ask(edits())
    counted = [row for row in full if row["kind"] == "edit" or (row["kind"] == "paraphrase" and row["wording"] == 0)]
    assert paper == counted
    assert len(paper) == 5 < len(full)


def test_a_wording_that_recurs_is_generated_once(
    predictor: Callable[..., Predictor], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def spy(model: Any, prompts: Sequence[list[int]], **rest: Any) -> list[list[int]]:
        asked.extend(prompts)
        assert rest["new_tokens"] == 4
        assert rest["batch"] == 16
        stops = rest["stops"]
        assert bool(stops[encoder.tokenizer.eos_token_id])
        assert bool(stops[encoder.tokenizer("\n", add_special_tokens=False)["input_ids"][0]])
        return generate(model, prompts, **rest)

    monkeypatch.setattr("corsa.evaluation.predict.generate", spy)
    rows = predictor().ask(edits())
    wordings = dict.fromkeys(row["prompt"] for row in rows)
    assert len(wordings) == 8 < len(rows)
    assert asked == [encoder.prompt(w) for w in wordings]
    for wording in wordings:
        assert len({row["output"] for row in rows if row["prompt"] == wording}) == 1


def test_outputs_are_the_greedy_continuations(
    predictor: Callable[..., Predictor], speaker: Any, encoder: Encoder
) -> None:
    stops = newline_tokens(encoder.tokenizer).clone()
    stops[encoder.tokenizer.eos_token_id] = True
    row = predictor().ask(edits()[2:])[0]
    ids = theirs(speaker, encoder.prompt("Where is the Louvre?"), stops, 4)
    assert row["output"] == encoder.tokenizer.decode(ids).strip()
    assert row["output"]


@pytest.mark.parametrize(("batch", "packed"), [(16, True), (2, True), (16, False)])
def test_both_answers_are_scored_on_the_edit_and_the_first_paraphrase(
    predictor: Callable[..., Predictor], speaker: Any, encoder: Encoder, batch: int, packed: bool
) -> None:
    by_id = {t.edit.id: t.edit for t in edits()}
    for row in predictor(batch, packed).ask(edits()):
        if row["kind"] not in ("edit", "paraphrase") or row["wording"] > 0:
            assert (row["logp_new"], row["logp_old"]) == (None, None)
            continue
        edit = by_id[row["edit"]]
        t = Triplet(encoder.prompt(row["prompt"]), encoder.answer(edit.target_new), encoder.answer(edit.target_old))
        with torch.no_grad():
            new, old = answer_logprobs(speaker, pack([t], packed=False), 1)[:, 0].tolist()
        assert (row["logp_new"], row["logp_old"]) == pytest.approx((new, old), rel=1e-5)


def test_an_output_is_matched_under_every_rule(
    predictor: Callable[..., Predictor], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {
        "Who leads Acme?": " Bo Berg",
        "Acme is led by": " I think Ahn",
        "Who is Acme's chief?": " B. Berg, formerly Al Ahn",
        "Who leads Umbrella?": " D. Dahl.",
        "Who led Acme before?": " Ahn",
    }
    answers = {tuple(encoder.prompt(w)): text for w, text in said.items()}

    def speak(model: Any, prompts: Sequence[list[int]], **rest: Any) -> list[list[int]]:
        texts = [answers.get(tuple(p), " nobody") for p in prompts]
        return [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    monkeypatch.setattr("corsa.evaluation.predict.generate", speak)
    rows = predictor().ask(edits())

    def found(edit: str, probe: int, wording: int = 0) -> tuple[str, bool, bool, bool, bool]:
        (row,) = [r for r in rows if (r["edit"], r["probe"], r["wording"]) == (edit, probe, wording)]
        return (row["output"], row["matched_new"], row["matched_old"], row["exact_new"], row["exact_old"])

    assert found("x/a/1", 0) == ("Bo Berg", True, False, True, False)
    assert found("x/a/2", 0) == ("Bo Berg", False, True, False, True)  # by then it is the old answer
    assert found("x/a/1", 1) == ("I think Ahn", False, True, False, False)
    assert found("x/a/1", 1, 1) == ("B. Berg, formerly Al Ahn", True, True, False, False)
    assert found("x/a/1", 1, 2) == ("nobody", False, False, False, False)
    assert found("x/a/1", 2) == ("D. Dahl.", True, False, True, False)
    assert found("x/a/1", 4) == ("Ahn", True, False, True, False)


def test_asking_leaves_the_newline_tokens_as_they_are(predictor: Callable[..., Predictor], encoder: Encoder) -> None:
    """The predictors share the encoded prompts; each predictor adds its own end token."""
    predictor().ask(edits()[2:])
    assert not newline_tokens(encoder.tokenizer)[encoder.tokenizer.eos_token_id]


def test_a_worker_without_facts_asks_nothing(predictor: Callable[..., Predictor]) -> None:
    assert predictor().ask([]) == []
