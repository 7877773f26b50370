"""Evaluation protocols: which questions they ask, how they generate, and where an answer ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from test_update_plan import drafts
from tiny import CPU, LORA, shaken, tiny_model

from corsa.config import EvaluationConfig, ModelConfig
from corsa.data.edit import Edit, Probe
from corsa.errors import CorsaError
from corsa.evaluation.generation import end_tokens, generate, newline_tokens, sample
from corsa.evaluation.matching import plain_matches
from corsa.evaluation.metrics import compute
from corsa.evaluation.old_answers import old_answers
from corsa.evaluation.predict import PREDICTIONS, Predictor, Taught
from corsa.experiments.base import Experiment
from corsa.lora.flat import Lora
from corsa.models.encoding import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""The end of Qwen3's chat template: it thinks unless it is told not to."""

ALWAYS = "{{ messages[0].content }}\n<think>\n"
"""A template that opens thoughts whatever it is told."""


def edit(**change: Any) -> Edit:
    fields: dict[str, Any] = {
        "id": "x/1",
        "prompt": "Who leads Acme?",
        "target_new": "Bo Berg",
        "target_old": "Al Ahn",
        "aliases_new": ["Berg"],
        "paraphrases": ["Acme is led by", "The head of Acme is"],
        "neighbors": [("Who leads Umbrella?", "Di Dahl", [])],
        "history": ["Who led Acme before?"],
    }
    made = Edit.build(**fields | change)
    multihop = Probe(
        kind="multihop", prompts=("Who is Acme's chief's boss?", "Whose chief leads Acme?"), answer="Ed Eng", aliases=()
    )
    return made.model_copy(update={"probes": (*made.probes, multihop)})


@pytest.fixture(scope="module")
def speaker(encoder: Encoder) -> Any:
    """A tiny model with the tokenizer's whole vocabulary."""
    found = tiny_model(vocabulary=len(encoder.tokenizer))
    shaken(Lora(found, LORA))
    return found


def evaluation(**fields: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate(fields)


def predictor(speaker: Any, encoder: Encoder, batch: int = 16, seed: int = 0, **fields: Any) -> Predictor:
    config = evaluation(**{"new_tokens": 4, "reasoning_tokens": 6} | fields)
    return Predictor(speaker, encoder, config, CPU, batch, seed=seed)


def kinds(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return [(row["kind"], row["wording"], row["draw"]) for row in rows]


# Questions


PAPER = [("edit", 0), ("paraphrase", 0), ("multihop", 0), ("multihop", 1)]


@pytest.mark.parametrize("protocol", ["paper", "authors"])
def test_what_no_number_counts_is_not_asked(speaker: Any, encoder: Encoder, protocol: str, monkeypatch) -> None:
    asked: list[list[int]] = []

    def spy(model: Any, prompts: Sequence[list[int]], **how: Any) -> list[list[int]]:
        asked.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr("corsa.evaluation.predict.generate", spy)
    monkeypatch.setattr("corsa.evaluation.predict.sample", spy)
    rows = predictor(speaker, encoder, protocol=protocol).ask([Taught(edit(), 1, "update")])
    assert [(kind, wording) for kind, wording, _ in kinds(rows)] == PAPER
    assert len(asked) == len(PAPER)


def test_a_second_paraphrase_probe_is_not_the_first_paraphrase(speaker: Any, encoder: Encoder) -> None:
    """Edits repeated in a later case add their paraphrases to it (MQuAKE)."""
    one = edit(history=[], neighbors=[])
    more = Probe(kind="paraphrase", prompts=("Acme has which leader?",), answer="Bo Berg", aliases=())
    taught = [Taught(one.model_copy(update={"probes": (*one.probes, more)}), 1, "update")]
    rows = predictor(speaker, encoder, protocol="paper").ask(taught)
    assert [row["prompt"] for row in rows if row["kind"] == "paraphrase"] == ["Acme is led by"]


def test_full_asks_the_kinds_that_are_chosen(speaker: Any, encoder: Encoder) -> None:
    taught = [Taught(edit(), 1, "update")]
    every = predictor(speaker, encoder).ask(taught)
    assert len(every) == 1 + 2 + 1 + 1 + 2
    some = predictor(speaker, encoder, probes=("neighbor", "edit")).ask(taught)
    assert some == [row for row in every if row["kind"] in ("edit", "neighbor")]


# How the authors' evaluation asks


def test_the_authors_evaluation_samples_as_theirs_does(speaker: Any, encoder: Encoder, monkeypatch) -> None:
    found: list[dict[str, Any]] = []

    def spy(model: Any, prompts: Sequence[list[int]], **how: Any) -> list[list[int]]:
        found.append(how)
        return [encoder.tokenizer(" Tirana\nBerg", add_special_tokens=False)["input_ids"] for _ in prompts]

    monkeypatch.setattr("corsa.evaluation.predict.sample", spy)
    one = edit(target_new="Iran", aliases_new=["Berg"])
    rows = predictor(speaker, encoder, protocol="authors", new_tokens=32).ask([Taught(one, 1, "update")])
    for how in found:
        assert (how["temperature"], how["top_p"], how["new_tokens"]) == (0.7, 1.0, 128)
        assert not (how["stops"] & newline_tokens(encoder.tokenizer)).any()  # only end tokens end an answer
        assert bool(how["stops"][encoder.tokenizer.eos_token_id])
    row = rows[0]
    assert row["output"] == "Tirana\nBerg"
    assert (row["matched_new"], row["words_new"], row["exact_new"]) == (True, False, False)  # no alias counts


def test_draws_follow_from_seed_question_and_number_alone(speaker: Any, encoder: Encoder, monkeypatch) -> None:
    monkeypatch.setattr("corsa.config.evaluation._AUTHORS_TOKENS", 5)
    taught = [Taught(edit(), 1, "update")]
    rows = predictor(speaker, encoder, protocol="authors", draws=3).ask(taught)
    assert kinds(rows) == [(kind, wording, draw) for kind, wording in PAPER for draw in range(3)]
    outputs = {(row["prompt"], row["draw"]): row["output"] for row in rows}
    assert len({outputs["Who leads Acme?", draw] for draw in range(3)}) == 3
    assert predictor(speaker, encoder, batch=1, protocol="authors", draws=3).ask(taught) == rows
    assert predictor(speaker, encoder, protocol="authors", draws=1).ask(taught) == [r for r in rows if r["draw"] == 0]
    other = predictor(speaker, encoder, seed=1, protocol="authors", draws=3).ask(taught)
    assert [row["output"] for row in other] != [row["output"] for row in rows]
    assert [row["logp_new"] is not None for row in rows if row["kind"] == "edit"] == [True, False, False]
    for row in rows:
        said = plain_matches(row["output"], row["answer"], row["target_old"])
        assert (row["matched_new"], row["matched_old"]) == (said.new, said.old)


def test_a_draw_has_the_probabilities_of_the_softmax_at_that_temperature() -> None:
    """The first token of 4,000 draws against softmax(logits / 0.7), for every token that is likely enough to count."""
    model, prompt, draws = tiny_model(), [5, 6, 7], 4000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = (logits / 0.7).softmax(-1)
    found = sample(
        model,
        [prompt] * draws,
        seeds=[(0, 1, n) for n in range(draws)],
        temperature=0.7,
        top_p=1.0,
        stops=torch.zeros(1024, dtype=torch.bool),
        new_tokens=1,
        batch=1000,
        device=CPU,
    )
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=1024)
    likely = expected * draws >= 20
    assert int(likely.sum()) > 5
    deviation = (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() < 4 * deviation)[likely].all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": 2}, "set protocol authors, or leave draws out"),
        ({"draws": 2, "protocol": "paper"}, "protocol paper is greedy"),
        ({"protocol": "paper", "probes": ("edit",)}, "leave probes out"),
        ({"probes": ()}, "nothing would be asked"),
        ({"probes": ("edits",)}, "Input should be"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig(**fields)


@pytest.mark.parametrize("fields", [{"protocol": "authors"}, {"thinking": True}])
def test_what_needs_the_chat_template_says_so(fields: dict[str, Any]) -> None:
    experiment = Experiment(model=ModelConfig(name="random:tiny-llama"), evaluation=EvaluationConfig(**fields))
    with pytest.raises(CorsaError, match="add --template chat"):
        experiment.checked()
    chat = experiment.model.model_copy(update={"template": "chat"})
    experiment.model_copy(update={"model": chat}).checked()


def test_a_protocol_has_its_rule_and_a_rule_is_no_part_of_asking() -> None:
    assert [evaluation(protocol=p).rule for p in ("full", "paper", "authors")] == [
        "words",
        "contains",
        "contains",
    ]
    assert evaluation(protocol="authors", match="exact").rule == "exact"
    plain = evaluation().for_predictions()
    for same in ({"match": "exact"}, {"thinking_tokens": 9}, {"probes": evaluation().kinds}):
        assert evaluation(**same).for_predictions() == plain, same
    assert (
        evaluation(probes=("neighbor", "edit")).for_predictions()
        == evaluation(probes=("edit", "neighbor")).for_predictions()
    )
    for other in (
        {"protocol": "paper"},
        {"protocol": "authors"},
        {"probes": ("edit",)},
        {"new_tokens": 8},
        {"reasoning_tokens": 8},
        {"thinking": True},
    ):
        assert evaluation(**other).for_predictions() != plain, other
    authors = evaluation(protocol="authors")
    assert (
        evaluation(protocol="authors", new_tokens=7, reasoning_tokens=7).for_predictions() == authors.for_predictions()
    )
    assert evaluation(protocol="authors", draws=2).for_predictions() != authors.for_predictions()


# Where an answer ends


def test_every_end_token_that_a_model_publishes_ends_its_answers(
    speaker: Any, encoder: Encoder, monkeypatch, tmp_path: Path
) -> None:
    own = encoder.tokenizer.eos_token_id
    prompts = [encoder.prompt(f"Who leads {name}?") for name in ("Acme", "Umbrella", "Initech")]
    how: dict[str, Any] = {"new_tokens": 6, "batch": 8, "device": CPU}
    endless = generate(speaker, prompts, stops=torch.zeros(len(encoder.tokenizer), dtype=torch.bool), **how)
    other = next(token for token in endless[0][2:] if token not in endless[0][:2])
    monkeypatch.setattr(speaker.generation_config, "eos_token_id", [own, other])
    stops = end_tokens(speaker, encoder.tokenizer)
    assert sorted(stops.nonzero()[:, 0].tolist()) == sorted({own, other})
    (first, *_) = generate(speaker, prompts, stops=stops, **how)
    assert first == endless[0][: endless[0].index(other)]
    assert first
    # Probes, and what a multi-hop question is answered with
    ask = predictor(speaker, encoder)
    assert bool(ask.stops()[other])
    assert ask.stops(lines=True).tolist() == stops.tolist()
    # Old answers that are filled in
    answers, _ = old_answers(
        speaker,
        encoder,
        drafts(tmp_path, {"prompt": "Who leads Acme?", "target_new": "Zed"}),
        device=CPU,
        new_tokens=6,
        batch=8,
    )
    assert answers["Who leads Acme?"] == encoder.tokenizer.decode(first).strip().split("\n")[0].strip()


@pytest.mark.parametrize("published", [None, 7, [7, 10**9], []])
def test_the_tokenizer_s_end_token_always_ends(encoder: Encoder, published: Any) -> None:
    model = type("Model", (), {"generation_config": type("Config", (), {"eos_token_id": published})()})()
    stops = end_tokens(model, encoder.tokenizer)
    assert bool(stops[encoder.tokenizer.eos_token_id])
    assert int(stops.sum()) == 1 + (published == 7 or published == [7, 10**9])


def test_an_answer_of_several_lines_does_not_end_at_the_first(speaker: Any, encoder: Encoder, monkeypatch) -> None:
    said = encoder.tokenizer(" Ada Lind\nBo Holm", add_special_tokens=False)["input_ids"]

    def speak(model: Any, prompts: Sequence[list[int]], stops: torch.Tensor, **how: Any) -> list[list[int]]:
        cut = next((i for i, token in enumerate(said) if bool(stops[token])), len(said))
        return [said[:cut] for _ in prompts]

    monkeypatch.setattr("corsa.evaluation.predict.generate", speak)
    several = edit(target_new="Ada Lind\nBo Holm", aliases_new=[])
    rows = predictor(speaker, encoder).ask([Taught(several, 1, "update")])
    by_kind = {row["kind"]: row for row in rows}
    for kind in ("edit", "paraphrase"):
        row = by_kind[kind]
        assert row["output"] == "Ada Lind\nBo Holm"
        assert (row["words_new"], row["matched_new"], row["exact_new"]) == (True, True, True)
    assert by_kind["neighbor"]["output"] == "Ada Lind"  # here a line is expected
    half = edit(target_new="Ada Lind\nCy Moss", aliases_new=[])
    row = predictor(speaker, encoder).ask([Taught(half, 1, "update")])[0]
    assert (row["words_new"], row["matched_new"], row["exact_new"]) == (False, False, False)


def test_the_old_answer_of_a_fact_with_several_lines_may_have_several(
    speaker: Any, encoder: Encoder, tmp_path: Path, monkeypatch
) -> None:
    seen: list[bool] = []
    newline = encoder.tokenizer("\n", add_special_tokens=False)["input_ids"][0]

    def spy(model: Any, prompts: Sequence[list[int]], stops: torch.Tensor, **how: Any) -> list[list[int]]:
        seen.extend(bool(stops[newline]) for _ in prompts)
        return generate(model, prompts, stops=stops, **how)

    monkeypatch.setattr("corsa.evaluation.old_answers.generate", spy)
    rows = [{"prompt": "Who leads Acme?", "target_new": "Zed"}, {"prompt": "Who owns it?", "target_new": "Zed\nYan"}]
    answers, _ = old_answers(speaker, encoder, drafts(tmp_path, *rows), device=CPU, new_tokens=4, batch=8)
    assert seen[:2] == [True, False]
    assert set(answers) == {"Who leads Acme?", "Who owns it?"}


# Thoughts


def chat(encoder: Encoder, template: str) -> Encoder:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = template
    return Encoder(tokenizer, "chat")


def text_of(encoder: Encoder, thinking: bool) -> str:
    return encoder.tokenizer.decode(encoder.prompt("Who?", thinking))


def test_a_template_that_thinks_unless_told_is_told(encoder: Encoder) -> None:
    qwen = chat(encoder, QWEN)
    assert text_of(qwen, False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text_of(qwen, True).endswith("assistant\n")


def test_thoughts_that_a_template_always_opens_are_closed(encoder: Encoder) -> None:
    always = chat(encoder, ALWAYS)
    assert text_of(always, False) == "Who?\n<think>\n\n</think>\n\n"
    assert text_of(always, True) == "Who?\n<think>"
    question = always.tokenizer.decode(always.prompt("What does <think> mean?"))
    assert question.count("</think>") == 1


def test_a_question_about_thoughts_opens_none(encoder: Encoder) -> None:
    plain = chat(encoder, "{{ messages[0].content }}\n")
    assert plain.tokenizer.decode(plain.prompt("What does <think> mean?")) == "What does <think> mean?"


def test_thinking_needs_a_template_that_knows_it(encoder: Encoder) -> None:
    for unknowing in (chat(encoder, "{{ messages[0].content }}\n"), encoder):
        with pytest.raises(CorsaError, match=r"leave --evaluation\.thinking out"):
            unknowing.prompts(["Who?"], thinking=True)


def test_a_tokenizer_without_a_chat_template_is_named(encoder: Encoder) -> None:
    with pytest.raises(CorsaError, match="use --template qa"):
        chat(encoder, "").prompt("Who?")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("<think>\nParis? No.\n</think>\n\nRome", "Rome"),
        ("<think>\nParis? No.", ""),  # cut off while it thinks
        ("Rome", "Rome"),
        ("<think></think>Rome<think>Or Paris", "Rome"),
    ],
)
def test_thoughts_are_never_the_answer(encoder: Encoder, output: str, answer: str) -> None:
    for known in (encoder, chat(encoder, QWEN), marked(encoder)):
        ids = known.tokenizer(output, add_special_tokens=False)["input_ids"]
        assert known.read(ids).strip() == answer
    always = chat(encoder, ALWAYS)
    assert always.read(always.tokenizer("Paris? No.\n</think>\n\nRome")["input_ids"], thinking=True).strip() == "Rome"
    assert always.read(always.tokenizer("Paris? No")["input_ids"], thinking=True) == ""
    assert always.read(always.tokenizer("Rome")["input_ids"], thinking=False) == "Rome"


def marked(encoder: Encoder) -> Encoder:
    """With thoughts between special tokens, which decoding leaves out."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    return replace(encoder, tokenizer=tokenizer)


def test_a_model_that_thinks_gets_the_tokens_and_lines_it_needs(speaker: Any, encoder: Encoder, monkeypatch) -> None:
    qwen = chat(encoder, QWEN)
    seen: dict[str, Any] = {}

    def speak(model: Any, prompts: Sequence[list[int]], **how: Any) -> list[list[int]]:
        seen.update(how, prompts=prompts)
        text = "<think>\nBo Berg led it.\nNo.\n</think>\n\nAl Ahn\nand so on"
        return [qwen.tokenizer(text, add_special_tokens=False)["input_ids"] for _ in prompts]

    monkeypatch.setattr("corsa.evaluation.predict.generate", speak)
    thinking = predictor(speaker, qwen, probes=("edit",), thinking=True, thinking_tokens=50)
    (row,) = thinking.ask([Taught(edit(), 1, "update")])
    assert seen["new_tokens"] == 4 + 50
    assert not (seen["stops"] & newline_tokens(encoder.tokenizer)).any()
    assert seen["prompts"] == [qwen.prompt("Who leads Acme?", thinking=True)]
    assert row["output"] == "Al Ahn"  # the line after the thoughts
    assert (row["words_new"], row["words_old"]) == (False, True)
    predictor(speaker, qwen, probes=("edit",)).ask([Taught(edit(), 1, "update")])
    assert seen["new_tokens"] == 4
    assert seen["prompts"] == [qwen.prompt("Who leads Acme?")]


def test_thoughts_are_no_old_answer(speaker: Any, encoder: Encoder, tmp_path: Path, monkeypatch) -> None:
    qwen: Encoder = chat(encoder, QWEN)
    tokens: Callable[[str], list[int]] = lambda text: qwen.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start, *rest = tokens("<think>Ada.</think> Bo")

    def speak(model: Any, prompts: Sequence[list[int]], **how: Any) -> list[list[int]]:
        return [list(rest) for _ in prompts]

    monkeypatch.setattr("corsa.evaluation.old_answers.generate", speak)
    monkeypatch.setattr("corsa.evaluation.old_answers._first_tokens", lambda *words: torch.tensor([[start]]))
    facts = drafts(tmp_path, {"prompt": "Who leads Acme?", "target_new": "Ada"})
    assert old_answers(speaker, qwen, facts, new_tokens=9, batch=1, device=CPU) == ({"Who leads Acme?": "Bo"}, [])


# From the answers to the numbers


@pytest.mark.parametrize(("protocol", "draws"), [("full", 1), ("paper", 1), ("authors", 2)])
def test_the_answers_of_every_protocol_are_counted(
    speaker: Any, encoder: Encoder, protocol: Any, draws: int, monkeypatch
) -> None:
    monkeypatch.setattr("corsa.config.evaluation._AUTHORS_TOKENS", 3)
    ask = predictor(speaker, encoder, protocol=protocol, draws=draws)
    rows = ask.ask([Taught(edit(id=f"x/{n}"), 1, "update") for n in (1, 2)])
    labelled = [{"method": method, "seed": 0, "trained": 1} | row for method in ("base", "lora") for row in rows]
    table = pa.Table.from_pylist(labelled, schema=PREDICTIONS).to_pandas()
    found = compute(table, rule=ask.config.rule, protocol=protocol, kinds=ask.config.kinds)
    assert (found["rule"], found["draws"]) == (ask.config.rule, draws)
    (base, lora) = (row["metrics"] for row in found["rows"])
    wordings = 2 if protocol == "full" else 1
    assert (lora["generality"]["value"], lora["generality"]["probes"]) == (0, 2 * wordings)
    assert lora["multihop"]["probes"] == 2
    if protocol == "full":
        assert lora["neighborhood"]["value"] == 0
    else:
        assert "neighbor probes were not asked" in lora["neighborhood"]["reason"]
    assert base["efficacy"]["value"] == 0
