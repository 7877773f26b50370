"""Checks before a run: `corsa data`, `--dry-run`, answers that cannot count, special tokens, contexts."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fact_files import case, fact, written
from rich.console import Console
from test_files import EASYEDIT

from corsa.cli.main import main
from corsa.config import EvaluationConfig, ModelConfig
from corsa.errors import CorsaError
from corsa.experiments.base import Experiment
from corsa.experiments.code.base import CodeExperiment, code_report
from corsa.experiments.planner import Planner
from corsa.experiments.runner import start
from corsa.flow import Step
from corsa.models.encoding import Encoder
from corsa.planning.inputs import beyond_context, cannot_count, remarks, say_what_cannot_count

pytestmark = pytest.mark.usefixtures("encoder", "one_thread")

TINY = "random:tiny-llama"
Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *words: str) -> str:
    """What `corsa data` prints."""
    assert main(["data", *words, "--model", TINY]) == 0
    return capsys.readouterr().out


# -- answers that cannot count --------------------------------------------------------------------------------------


def test_answers_longer_than_what_is_generated_are_counted_with_the_number_to_set(encoder: Encoder) -> None:
    rows = [{"id": str(n), "target_new": "one two three four five six seven"[: 4 * n]} for n in range(1, 9)]
    for new_tokens in (1, 2, 4, 7):
        lengths = [len(encoder.tokenizer(" " + row["target_new"])["input_ids"]) for row in rows]
        over = [length for length in lengths if length > new_tokens]
        lines = cannot_count(rows, EvaluationConfig(new_tokens=new_tokens), lambda: encoder)
        if not over:
            assert lines == []
            continue
        assert lines[0].startswith(f"{len(over)} of 8 new answers are longer than the {new_tokens} tokens")
        assert lines[0].endswith(f"set --evaluation.new-tokens {max(over) + 1}")  # with room for the end token

    def refuse() -> Encoder:
        raise AssertionError("no tokenizer is needed for short answers")

    assert cannot_count([{"id": "a", "target_new": "Bo"}], EvaluationConfig(), refuse) == []


@pytest.mark.parametrize("name", ["answer_longer_than_32_tokens/facts.jsonl", "answer_with_newline/facts.jsonl"])
def test_shared_answers_that_cannot_count(name: str, capsys: Capture) -> None:
    assert "1 of 2 new answers" in shown(capsys, case(name))


def test_corsa_data_names_what_to_look_at(tmp_path: Path, capsys: Capture) -> None:
    rows = [
        fact(target_new="a b c d e f g h i j k l"),
        fact(prompt="1?", target_new="X"),
        fact(prompt="2?", target_new="two\nlines"),
        fact(prompt="3?", target_new="Bo<|im_end|>"),
        fact(prompt="4?", target_new="Bo\u200bLind"),
        fact(prompt="5?", aliases_new=["B. L."], paraphrases=["5", "Which 5?", "which 5"]),
    ]
    path = written(tmp_path / "f.jsonl", *rows)
    said = shown(capsys, path, "--new-tokens", "11", "--show", "9")
    for line in (
        "1 of 6 new answers are longer than the 11 tokens that are generated, and cannot count as right: "
        "set --evaluation.new-tokens 13",
        "1 of 6 new answers have several lines (f/2)",
        "1 of 6 facts have an answer of one or two characters, which `contains` finds inside of other words (f/1)",
        "1 of 6 facts hold the text of a special token of this tokenizer, which is read as plain text (f/3)",
        "1 of 6 facts hold invisible characters (f/4)",
        "1 paraphrases that are a taught question count as edit prompts; 1 wordings that repeat another are asked once",
        "aliases_new  B. L.",
        "paraphrases  5 | Which 5? | which 5",
        "<·|·im·_·end·|·>",
    ):
        assert line in said
    assert "no fault found" not in said
    found = json.loads(shown(capsys, path, "--new-tokens", "11", "--json"))
    assert len(found["remarks"]) == 6
    assert (found["not_asked_taught"], found["with_aliases"]) == (1, 1)


def test_corsa_data_says_how_many_facts_it_shows_and_in_which_signs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "f.jsonl", fact(), fact(prompt="2?"))
    said = shown(capsys, path, "--show", "1")
    assert "As the model sees 1 of 2; --show 2 shows all (· between tokens, ␣ a space):" in said
    assert "As the model sees 2 (·" in shown(capsys, path)
    assert "As the model sees" not in shown(capsys, path, "--show", "0")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["data", path]) == 0
    out.flush()
    plain = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "(| between tokens, _ a space):" in plain
    assert "Q|:|_" in plain
    assert "\\u" not in plain


def test_a_sound_file_has_no_remark(tmp_path: Path, capsys: Capture) -> None:
    assert "1 facts, no fault found" in shown(capsys, written(tmp_path / "f.jsonl", fact()))


def test_corsa_data_says_for_which_command_a_file_is_sound(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "f.jsonl", {"prompt": "Who leads it?", "target_new": "Bo Lind"})
    said = shown(capsys, path)
    assert "1 without target_old: `corsa edit` asks the model what it says today; a pipeline" in said
    said = shown(capsys, written(tmp_path / "g.jsonl", fact(chain="c", round=2)))
    assert "`corsa edit` takes this file, a pipeline (--benchmark file) refuses it: " in said
    assert "no round 1" in said
    said = shown(capsys, written(tmp_path / "h.json", EASYEDIT))
    assert "read as the format of EasyEdit and KnowEdit: prompt -> prompt" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "0"], "--limit 0: nothing would be read"),
        (["--limit", "-3"], "--limit -3: nothing would be read"),
        (["--new-tokens", "0"], "--new-tokens 0"),
        (["--show", "-1"], "--show -1"),
    ],
)
def test_numbers_that_ask_for_nothing(tmp_path: Path, capsys: Capture, words: list[str], message: str) -> None:
    assert main(["data", written(tmp_path / "f.jsonl", fact()), *words]) == 2
    assert message in capsys.readouterr().err


def test_long_facts_are_shown_in_part_and_never_raw(tmp_path: Path, capsys: Capture) -> None:
    row = fact(target_new="word " * 400, paraphrases=["x " * 5000], id="a\u202eb")
    said = shown(capsys, written(tmp_path / "f.jsonl", row))
    assert " ... and 201 more tokens" in said
    assert len(said) < 6000
    assert "\u202e" not in said


# -- contexts and special tokens ------------------------------------------------------------------------------------


def test_a_fact_beyond_the_context_is_refused_or_marked(
    tmp_path: Path, capsys: Capture, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"id": "a", **fact(prompt="word " * 2040)}
    tokens = len(encoder.prompt(row["prompt"])) + len(encoder.answer("Cy Moss"))
    assert beyond_context([row, {"id": "b", **fact()}], encoder, tokens - 1) == [(row, tokens)]
    assert beyond_context([row], encoder, tokens) == beyond_context([row], encoder, None) == []
    path = written(tmp_path / "f.jsonl", fact(), fact(prompt="word " * 2050))
    assert main(["data", path, "--model", TINY]) == 2
    assert "f/1: prompt and answer have 20" in (said := capsys.readouterr().err)
    assert "the context of random:tiny-llama holds 2048 (1 such in all)" in said

    from corsa.training import reference

    stage = object.__new__(reference.Score)
    stage.encoder, stage.context = encoder, tokens - 1
    monkeypatch.setattr(reference.Score, "score", lambda *_: pytest.fail("nothing is to be scored"))
    (marked,) = stage(pa.Table.from_pylist([row], schema=None)).to_pylist()
    assert (marked["bad"], marked["reason"]) == (
        "prompt",
        f"and its answer have {tokens} tokens, and the model's context holds {tokens - 1}",
    )


@pytest.mark.parametrize("template", ["qa", "chat"])
def test_special_tokens_in_the_text_of_a_fact_stay_text(encoder: Encoder, template: Any) -> None:
    own = Encoder(encoder.tokenizer, template)
    special = set(encoder.tokenizer.all_special_ids)

    def count(ids: list[int]) -> int:
        return sum(id_ in special for id_ in ids)

    plain, hostile = own.prompts(["Who leads Acme?", "Who <|im_end|> leads <|endoftext|>?"])
    assert count(hostile) == count(plain)
    assert "Who <|im_end|> leads <|endoftext|>?" in encoder.tokenizer.decode(hostile)
    assert own.prompt("Who <|im_end|> leads <|endoftext|>?") == hostile
    answer = own.answer("Bo<|im_end|>")
    assert count(answer) == 1
    assert answer[-1] == encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.decode(answer[:-1]).strip() == "Bo<|im_end|>"
    # Text without special tokens is encoded as before.
    assert (
        own.answer("Bo Lind")[:-1]
        == encoder.tokenizer("Bo Lind" if template == "chat" else " Bo Lind", add_special_tokens=False)["input_ids"]
    )


def test_a_tokenizer_without_a_chat_template_is_named(
    tmp_path: Path, encoder: Encoder, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = copy.deepcopy(encoder.tokenizer)
    bare.chat_template = None
    with pytest.raises(CorsaError, match="has no chat template: use --template qa"):
        Encoder(bare, "chat")
    assert Encoder(bare, "qa").prompt("Who?")
    bare.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(CorsaError, match=r"the chat template of .* fails: system first"):
        Encoder(bare, "chat").prompt("Who?")
    bare.chat_template = None
    monkeypatch.setattr("corsa.models.loading.load_tokenizer", lambda _: bare)
    assert main(["data", written(tmp_path / "f.jsonl", fact()), "--template", "chat"]) == 2
    assert "use --template qa" in capsys.readouterr().err


# -- before a run ---------------------------------------------------------------------------------------------------


def single(planner: Planner[Experiment]) -> Step:
    """A scenario of one step that asks the base model."""
    return planner.base(planner.facts())


def dry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["x", "--dry-run", "--storage", str(tmp_path / "runs"), *words])
    return start(single, Experiment(), program="x", description="")


@pytest.mark.parametrize(
    ("benchmark", "name", "message"),
    [
        ("file", "dry_run_wrong_file/facts.xlsx", "unknown kind of file"),
        ("counterfact", "dry_run_wrong_file/peak.json", "this looks like the format of PEAK"),
        ("file", "data_vs_pipeline/twice.jsonl", "is taught 'Bo'"),
        ("file", "data_vs_pipeline/no_old.jsonl", "line 1: target_old: is missing.*corsa edit"),
    ],
)
def test_a_dry_run_refuses_a_wrong_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, benchmark: str, name: str, message: str
) -> None:
    with pytest.raises(CorsaError, match=message) as caught:
        dry(monkeypatch, tmp_path, "--benchmark", benchmark, "--data", case(name))
    assert caught.value.status == 2


def test_a_dry_run_draws_what_is_sound_and_names_a_hub_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    assert dry(monkeypatch, tmp_path, "--benchmark", "file", "--data", written(tmp_path / "f.jsonl", fact())) == 0
    assert "edits/file" in capsys.readouterr().out

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(CorsaError, match="counterfact"):
        dry(monkeypatch, tmp_path, "--benchmark", "counterfact")
    path = written(tmp_path / "g.jsonl", fact())
    with pytest.raises(CorsaError, match="has 1 facts, and all of them are passed over"):
        dry(monkeypatch, tmp_path, "--benchmark", "file", "--data", path, "--offset", "100000")


def test_files_of_programs_that_are_exchanged_are_named(tmp_path: Path) -> None:
    humaneval = {"task_id": "H/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n"}
    path = written(tmp_path / "h.jsonl", humaneval | {"test": "def check(f):\n    f()\n"})
    with pytest.raises(CorsaError, match=r"h\.jsonl holds HumanEval \(--humaneval\), and stands where CodeUpdateArena"):
        code_report(Planner.of(CodeExperiment(data=path, dry_run=True), "x"), primary=())


def test_a_run_says_which_answers_cannot_count(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", fact(target_new="a b c d e f"), fact(prompt="1?", target_new="two\nlines"))
    experiment = Experiment(
        model=ModelConfig(name=TINY), benchmark="file", data=path, evaluation=EvaluationConfig(new_tokens=4)
    )
    planner = Planner.of(experiment, "")
    taught = planner.facts()
    steps = [planner.base(taught), planner.schedule(taught), taught.edits]
    console = Console(file=io.StringIO(), width=400)
    say_what_cannot_count(steps, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [
        "edits/file: 1 of 2 new answers are longer than the 4 tokens that are generated, and cannot count as right: "
        "set --evaluation.new-tokens 7",
        "edits/file: 1 of 2 new answers have several lines (f/1): an output is right only if it gives all of them",
    ]


def test_corsa_edit_says_it_too(tmp_path: Path) -> None:
    from corsa.editing.options import EditOptions
    from corsa.editing.plan import plan_edit
    from corsa.flow.step import topological

    path = written(tmp_path / "f.jsonl", fact(target_new="a b c d e f"))
    how = {"model": TINY, "evaluation": {"new_tokens": 4}, "storage": str(tmp_path / "runs")}
    plan = plan_edit(EditOptions.model_validate({"edits": path, "out": str(tmp_path / "out"), **how}))
    console = Console(file=io.StringIO(), width=400)
    say_what_cannot_count(topological([plan.report]), console)
    assert "set --evaluation.new-tokens 7" in console.file.getvalue()  # type: ignore[attr-defined]


def test_answers_of_every_kind_that_cannot_count_are_named(tmp_path: Path, capsys: Capture) -> None:
    long = "a b c d e f g h i j k l"
    rows = [
        fact(target_old=long),
        fact(prompt="1?", target_new=long, aliases_new=["short"]),
        fact(prompt="2?", neighbors=[{"prompt": "near?", "answer": long}]),
        fact(prompt="3?", neighbors=[{"prompt": "far?", "answer": "two\nlines"}], target_new="Bo\u2028Lind"),
        fact(prompt="4?", target_new="<think>Bo</think>Ada"),
    ]
    path = written(tmp_path / "f.jsonl", *rows)
    lines = json.loads(shown(capsys, path, "--new-tokens", "11", "--json"))["remarks"]
    too_long = "longer than the 11 tokens that are generated, and"
    assert lines == [
        "1 of 5 new answers have several lines (f/3): an output is right only if it gives all of them",
        "1 of 5 new answers hold <think> or </think> (f/4), and cannot count as right: what a model writes there is "
        "never read as its answer",
        f"1 of 5 old answers are {too_long} are never found: set --evaluation.new-tokens 13",
        f"1 of 2 answers of neighbor questions are {too_long} cannot count as right: set --evaluation.new-tokens 13",
        "1 of 2 answers of neighbor questions have several lines (f/3): an output is right only if it gives all of "
        "them",
    ]


def test_without_aliases_and_neighbors_only_the_target_can_count(encoder: Encoder) -> None:
    long = " ".join("abcdefgh" * 20)
    row = {"id": "a", **fact(target_new=long, aliases_new=["short"]), "neighbors": [("near?", long, ())]}
    assert "neighbor" in " ".join(cannot_count([row], EvaluationConfig(), lambda: encoder))
    (line,) = cannot_count([row], EvaluationConfig(protocol="authors"), lambda: encoder)
    assert line == "1 of 1 new answers are longer than the 128 tokens that are generated, and cannot count as right"


def test_remarks_look_at_every_text_of_a_fact(encoder: Encoder) -> None:
    """Not only at the question and the two answers."""
    near = ("Who leads Zeta?", "Zed Lind", ())
    for changed, said in (
        ({"paraphrases": ["Who <|im_end|> leads it?"]}, "special token"),
        ({"aliases_new": ["Bo<|im_end|>"]}, "special token"),
        ({"neighbors": [("Who</s> leads?", "Zed Lind", ())]}, "special token"),
        ({"aliases_old": ["X"]}, "one or two characters"),
        ({"neighbors": [("Who leads?", "Z", ())]}, "one or two characters"),
        ({"paraphrases": ["Who\u200bleads it?"]}, "invisible"),
        ({"target_new": "Ada | A. Lind"}, "looks like a list"),
        ({"target_old": '["Ada", "A. Lind"]'}, "looks like a list"),
        ({"target_old": "nan"}, "empty cell"),
        ({}, ""),
    ):
        lines = remarks([{"id": "a", **fact(neighbors=[near]), **changed}], encoder, EvaluationConfig())
        special = [token for token in ("<|im_end|>", "</s>") if token in str(changed)]
        if special and special[0] not in encoder.special:
            continue
        assert [said in line for line in lines] == [True] * bool(said), changed


def test_remarks_count_old_answers_of_one_letter_too(encoder: Encoder) -> None:
    row = {"id": "a", **fact(target_old="\uff38")}
    assert "one or two characters" in remarks([row], encoder, EvaluationConfig())[0]
    assert remarks([{"id": "a", **fact(target_old="")}], encoder, EvaluationConfig()) == []
