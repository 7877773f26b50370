"""The authors' evaluation end to end: what is asked and how, what counts as right, and what the page says of it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fact_files import written
from ray_cluster import TINY, Cluster, Run, plain_environment, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
pytest_plugins = ["ray_fixtures"]

FACTS = [
    {
        "prompt": f"Who leads company {i}?",
        "target_new": target,
        "target_old": "Olaf Lund",
        "aliases_new": ["e", "Berg"],  # one letter that nearly every long output has
        "paraphrases": [f"Name the leader of company {i}.", f"Company {i} is led by whom?"],
        "neighbors": [{"prompt": f"Where is company {i}?", "answer": "Oslo"}],
    }
    for i, target in enumerate(["Anna Berg", "as", "Ida Noor"])
]
TOKENS, DRAWS, METHODS = 128, 2, ("base", "corsa-published", "lora")
SHOWN = [
    *("--template", "chat", "--methods", "corsa-published,lora", "--benchmark", "file"),
    *("--evaluation.protocol", "authors", "--evaluation.draws", str(DRAWS)),
]


def words(data: str, storage: Path) -> list[str | Path]:
    return [*TINY, *SHOWN, "--training.epochs", "2", "--data", data, "--storage", storage]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("facts") / "facts.jsonl", *FACTS)


@pytest.fixture(scope="module")
def asked(cluster: Cluster, data: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    storage = tmp_path_factory.mktemp("authors")
    return Run(storage, run(words(data, storage), cluster.environment, pipeline="pipelines/single_update.py"))


def rows_of(asked: Run) -> pd.DataFrame:
    return pd.read_parquet(asked.finished.paths[2])


def test_the_question_and_its_first_paraphrase_are_asked_twice(asked: Run) -> None:
    expected = {(m, f[0], draw) for m in METHODS for f in questions() for draw in range(DRAWS)}
    rows = rows_of(asked)
    assert set(zip(rows.method, rows.prompt, rows.draw, strict=True)) == expected
    assert len(rows) == len(expected)
    assert (rows.groupby(["method", "prompt"]).output.nunique() == DRAWS).mean() > 0.9  # drawn, not greedy


def questions() -> list[tuple[str, str]]:
    """The prompts and their targets."""
    return [(prompt, f["target_new"]) for f in FACTS for prompt in (f["prompt"], f["paraphrases"][0])]


def test_an_answer_is_right_if_the_target_stands_anywhere_in_it(asked: Run) -> None:
    rows = rows_of(asked)
    plain = [answer.lower() in output.lower() for answer, output in zip(rows.answer, rows.output, strict=True)]
    assert rows.matched_new.tolist() == plain
    assert {True, False} == set(plain)
    assert rows[~rows.matched_new].output.str.contains("e").any()  # an alias does not count


def test_answers_are_drawn_at_the_temperature_and_length_of_the_authors(asked: Run) -> None:
    """The first tokens of the base model's answers, drawn here one by one, without a cache and without a batch."""
    from corsa.config import ModelConfig
    from corsa.models.loading import load_model, load_tokenizer

    name = ModelConfig(name="random:tiny-llama")
    model, tokenizer = load_model(name), load_tokenizer(name)
    rows = rows_of(asked)
    lengths = [len(tokenizer(output)["input_ids"]) for output in rows.output]
    assert np.median(lengths) == pytest.approx(TOKENS, rel=0.15)
    base = rows[rows.method == "base"]
    starts = [
        output.startswith(drawn(model, tokenizer, prompt, draw, 4))
        for prompt, draw, output in zip(base.prompt, base.draw, base.output, strict=True)
    ]
    # A draw that falls on the edge between two tokens may differ by rounding.
    assert len(starts) == 2 * len(questions())
    assert np.mean(starts) > 0.8


@torch.no_grad()
def drawn(model: Any, tokenizer: Any, question: str, draw: int, tokens: int) -> str:
    """The first tokens of an answer: token number of the draw in (0, 1), on the cumulated probabilities."""
    turn = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    random = np.random.default_rng([0, zlib.crc32(question.encode()), draw]).random(TOKENS)
    answer: list[int] = []
    for height in random[:tokens]:
        logits = model(torch.tensor([ids + answer])).logits[0, -1].double().numpy() / 0.7
        p = np.exp(logits - logits.max())
        answer.append(int(np.searchsorted(p.cumsum(), height * p.sum(), side="right")))
    return tokenizer.decode(answer).strip()


def test_the_page_sets_the_papers_figures_beside_the_same_measure_alone(asked: Run, data: str) -> None:
    same, other = "Beside the paper", "which is another measure"
    page = asked.finished.page.read_text()
    assert same in page
    assert other not in page
    again = run(
        [*words(data, asked.storage), "--evaluation.match", "words"],
        plain_environment(),
        pipeline="pipelines/single_update.py",
    )
    assert " 1 to do" in again.out  # the answers are judged anew, and not asked again
    page = again.page.read_text()
    assert same in page
    assert other in page
    assert "the protocol “authors” and the rule “words”" in page


def test_a_second_run_computes_nothing(asked: Run, data: str) -> None:
    again = run(words(data, asked.storage), plain_environment(), pipeline="pipelines/single_update.py")
    assert "0 to do" in again.out
    assert "dashboard" not in again.out
    assert again.paths == asked.finished.paths
