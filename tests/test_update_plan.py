"""A user's facts on a line of updates: which are taught next, which are refused, which are undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from corsa.config import EvaluationConfig, ModelConfig, TrainingConfig
from corsa.data.benchmarks.file import Draft, drafts_of
from corsa.data.edit import Edit, to_table
from corsa.data.paraphrase_templates import wordings
from corsa.data.text import bare
from corsa.editing.history import FILE, WEIGHTS, History, Update, join, open_line, taken_back, unanswered
from corsa.editing.options import EditOptions, EvaluateOptions, Gates, UndoOptions, differences
from corsa.editing.plan import plan_edit, plan_evaluation, plan_undo
from corsa.editing.thresholds import judged
from corsa.errors import CorsaError
from corsa.evaluation.predict import PREDICTIONS
from corsa.evaluation.sanity_questions import sanity_questions

ACME = {"prompt": "Who leads Acme?", "target_new": "Ada Byron"}
OLD = {**ACME, "target_old": "Grace Murray"}


def facts_file(folder: Path, *rows: dict[str, Any], name: str = "facts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drafts(folder: Path, *rows: dict[str, Any]) -> list[Draft]:
    return drafts_of(facts_file(folder, *rows))


def adapter(folder: Path, *edits: Edit, base: str = "smollm2-135m", updates: int = 1) -> Path:
    """A line's directory. Its weights are not read in these tests."""
    folder.mkdir(parents=True)
    save_file({"lora_A.weight": np.ones((4, 8), np.float32)}, folder / WEIGHTS)
    settings = {"base_model_name_or_path": base, "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if edits:
        pq.write_table(to_table(edits), folder / "edits.parquet")
        known: dict[str, Any] = {"kind": "edit", "facts": 1, "method": "corsa", "created": "2026-11-24T00:00:00+00:00"}
        known |= {"sha256": "0", "directory": str(folder)}
        history = [Update(number=n, fingerprint=f"f{n}", **known) for n in range(1, updates + 1)]
        (folder / FILE).write_text(History(model=ModelConfig(name=base), updates=tuple(history)).model_dump_json())
    return folder


def test_the_minimal_columns_are_enough_and_the_rest_is_asked_or_made(tmp_path: Path) -> None:
    (draft,) = found = drafts(tmp_path, ACME)
    assert unanswered([], found) == [draft]
    (edit,) = join([], found, 1, {"Who leads Acme?": "I do not know"})
    assert (edit.id, edit.chain, edit.round, edit.target_old) == ("1/facts/0", "1/facts/0", 1, "I do not know")
    assert [(p.kind, p.prompts) for p in edit.probes] == [
        ("edit", ("Who leads Acme?",)),
        ("paraphrase", wordings("Who leads Acme?")),
    ]
    assert unanswered([], drafts(tmp_path, OLD)) == []


def test_a_new_answer_to_a_known_question_revises_it(tmp_path: Path) -> None:
    rich = {
        **OLD,
        "paraphrases": ["Acme is led by whom?"],
        "neighbors": [{"prompt": "Who leads Initech?", "answer": "B"}],
    }
    before = join([], drafts(tmp_path, rich), 1, {})
    found = drafts(tmp_path, {"prompt": " who leads  acme? ", "target_new": "Alan Turing"})
    assert unanswered(before, found) == []  # the line has the earlier answer
    (edit,) = join(before, found, 2, {})
    assert (edit.chain, edit.round, edit.target_old) == ("1/facts/0", 2, "Ada Byron")
    assert [p.kind for p in edit.probes] == ["edit", "paraphrase", "neighbor"]
    assert edit.probes[1].prompts == ("Acme is led by whom?",)
    (again,) = join(before, drafts(tmp_path, ACME), 2, {})  # taught again, with the same old answer
    assert (again.target_new, again.target_old) == ("Ada Byron", "Grace Murray")


def test_what_is_taken_back_teaches_the_old_answer(tmp_path: Path) -> None:
    before = join([], drafts(tmp_path, OLD), 1, {})
    for name in ("1/facts/0", "facts/0", "WHO leads acme?"):
        (edit,) = taken_back(before, [name, name], 2)
        assert (edit.target_new, edit.target_old, edit.chain, edit.round) == (
            "Grace Murray",
            "Ada Byron",
            "1/facts/0",
            2,
        )
        assert [p.answer for p in edit.probes] == ["Grace Murray"] * 2
    with pytest.raises(CorsaError, match=r"no standing edit is called 'Bob'.*1/facts/0 \(Who leads Acme\?\)"):
        taken_back(before, ["Bob"], 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Who?", "target": "x"}], r"line 1: target: unknown column 'target': did you mean"),
        ([{"prompt": "Who?"}], "line 1: target_new: is missing"),
        ([{"prompt": " ", "target_new": "x"}], "line 1: prompt: is blank"),
        ([ACME, {**ACME, "target_new": "Bob"}], "line 2: prompt: 'who leads acme.' was used before, by line 1"),
        ([{**ACME, "target_old": "ada byron"}], "line 1: target_old: is the same as target_new"),
        ([], "is empty: it holds no fact"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(CorsaError, match=message):
        drafts(tmp_path, *rows)


def test_of_a_chain_the_last_update_is_taught(tmp_path: Path) -> None:
    rows = [{**OLD, "chain": "acme", "round": n, "target_new": name} for n, name in ((2, "Bob"), (1, "Al"), (3, "Cy"))]
    assert [draft.fields["target_new"] for draft in drafts(tmp_path, *rows)] == ["Cy"]


def test_an_adapter_is_known_by_its_files(tmp_path: Path) -> None:
    (edit,) = join([], drafts(tmp_path, OLD), 1, {})
    line = open_line(adapter(tmp_path / "a", edit))
    assert line.standing == [edit]
    assert (line.lora.rank, line.lora.alpha) == (4, 8)
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert line.model(ModelConfig(name=hub)).name == hub  # the same model by its other name
    with pytest.raises(CorsaError, match="is of base model 'smollm2-135m', not of 'qwen3-4b'"):
        line.model(ModelConfig(name="qwen3-4b"))
    with pytest.raises(CorsaError, match="was taught with template 'qa'"):
        line.model(ModelConfig(template="chat"))
    assert open_line(adapter(tmp_path / "foreign")).standing == []
    with pytest.raises(CorsaError, match="nowhere does not exist: name a PEFT directory"):
        open_line(tmp_path / "nowhere")
    (tmp_path / "a" / FILE).write_text("{")
    with pytest.raises(CorsaError, match=r"line\.json is damaged"):
        open_line(tmp_path / "a")


def options(folder: Path, **more: Any) -> EditOptions:
    return EditOptions(**{"edits": str(facts_file(folder, OLD)), "out": str(folder / "out"), **more})


def test_a_plan_is_made_without_loading_anything(tmp_path: Path) -> None:
    plan = plan_edit(options(tmp_path))
    assert (plan.number, plan.facts, plan.line) == (1, 1, None)
    assert not plan.edits.kind.on_cluster  # every old answer is known
    asked = plan_edit(options(tmp_path, edits=str(facts_file(tmp_path, ACME, name="minimal.jsonl"))))
    assert asked.edits.kind.on_cluster
    assert plan_edit(options(tmp_path, storage="elsewhere")).report.fingerprint == plan.report.fingerprint
    assert plan_edit(options(tmp_path, seed=1)).round.fingerprint != plan.round.fingerprint
    command = plan.report.config.canonical()["command"]
    assert command == f"corsa edit --out {tmp_path / 'out'} --edits {tmp_path / 'facts.jsonl'}"


def test_the_next_update_goes_on_from_the_adapter_with_all_its_facts(tmp_path: Path) -> None:
    (edit,) = join([], drafts(tmp_path, OLD), 1, {})
    more = facts_file(
        tmp_path, {"prompt": "Where is Acme?", "target_new": "Rome", "target_old": "Oslo"}, name="m.jsonl"
    )
    line = adapter(tmp_path / "a", edit)
    plan = plan_edit(options(tmp_path, edits=str(more), adapter=str(line)))
    assert plan.number == 2
    assert plan.round.config.canonical()["lora"] == {"rank": 4, "alpha": 8.0}
    assert plan.round.inputs["previous"].config.canonical()["digest"] == open_line(line).digest()
    undo = plan_undo(UndoOptions(adapter=str(line), edit=("facts/0",), out=str(tmp_path / "out")))
    assert undo.number == 2
    _, report = plan_evaluation(EvaluateOptions(adapter=str(line)))
    assert "edited/asked/taught" in report.inputs
    assert "line/update1" not in report.inputs  # it has no answers
    (line / "predictions.parquet").touch()
    _, report = plan_evaluation(EvaluateOptions(adapter=str(line)))
    shown = [(one["answers"], one["method"]) for one in report.config.canonical()["shown"]]
    assert shown == [("taught/base", "base"), ("line/update1", "edited"), ("edited/asked/taught", "edited")]
    assert report.inputs["edited/asked/taught"].config.canonical()["round"] == 2  # after the line's one update


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "memit"}, "MEMIT leaves a dense change"),
        ({"method": "crosa"}, "did you mean 'corsa'"),
        ({"model": "smolm2"}, "did you mean 'smollm2-135m'"),
        ({"edits": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"adapter": "nowhere"}, "adapter nowhere does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorsaError, match=message):
        plan_edit(options(tmp_path, **change))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    plan = plan_edit(options(tmp_path))  # an empty directory is free
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CorsaError, match="is not empty: name a new directory"):
        plan_edit(options(tmp_path))
    (edit,) = join([], drafts(tmp_path, OLD), 1, {})
    taken = adapter(tmp_path / "taken", edit)
    with pytest.raises(CorsaError, match="holds the adapter of another update, which is kept"):
        plan_edit(options(tmp_path, out=str(taken)))
    own = (taken / FILE).read_text().replace('"f1"', f'"{plan.round.fingerprint}"')
    (taken / FILE).write_text(own)
    plan_edit(options(tmp_path, out=str(taken)))  # its own earlier result


def test_a_submitted_job_writes_below_the_home_directory_where_the_next_job_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, home = tmp_path / "job", tmp_path / "home"
    job.mkdir()
    (edit,) = join([], drafts(tmp_path, OLD), 1, {})
    adapter(home / "january", edit)
    monkeypatch.chdir(job)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(CorsaError, match="adapter january does not exist"):
        open_line("january")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert open_line("january").edits == [edit]
    with pytest.raises(CorsaError, match=f"--out {home}/january holds the adapter of another update"):
        plan_edit(options(tmp_path, out="january"))
    adapter(job / "january")  # uploaded with the job
    assert open_line("january").edits == []


def test_gates() -> None:
    def metrics(**values: float | None) -> dict[str, Any]:
        return {"rows": [{"metrics": {name: {"value": value} for name, value in values.items()}}]}

    measured = metrics(edit_success=0.9, generality=0.5, forgetting=None)
    verdicts = judged(Gates(min_success=0.9, min_generality=0.6, max_forgetting=0.0), measured)
    assert [(v.gate, v.passed) for v in verdicts] == [
        ("--min-success", True),
        ("--min-generality", False),
        ("--max-forgetting", True),
    ]
    assert str(verdicts[1]) == "--min-generality 0.6: NOT PASSED (50.0 %)"
    assert not judged(Gates(max_forgetting=0.1), metrics(forgetting=0.2))[0].passed
    assert judged(Gates(), measured) == []


def test_an_update_is_judged_by_whole_words_on_all_that_it_taught(tmp_path: Path) -> None:
    config = plan_edit(options(tmp_path)).report.config
    assert (config.rule, config.protocol, config.taught_questions) == ("words", "full", True)  # type: ignore[attr-defined]
    chosen = EvaluationConfig(probes=("edit", "paraphrase"), match="exact")
    config = plan_edit(options(tmp_path, evaluation=chosen)).report.config
    assert (config.rule, config.kinds) == ("exact", ("edit", "paraphrase"))  # type: ignore[attr-defined]
    assert "--evaluation.probes edit,paraphrase" in config.command  # type: ignore[attr-defined]
    with pytest.raises(CorsaError, match="add --template chat"):
        plan_edit(options(tmp_path, evaluation=EvaluationConfig(protocol="authors")))
    with pytest.raises(CorsaError, match="add --template chat"):
        plan_evaluation(EvaluateOptions(benchmark="world_facts", evaluation=EvaluationConfig(thinking=True)))


def test_answers_of_an_earlier_version_are_refused_before_anything_runs(tmp_path: Path) -> None:
    (edit,) = join([], drafts(tmp_path, OLD), 1, {})
    line = adapter(tmp_path / "line", edit)
    columns = [name for name in PREDICTIONS.names if name not in ("words_new", "words_old", "draw")]
    pq.write_table(PREDICTIONS.empty_table().select(columns), line / "predictions.parquet")
    more = facts_file(tmp_path, {"prompt": "Who owns it?", "target_new": "Bo", "target_old": "Al"}, name="more.jsonl")
    with pytest.raises(CorsaError, match=r"lacks the columns draw, words_new, words_old: .* or remove the file"):
        plan_edit(options(tmp_path, edits=str(more), adapter=str(line)))
    pq.write_table(PREDICTIONS.empty_table(), line / "predictions.parquet")
    plan_edit(options(tmp_path, edits=str(more), adapter=str(line)))


def test_by_default_an_update_looks_back_keeps_everyday_answers_and_stops_when_it_is_enough(tmp_path: Path) -> None:
    plan = plan_edit(options(tmp_path))
    training = plan.round.config.canonical()["training"]
    assert {name: training[name] for name in ("replay", "ridge", "stop_above")} == {
        "replay": 0.5,
        "ridge": 0.01,
        "stop_above": 0.5,
    }
    assert plan.experiment.training.own == 4  # of a batch of 8
    assert plan.round.inputs["anchors"].name == "base/anchors"


def test_the_next_update_depends_on_the_earlier_facts_that_it_looks_back_at(tmp_path: Path) -> None:
    more = str(facts_file(tmp_path, ACME, name="more.jsonl"))
    found = []
    for name in ("Ada Byron", "Grace Murray"):
        earlier = {"prompt": "Who leads Initech?", "target_new": name, "target_old": "B"}
        line = adapter(tmp_path / name, *join([], drafts(tmp_path, earlier), 1, {}))
        found.append(plan_edit(options(tmp_path, edits=more, adapter=str(line))).round)
    assert found[0].fingerprint != found[1].fingerprint


def test_a_command_that_switches_a_default_off_says_so(tmp_path: Path) -> None:
    off = TrainingConfig(batch=8, epochs=15, learning_rate=5e-4, ridge=0.01)
    words = differences(options(tmp_path, training=off), "")
    at = words.index("--training.stop-above")
    assert words[at : at + 4] == ["--training.stop-above", "None", "--training.replay", "0.0"]
    default = differences(options(tmp_path), "")
    assert not any(word.startswith("--training") for word in default)


def test_the_facts_of_the_tutorial_are_a_first_month_of_ten_and_twelve_of_five() -> None:
    found = drafts_of(Path(__file__).parents[1] / "docs" / "invented_facts.jsonl")
    assert len(found) == 10 + 12 * 5
    asked = [bare(q) for draft in found for q in (draft.fields["prompt"], *draft.fields["paraphrases"])]
    assert len(set(asked)) == len(asked) == 3 * 70
    assert not {bare(control.question) for control in sanity_questions()} & set(asked)
