"""Parts of the data, and the routers that choose between their adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import tiny_model

from corsa.config import ModelConfig
from corsa.data.benchmarks import read
from corsa.data.splits import describe, split
from corsa.errors import CorsaError
from corsa.lora.routing import EmbeddingRouter, PromptRouter
from corsa.models.encoding import Encoder
from corsa.models.loading import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

EDITS = read("world_facts", limit=40, rounds=2).edits


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(ModelConfig()), "qa")


@pytest.mark.parametrize("parts", [2, 3, 7, 40])
def test_parts_hold_every_chain_once_and_are_about_as_large(parts: int) -> None:
    found = split(EDITS, parts)
    assert sorted(e.id for part in found for e in part) == sorted(e.id for e in EDITS)
    chains = [{e.chain for e in part} for part in found]
    assert sum(map(len, chains)) == len(set().union(*chains)) == 40
    assert max(map(len, chains)) - min(map(len, chains)) <= 1


def test_relations_stay_together_as_far_as_sizes_allow() -> None:
    found = split(EDITS, 4)
    shared = sum(len({e.relation for e in part}) for part in found) - len({e.relation for e in EDITS})
    assert shared <= 3, "a relation is cut at most where a part ends"


@pytest.mark.parametrize("parts", [1, 41])
def test_too_few_and_too_many_parts_are_refused(parts: int) -> None:
    with pytest.raises(CorsaError, match=f"40 facts cannot be split in {parts} parts: give --parts 2 to 40"):
        split(EDITS, parts)


def test_a_description_names_relations_and_subjects_and_is_short() -> None:
    text = describe(split(EDITS, 4)[0])
    assert EDITS[0].subject in text
    assert len(text) <= 240
    bare = [e.model_copy(update={"subject": ""}) for e in EDITS]
    assert EDITS[0].prompt in describe(bare)


def test_cached_scores_are_those_of_whole_prompts(encoder: Encoder) -> None:
    model: Any = load_model(ModelConfig(name="random:tiny-llama"))
    router = PromptRouter(model, encoder, ["rivers", "towns of the north", "kings"], batch=2)
    queries = ["Who was king then?", "Which river?", "Where is the oldest town of all?"]
    for query, scores in zip(queries, router.scores(queries), strict=True):
        ids = router._shared + router._tokens(f"Question: {query}\nCollection:")
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(scores, logp[router._letters], atol=1e-4, rtol=1e-4)


def test_a_query_goes_to_the_part_it_resembles(encoder: Encoder) -> None:
    """Routes questions of two kinds on the embedded model, in other wordings than those taught."""
    model = load_model(ModelConfig())
    taught = [
        ["Who is the president of France?", "Who is the prime minister of Spain?", "Who leads the government of Peru?"],
        ["What does a litre of milk weigh?", "How long is a marathon?", "How tall is the Eiffel Tower?"],
    ]
    router = EmbeddingRouter(model, encoder, taught, batch=8)
    asked = ["Who is the chancellor of Germany?", "How deep is the lake?", "Who is king of Norway?", "How long is it?"]
    assert router.route(asked) == [0, 1, 0, 1]


def test_more_parts_than_letters_and_letters_that_are_no_tokens_are_refused(encoder: Encoder) -> None:
    model = tiny_model()
    with pytest.raises(CorsaError, match="27 parts"):
        PromptRouter(model, encoder, ["x"] * 27, batch=1)
    bytewise = cast(Encoder, SimpleNamespace(tokenizer=lambda text, **_: {"input_ids": list(text.encode())}))
    with pytest.raises(CorsaError, match="use the embedding router"):
        PromptRouter(model, bytewise, ["x", "y"], batch=1)
