"""Prompts with a common prefix: the prefix is computed once, and the results are those of each prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CPU, FAMILIES, LORA, SLIDING, shaken, tiny_model
from transformers import DynamicCache

from corsa.evaluation.generation import generate, sample
from corsa.evaluation.prefix_cache import batches, begin, common, families
from corsa.lora.flat import Lora

pytestmark = pytest.mark.usefixtures("one_thread")

NO_STOPS = torch.zeros(1024, dtype=torch.bool)


def wordings() -> list[list[int]]:
    """Prompts on three subjects, with prefixes of different length; one on a fourth; and one of a single token."""
    random = np.random.default_rng(11)

    def words(count: int) -> list[int]:
        return random.integers(10, 1000, count).tolist()

    made = [[*head, *words(n)] for head in (words(9), words(14), words(30)) for n in (1, 3, 5, 2)]
    made += [words(12), words(1)]
    return [made[i] for i in random.permutation(len(made))]


@pytest.fixture(scope="module", params=[*FAMILIES, "sliding", "wide"])
def model(request: pytest.FixtureRequest) -> Any:
    """An edited tiny model of each family; one with a window shorter than the prompts, one with a longer window."""
    change = {"sliding": SLIDING, "wide": SLIDING | {"sliding_window": 64}}.get(request.param)
    found = tiny_model(request.param) if change is None else tiny_model("gemma", **change)
    shaken(Lora(found, LORA))
    return found


class Counted:
    """A model that counts the positions it computes."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.positions = model, model.config, 0

    def __call__(self, input_ids: torch.Tensor, **rest: Any) -> Any:
        self.positions += input_ids.numel()
        return self.model(input_ids=input_ids, **rest)


def answered(model: Any, prompts: Sequence[Sequence[int]], batch: int, new_tokens: int = 6) -> list[list[int]]:
    return generate(model, prompts, stops=NO_STOPS, new_tokens=new_tokens, batch=batch, device=CPU)


def test_what_prompts_have_in_common_leaves_each_a_token_of_its_own() -> None:
    assert common([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6]]) == 2
    assert common([[1, 2, 3], [1, 2, 3]]) == 2
    assert common([[1, 2], [1, 2, 3]]) == 1
    assert common([[1], [2]]) == common([[1]]) == 0


def test_prompts_that_share_half_of_their_tokens_are_a_family() -> None:
    prompts = [[1, 2, 3, 4], [9, 9], [1, 2, 7], [5, 6, 7, 8], [5, 8, 7, 6], [9, 9]]
    found = families(prompts)
    assert sorted(map(sorted, found)) == [[0, 2], [1, 5], [3], [4]]
    assert next(f for f in found if 0 in f) == [2, 0], "the shortest first"


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 100])
def test_batches_hold_every_prompt_once_and_no_more_than_allowed(batch: int) -> None:
    prompts = wordings()
    found = [[i for family in together for i in family] for together in batches(prompts, batch)]
    assert sorted(i for rows in found for i in rows) == list(range(len(prompts)))
    assert all(0 < len(rows) <= batch for rows in found)
    assert list(batches([], batch)) == []


@pytest.mark.parametrize("batch", [4, 8, 16])
def test_answers_are_those_of_each_prompt_alone(model: Any, batch: int) -> None:
    alone = [answered(model, [prompt], 1)[0] for prompt in wordings()]
    assert len({tuple(a) for a in alone}) > 8, "outputs that hardly differ would show little"
    assert answered(model, wordings(), batch) == alone


def test_each_row_goes_on_from_its_own_beginning() -> None:
    """The rest of each prompt after its prefix gives the logits of the whole prompt, also for different lengths."""
    model, prompts = tiny_model(), wordings()
    together = max(batches(prompts, 8), key=lambda found: len(found[0]))
    assert len(together) > 1
    cache = DynamicCache(config=model.config)
    asked = [[prompts[i] for i in family] for family in together]
    ids, seen = begin(model, cache, asked, new_tokens=1, device=CPU)
    rows = [i for family in together for i in family]
    assert seen.sum(1).tolist() == [len(prompts[i]) for i in rows]
    assert ids.shape[1] < max(len(prompts[i]) for i in rows), "nothing was begun"
    with torch.no_grad():
        positions = (seen.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        logits = model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache).logits[:, -1]
        for i, found in zip(rows, logits, strict=True):
            assert torch.allclose(found, model(torch.tensor([prompts[i]])).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_common_beginning_is_computed_once() -> None:
    """Five samples of one long prompt, and twelve wordings with one prefix."""
    prompt = wordings()[0] * 20
    model = Counted(tiny_model())
    found = sample(
        model,
        [prompt] * 5,
        seeds=[(n,) for n in range(5)],
        temperature=2.0,
        top_p=1.0,
        stops=NO_STOPS,
        new_tokens=1,
        batch=8,
        device=CPU,
    )
    assert len({tuple(tokens) for tokens in found}) > 1
    assert model.positions == len(prompt) - 1 + 5
    head = list(range(100, 140))
    model = Counted(tiny_model())
    answered(model, [[*head, i, i + 1] for i in range(12)], 12, new_tokens=1)
    assert model.positions == len(head) + 12 * 2


def test_prompts_with_little_in_common_are_computed_in_one_pass() -> None:
    model = Counted(tiny_model())
    answered(model, [[1, 2, 10 + i, *range(20 + i, 30 + i)] for i in range(6)], 6, new_tokens=1)
    assert model.positions == 6 * 13


def test_a_window_that_the_padding_could_fill_is_left_alone() -> None:
    head = list(range(100, 130))
    prompts = [[*head, i] for i in range(10, 18)]
    for window, begun in ((64, True), (36, True), (34, False)):
        model = Counted(tiny_model("gemma", **SLIDING | {"sliding_window": window}))
        answered(model, prompts, 8, new_tokens=5)
        assert (model.positions < 8 * 31) == begun
