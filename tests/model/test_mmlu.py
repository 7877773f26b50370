"""MMLU: reading both layouts, scoring with a shared prefix or whole prompts, counting, the evaluation harness."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import LORA, SLIDING, shaken, tiny_model

from corsa.errors import CorsaError
from corsa.evaluation.mmlu import (
    COLUMNS,
    GROUP_OF,
    LETTERS,
    MmluQuestions,
    accuracy,
    digest,
    from_questions_table,
    read_mmlu,
)
from corsa.evaluation.multiple_choice import ANSWERS, MultipleChoice
from corsa.lora.flat import Lora
from corsa.models.encoding import Encoder

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "mmlu"
VOCABULARY = 49152
SUBJECTS = ("anatomy", "high_school_us_history")


def made_up(subject: str, part: str) -> list[list[str]]:
    """Rows in the six columns. The questions differ in length; some have line breaks, commas or quotes."""
    return [
        [
            f'Which {subject} of "{part}" number {i} is'
            + " far" * (3 * i % 7)
            + (", if any?\nSay which" if i % 2 else ""),
            *(f"the {name}, {i + k}" for k, name in enumerate(("left", "right", "upper", "lower"))),
            str(i % 4),
        ]
        for i in range(5 if part == "dev" else 7)
    ]


def written(folder: Path, *, header: bool = True, subjects: Sequence[str] = SUBJECTS) -> Path:
    """A directory in the published layout, or in the original layout without header and with letters."""
    for part in ("test", "dev"):
        (folder / part).mkdir(parents=True)
        for subject in subjects:
            rows = made_up(subject, part)
            if not header:
                rows = [[*row[:5], LETTERS[int(row[5])]] for row in rows]
            with (folder / part / f"{subject}_{part}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([list(COLUMNS), *rows] if header else rows)
    return folder


def questions_of(place: Path, limit: int | None = None) -> MmluQuestions:
    return from_questions_table(read_mmlu(str(place), limit=limit))


# Reading


def test_both_layouts_give_the_same_prompts(tmp_path: Path) -> None:
    with_header, without = written(tmp_path / "a"), written(tmp_path / "b", header=False)
    table = read_mmlu(str(with_header))
    assert table == read_mmlu(str(without))
    assert len(table) == 14
    assert digest(str(with_header)) != digest(str(without))
    pq.write_table(table, tmp_path / "questions.parquet")
    assert from_questions_table(pq.read_table(tmp_path / "questions.parquet")) == from_questions_table(table)

    subject = from_questions_table(table).subjects[1]
    prompt = subject.prompt(subject.questions[1], 1)
    assert prompt == (
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        'Which high_school_us_history of "dev" number 0 is\n'
        "A. the left, 0\nB. the right, 1\nC. the upper, 2\nD. the lower, 3\nAnswer: A\n\n"
        'Which high_school_us_history of "test" number 1 is far far far, if any?\nSay which\n'
        "A. the left, 1\nB. the right, 2\nC. the upper, 3\nD. the lower, 4\nAnswer:"
    )


def test_limit_takes_the_first_questions_of_each_subject(tmp_path: Path) -> None:
    folder = written(tmp_path)
    every, few = read_mmlu(str(folder)).to_pylist(), read_mmlu(str(folder), limit=2).to_pylist()
    assert few == [row for row in every if row["index"] < 2]
    assert [len(row["shots"]) for row in read_mmlu(str(folder), limit=1, shots=3).to_pylist()] == [3, 3]
    with pytest.raises(CorsaError, match="limit 0"):
        read_mmlu(str(folder), limit=0)
    with pytest.raises(CorsaError, match="has 5 worked examples"):
        read_mmlu(str(folder), shots=6)


def test_the_digest_is_that_of_what_the_files_hold(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a"), written(tmp_path / "b")
    before = digest(str(one))
    assert before == digest(str(other))
    with (other / "dev" / "anatomy_dev.csv").open("a") as file:
        file.write("x,a,b,c,d,0\n")
    assert digest(str(other)) != before
    assert digest(None) == "hub:cais/mmlu@main:test"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,choice0,choice1,choice2,answer\nq,a,b,c,0\n", "column choice3 is missing"),
        ("q,a,b,c,A\n", "record 1 has 5 columns instead of 6"),
        ("q,a,b,c,d,A\nq,a,b,c,d,E\n", "record 2: answer is 'E'"),
        ("q,a,,c,d,A\n", "record 1: choice1 is blank"),
        ('q,a,"b"c,c,d,A\n', "is not CSV"),
        ("question,choice0,choice1,choice2,choice3,answer\n", "holds no question"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    folder = written(tmp_path)
    (folder / "test" / "anatomy_test.csv").write_text(text)
    with pytest.raises(CorsaError, match=said) as raised:
        read_mmlu(str(folder))
    assert "anatomy_test.csv" in str(raised.value)


def test_a_directory_that_is_not_mmlu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorsaError, match="holds no CSV file"):
        digest(str(tmp_path / "absent"))
    with pytest.raises(CorsaError, match="did you mean 'anatomy'"):
        read_mmlu(str(written(tmp_path / "a", subjects=["anatomyy"])))
    folder = written(tmp_path / "b")
    (folder / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(CorsaError, match=r"anatomy_dev\.csv beside it"):
        read_mmlu(str(folder))

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(CorsaError, match=r"no route.*give a directory"):
        read_mmlu(None)


def test_rows_of_the_hub_are_read_as_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str, revision: str) -> list[dict[str, Any]]:
        assert (name, config) == ("cais/mmlu", "all")
        return [
            {"subject": subject, "question": row[0], "choices": row[1:5], "answer": int(row[5])}
            for subject in SUBJECTS
            for row in made_up(subject, split)
        ]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_mmlu(None, limit=3) == read_mmlu(str(written(tmp_path)), limit=3)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"needs the published files, {PUBLISHED}")
def test_the_published_files_are_read_whole() -> None:
    table = read_mmlu(str(PUBLISHED))
    assert len(table) == 14042
    assert set(table["subject"].to_pylist()) == set(GROUP_OF)
    parts = [from_questions_table(table).share(i, 3).subjects for i in range(3)]
    assert sorted(subject.name for part in parts for subject in part) == sorted(GROUP_OF)
    sizes = [sum(len(q.text) for s in part for q in s.questions) for part in parts]
    assert max(sizes) < 1.1 * min(sizes)


# Scoring


@torch.no_grad()
def whole(model: Any, tokenizer: Any, questions: MmluQuestions, shots: int = 5) -> torch.Tensor:
    """Log p of " A" to " D" after each prompt, from one forward pass over the whole prompt."""
    letters = [tokenizer(f" {letter}")["input_ids"][0] for letter in LETTERS]
    prompts = [tokenizer(s.prompt(q, shots))["input_ids"] for s in questions.subjects for q in s.questions]
    return torch.stack([model(input_ids=torch.tensor([p])).logits[0, -1].log_softmax(-1)[letters] for p in prompts])


def scores(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([[row[f"logp_{letter}"] for letter in LETTERS] for row in rows])


@pytest.mark.parametrize(
    ("family", "change"), [("llama", {}), ("qwen3", {}), ("gemma", {}), ("gemma", SLIDING)], ids=lambda p: str(p)[:9]
)
def test_a_shared_prefix_changes_no_score(
    tmp_path: Path, encoder: Encoder, one_thread: None, family: str, change: dict[str, Any]
) -> None:
    questions = questions_of(written(tmp_path))
    model, tokenizer = tiny_model(family, VOCABULARY, **change), encoder.tokenizer
    shaken(Lora(model, LORA))  # an edited model: hooks on its layers
    rows = MultipleChoice(model, tokenizer, "cpu", 3).answers(questions)
    expected = whole(model, tokenizer, questions)
    assert (scores(rows) - expected).abs().max() < 1e-4
    recomputed = MultipleChoice(model, tokenizer, "cpu", 3, share=False).answers(questions)
    assert (scores(recomputed) - expected).abs().max() < 1e-4

    assert expected.std(0).min() > 1e-2  # the answer depends on the question: a wrong position would give another one
    assert [row["chosen"] for row in rows] == expected.argmax(1).tolist()
    assert [(row["subject"], row["index"], row["answer"]) for row in rows] == [
        (s.name, q.index, q.answer) for s in questions.subjects for q in s.questions
    ]
    assert all(row["correct"] == (row["chosen"] == row["answer"]) for row in rows)
    assert pa.Table.from_pylist(rows, schema=ANSWERS).num_rows == 14


def test_the_prefix_ends_between_tokens_of_the_whole_prompts(
    tmp_path: Path, encoder: Encoder, one_thread: None
) -> None:
    """Examples and question tokenized separately give other tokens than the whole prompt."""
    tokenizer = encoder.tokenizer
    subject = questions_of(written(tmp_path)).subjects[0]
    prompt = subject.prompt(subject.questions[0], 5)
    examples = prompt.removesuffix(subject.questions[0].text)
    apart = [*tokenizer(examples)["input_ids"], *tokenizer(subject.questions[0].text)["input_ids"]]
    assert apart != tokenizer(prompt)["input_ids"]

    seen = []
    model = tiny_model("llama", VOCABULARY)
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True)
    MultipleChoice(model, tokenizer, "cpu", 16).answers(MmluQuestions((subject,)))
    (prefix,), rests = seen  # one pass for the shared prefix, one for the rest of all questions
    wholes = {tuple(tokenizer(subject.prompt(q, 5))["input_ids"]) for q in subject.questions}
    assert {tuple(prefix + rest)[: len(w)] for rest in rests for w in wholes} >= wholes
    assert len(prefix) > 0.8 * min(map(len, wholes))


def test_one_question_of_a_subject_is_answered(tmp_path: Path, encoder: Encoder, one_thread: None) -> None:
    questions = questions_of(written(tmp_path), limit=1)
    model = tiny_model("llama", VOCABULARY)
    rows = MultipleChoice(model, encoder.tokenizer, "cpu", 16).answers(questions)
    assert (scores(rows) - whole(model, encoder.tokenizer, questions)).abs().max() < 1e-4


def test_a_prompt_too_long_for_the_model_has_fewer_examples(tmp_path: Path, encoder: Encoder, one_thread: None) -> None:
    tokenizer = encoder.tokenizer
    questions = questions_of(written(tmp_path, subjects=["anatomy"]))
    (subject,) = questions.subjects
    lengths = [len(tokenizer(subject.prompt(q, 3))["input_ids"]) for q in subject.questions]
    model = tiny_model("llama", VOCABULARY, max_position_embeddings=sorted(lengths)[3])
    rows = MultipleChoice(model, tokenizer, "cpu", 16).answers(questions)
    three = [length <= sorted(lengths)[3] for length in lengths]
    assert [row["shots_dropped"] for row in rows] == [2 if fits else 3 for fits in three]
    expected = torch.where(
        torch.tensor(three)[:, None], whole(model, tokenizer, questions, 3), whole(model, tokenizer, questions, 2)
    )
    assert (scores(rows) - expected).abs().max() < 1e-4
    assert accuracy({0: rows})["shortened"] == 7

    model.config.max_position_embeddings = 20
    with pytest.raises(CorsaError, match="anatomy, question 0: longer than the model's 20 positions"):
        MultipleChoice(model, tokenizer, "cpu", 16).answers(questions)


def test_a_letter_of_several_tokens_is_refused(tmp_path: Path) -> None:
    def characters(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    characters.eos_token_id = 0  # type: ignore[attr-defined]
    with pytest.raises(CorsaError, match="one token of a letter"):
        MultipleChoice(tiny_model(), characters, "cpu", 16).answers(questions_of(written(tmp_path)))


# Counting


def answers(right: dict[str, list[int]]) -> list[dict[str, Any]]:
    return [
        {"subject": subject, "index": i, "correct": bool(one), "shots_dropped": 0}
        for subject, own in right.items()
        for i, one in enumerate(own)
    ]


def test_accuracy_is_averaged_over_seeds_and_paired_with_the_base() -> None:
    random = np.random.default_rng(4)
    base = random.binomial(1, 0.6, 200)
    runs = {seed: np.where(random.random(200) < 0.1, 1 - base, base) for seed in (0, 1, 2)}
    table = {seed: answers({"anatomy": list(map(int, right))}) for seed, right in runs.items()}
    before = answers({"anatomy": list(map(int, base))})
    entry = accuracy(table, before)["overall"]
    means = [right.mean() for right in runs.values()]
    assert entry["value"] == pytest.approx(np.mean(means))
    assert entry["spread"] == pytest.approx(np.std(means, ddof=1))
    assert entry["difference"]["value"] == pytest.approx(np.mean(means) - base.mean())
    width = entry["difference"]["high"] - entry["difference"]["low"]
    assert 0 < width < 0.6 * (entry["high"] - entry["low"])  # paired: common results do not count
    first = accuracy({0: table[0]}, before)["overall"]
    assert (first["spread"], first["value"]) == (None, pytest.approx(means[0]))
    assert accuracy({0: before})["overall"]["difference"] is None
    with pytest.raises(CorsaError, match="different MMLU questions"):
        accuracy(table, before[:-1])


def test_accuracy_counts_every_question_the_same() -> None:
    answered = {"anatomy": [1, 1, 1, 0], "astronomy": [0, 0], "sociology": [1] * 8}
    found = accuracy({0: answers(answered)})
    assert found["overall"]["value"] == pytest.approx(11 / 14)
    assert found["overall"]["questions"] == 14
    assert list(found["groups"]) == ["STEM", "social sciences"]
    assert found["groups"]["STEM"]["value"] == pytest.approx(3 / 6)
    assert found["subjects"]["anatomy"]["value"] == pytest.approx(3 / 4)
    for entry in (found["overall"], *found["groups"].values(), *found["subjects"].values()):
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert found["subjects"]["sociology"]["low"] < 0.7  # eight of eight is not certain
    assert found["shortened"] == 0


# Comparison with the EleutherAI evaluation harness

SAMPLE = ("abstract_algebra", "anatomy", "marketing")
EACH = 8


@pytest.mark.long
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the evaluation harness: pip install lm-eval")
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"needs the published files, {PUBLISHED}")
def test_answers_are_those_of_the_evaluation_harness(tmp_path: Path, encoder: Encoder, one_thread: None) -> None:
    """The harness's own task files on the same rows: the same letter for every question, and its log-likelihoods."""
    import yaml

    from corsa.config import ModelConfig
    from corsa.models.loading import load_model

    definitions = Path(import_module("lm_eval").__file__ or "").parent / "tasks" / "mmlu" / "default"
    tags = {
        path.stem.removeprefix("mmlu_"): yaml.safe_load(path.read_text()) for path in definitions.glob("mmlu_*.yaml")
    }
    assert {name: f"mmlu_{group.lower().replace(' ', '_')}_tasks" for name, group in GROUP_OF.items()} == {
        name: entries["tag"] for name, entries in tags.items()
    }

    model, tokenizer = load_model(ModelConfig()), encoder.tokenizer
    template = yaml.safe_load((definitions / "_default_template_yaml").read_text())
    tasks = {name: harness_task(template | tags[name], tmp_path) for name in SAMPLE}
    hugging_face = import_module("lm_eval.models.huggingface").HFLM
    harness = hugging_face(pretrained=model, tokenizer=tokenizer, batch_size=8)
    evaluate = import_module("lm_eval.evaluator").evaluate
    samples = evaluate(harness, tasks, limit=EACH, log_samples=True, bootstrap_iters=0)["samples"]

    questions = questions_of(PUBLISHED, limit=EACH)
    ours = MmluQuestions(tuple(s for s in questions.subjects if s.name in SAMPLE))
    rows = MultipleChoice(model, tokenizer, "cpu", EACH).answers(ours)
    theirs = [s for name in SAMPLE for s in sorted(samples[name], key=lambda s: s["doc_id"])]
    assert [s["arguments"][0][0] for s in theirs] == [s.prompt(q, 5) for s in ours.subjects for q in s.questions]
    expected = torch.tensor([[float(logp) for logp, _ in sample["filtered_resps"]] for sample in theirs])
    assert (scores(rows) - expected).abs().max() < 1e-3
    assert [row["chosen"] for row in rows] == expected.argmax(1).tolist()
    assert [row["correct"] for row in rows] == [bool(sample["acc"]) for sample in theirs]


def harness_task(entries: dict[str, Any], folder: Path) -> Any:
    """The harness's task of a subject, reading the published rows from a local file."""
    name = entries["dataset_name"]
    files = {}
    for part in ("test", "dev"):
        with (PUBLISHED / part / f"{name}_{part}.csv").open(newline="") as file:
            rows = [
                {"question": r["question"], "choices": [r[f"choice{k}"] for k in range(4)], "answer": int(r["answer"])}
                for r in csv.DictReader(file)
            ]
        path = folder / f"{name}_{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[part] = str(path)
    kept = {key: value for key, value in entries.items() if key not in ("include", "tag", "task_alias")}
    local = {"dataset_path": "json", "dataset_name": None, "num_fewshot": 5}
    local["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    return import_module("lm_eval.api.task").ConfigurableTask(config=kept | local)
