"""Retrieval: which facts stand before a question, what the model is asked, and how rounds hand facts on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from one_worker import MODEL, taken
from tiny import tiny_model

from corsa.config import EvaluationConfig, InContextConfig
from corsa.data.edit import Edit
from corsa.errors import CorsaError
from corsa.evaluation.predict import Predictor, Taught
from corsa.evaluation.retrieval import FACTS, Fact, Memory, Retrieval
from corsa.experiments.base import Experiment
from corsa.experiments.planner import Facts, Planner
from corsa.flow import Step
from corsa.methods import METHODS
from corsa.models.encoding import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = Memory(
    (
        Fact("norway", "Who leads Norway?", "Anna Berg"),
        Fact("bremen", "Which river flows through Bremen?", "the Elbe"),
        Fact("acme", "When was the Acme Company founded?", "1911"),
        Fact("tower", "Which town is the old tower in?", "Newtown"),
    ),
    2,
)
QUESTIONS = [
    "Who is the leader of Norway?",
    "What river is in Bremen?",
    "Which town is the old tower in?",
    "How are you?",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", 49152)


def literal(model: Any, encoder: Encoder, question: str, memory: Memory) -> list[Fact]:
    """The nearest facts in numpy, the nearest one last: cosine of mean hidden states, minus their mean over facts."""

    def embedding(text: str) -> np.ndarray:
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return found[0].mean(0).double().numpy()

    asked = np.stack([embedding(fact.question) for fact in memory.facts])
    centred, query = asked - asked.mean(0), embedding(question) - asked.mean(0)
    cosine = centred @ query / np.linalg.norm(centred, axis=1) / np.linalg.norm(query)
    return [memory.facts[i] for i in np.argsort(cosine)[-memory.count :]]


def test_the_nearest_facts_stand_before_a_question(model: Any, encoder: Encoder) -> None:
    found = Retrieval(MEMORY, model, encoder, batch=3)(QUESTIONS)
    expected = []
    for question in QUESTIONS:
        facts = literal(model, encoder, question, MEMORY)
        expected.append("".join(f"{fact.question}\nA: {fact.answer}\nQ: " for fact in facts) + question)
    assert found == expected
    assert found[2].endswith("Which town is the old tower in?\nA: Newtown\nQ: Which town is the old tower in?")
    text = encoder.tokenizer.decode(encoder.prompt(found[2]))
    assert text.startswith("Q: ")
    assert text.endswith("\nA: Newtown\nQ: Which town is the old tower in?\nA:")


def test_a_chat_has_the_facts_in_its_turn(model: Any, encoder: Encoder) -> None:
    chat = Encoder(encoder.tokenizer, "chat")
    (found,) = Retrieval(MEMORY, model, chat, batch=3)(QUESTIONS[2:3])
    assert found.startswith("Facts:\n")
    assert found.endswith("\nWhich town is the old tower in? Newtown\n\nWhich town is the old tower in?")


def test_a_small_or_empty_memory(model: Any, encoder: Encoder) -> None:
    one = Memory(MEMORY.facts[:1], 4)
    assert Retrieval(one, model, encoder, 8)(["A?"]) == ["Who leads Norway?\nA: Anna Berg\nQ: A?"]
    assert Retrieval(Memory((), 4), model, encoder, 8)(["A?", "B?"]) == ["A?", "B?"]


def test_the_latest_fact_of_a_chain_and_of_a_question_wins(tmp_path: Path) -> None:
    later = [
        Fact("norway", "Who leads Norway today?", "Olaf Lund"),
        Fact("x", "Which river flows through Bremen?", "the Weser"),
    ]
    found = MEMORY.updated(later)
    assert [fact.answer for fact in found.facts] == ["1911", "Newtown", "Olaf Lund", "the Weser"]
    found.save(tmp_path / FACTS)
    assert Memory.load(tmp_path / FACTS) == found


def test_a_predictor_asks_the_texts_and_reports_the_questions(model: Any, encoder: Encoder) -> None:
    edits = [
        Edit.build(
            id=fact.chain, prompt=fact.question, target_new=fact.answer, target_old="none", paraphrases=["Say it?"]
        )
        for fact in MEMORY.facts
    ]
    asked = [Taught(edit, 1, "") for edit in edits]
    plain = Predictor(model, encoder, EvaluationConfig(new_tokens=3), torch.device("cpu"), batch=4)
    given = Predictor(
        model, encoder, plain.config, plain.device, batch=4, context=Retrieval(MEMORY, model, encoder, batch=4)
    )
    rows = given.ask(asked)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in plain.ask(asked)]
    texts = Retrieval(MEMORY, model, encoder, batch=4)([row["prompt"] for row in rows])
    assert [row["output"] for row in rows] == plain.answers(texts)
    ids = [*encoder.prompt(texts[0]), *encoder.answer(edits[0].target_new)]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(encoder.prompt(texts[0]))
    expected = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
    assert rows[0]["logp_new"] == pytest.approx(expected, rel=1e-4)


# Rounds


def chains(planner: Planner[Experiment], taught: Facts, schedule: Step) -> list[Step]:
    """Two rounds, and the answers of the second one's model asked once more."""
    rounds = planner.chain("in-context", 0, taught, schedule, rounds=(1, 2))
    return [*rounds, planner.answers("again", taught, schedule, rounds[1], round_=2)]


def test_rounds_hand_on_the_facts_that_hold(tmp_path: Path) -> None:
    store, steps, failed = taken(tmp_path, chains, in_context=InContextConfig(facts=1))
    assert failed == {}
    first, second, again = (store.artifact(step.fingerprint) for step in steps)
    memories = [Memory.load(found.local(FACTS)) for found in (first, second)]
    assert [len(memory.facts) for memory in memories] == [first.metrics["facts"], second.metrics["facts"]] == [4, 4]
    answers = [{fact.chain: fact.answer for fact in memory.facts} for memory in memories]
    asked = pd.read_parquet(second.local("predictions.parquet"))
    assert {chain: answers[1][chain] for chain in asked.chain} == answers[1]
    edits = asked[asked.kind == "edit"]
    assert dict(zip(edits.chain, edits.answer, strict=True)) == answers[1], "the facts that hold after the round"
    revised = set(asked[asked.learnt == 2].chain)
    assert revised
    assert {chain for chain in answers[0] if answers[0][chain] != answers[1][chain]} == revised
    repeated = pd.read_parquet(again.local("predictions.parquet"))
    assert repeated.output.tolist() == asked.output.tolist()
    assert repeated.logp_new.dropna().tolist() == pytest.approx(asked.logp_new.dropna().tolist())


def test_it_refuses_what_it_cannot_do() -> None:
    assert set(METHODS["in-context"].refuses) == {"adapter", "programs", "routing", "specificity"}
    planner = Planner.of(Experiment(model=MODEL, limit=2), "")
    taught = planner.facts()
    schedule = planner.schedule(taught)
    step = planner.round("in-context", 0, taught, schedule)
    with pytest.raises(CorsaError, match="in-context cannot be routed: it changes no weight"):
        planner.routed("in-context", "oracle", taught, schedule, [taught], [step])
