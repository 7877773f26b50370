"""Teach facts, update the adapter a month later, and undo: as processes on a cluster, with a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray_cluster import Cluster, corsa
from test_update_plan import facts_file

from corsa.editing.history import open_line

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
pytest_plugins = ["ray_fixtures"]

JANUARY = [
    {"prompt": "Who leads Acme?", "target_new": "Ada"},
    {"prompt": "Who is the pope?", "target_new": "Leo", "paraphrases": ["Name the pope."]},
]
FEBRUARY = [
    {"prompt": "who leads Acme?", "target_new": "Bob"},
    {"prompt": "Where is Acme?", "target_new": "Rome", "neighbors": [{"prompt": "Where is Oz?", "answer": "Oz"}]},
]
QUICK = ["--evaluation.new-tokens", "4", "--placement.threads", "1", "--training.epochs", "30"]
QUICK += ["--training.learning-rate", "0.02"]


@pytest.fixture(scope="module")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates of a line, in january/ and february/."""
    folder = tmp_path_factory.mktemp("line")
    facts_file(folder, *JANUARY, name="january.jsonl")
    facts_file(folder, *FEBRUARY, name="february.jsonl")
    tiny = ["--model", "random:tiny-llama", *QUICK]
    done = corsa(folder, cluster, "edit", "--edits", "january.jsonl", "--out", "january", *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["edit", "--edits", "february.jsonl", "--adapter", "january", "--out", "february", *QUICK, "--json"]
    done = corsa(folder, cluster, *words, "--max-forgetting", "1", "--min-generality", "1")
    (folder / "february.json").write_text(done.stdout)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return folder


def february(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "february.json").read_text())


def test_an_update_leaves_a_directory_that_plain_peft_loads(folder: Path) -> None:
    from peft import PeftModel

    from corsa.config import ModelConfig
    from corsa.models.loading import load_model

    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "report.html", "metrics.json"}
    names |= {"edits.parquet", "predictions.parquet", "line.json"}
    assert {path.name for path in (folder / "january").iterdir()} == names
    loaded = PeftModel.from_pretrained(load_model(ModelConfig(name="random:tiny-llama")), str(folder / "february"))  # type: ignore[arg-type]
    assert any(float(value.abs().max()) > 0 for name, value in loaded.state_dict().items() if "lora_B" in name)


def test_the_old_answers_were_asked_of_the_model_before_the_update(folder: Path) -> None:
    first, second = open_line(folder / "january").edits, open_line(folder / "february").edits
    assert [e.target_new for e in first] == ["Ada", "Leo"]
    assert all(e.target_old for e in first)
    assert [e.id for e in second] == ["1/january/0", "1/january/1", "2/february/0", "2/february/1"]
    assert (second[2].chain, second[2].target_old) == ("1/january/0", "Ada")  # revised: the line has the old answer


def test_earlier_facts_are_asked_again_and_revised_ones_are_not(folder: Path) -> None:
    rows = pd.read_parquet(folder / "february" / "predictions.parquet")
    now = rows[(rows.method == "lora") & (rows.trained == 2)]
    assert set(now.edit) == {"1/january/1", "2/february/0", "2/february/1"}
    assert set(rows[(rows.method == "lora") & (rows.trained == 1)].edit) == {"1/january/0", "1/january/1"}
    assert set(rows[rows.method == "base"].edit) == set(rows.edit)
    assert set(now[now.edit == "1/january/1"].prompt) == {"Who is the pope?", "Name the pope."}
    assert len(now[now.edit == "2/february/1"]) == 1 + 3 + 1  # itself, wordings made by templates, a neighbor


def test_what_is_found_is_told_to_a_program(folder: Path) -> None:
    found = february(folder)
    assert [fact["prompt"] for fact in found["facts"]] == ["who leads Acme?", "Where is Acme?"]
    assert found["controls"]["questions"] == 40
    gates = {gate["gate"]: gate for gate in found["gates"]}
    assert gates["--max-forgetting"]["passed"]
    assert gates["--min-generality"]["passed"] == (found["metrics"]["generality"] == 1)
    assert found["passed"] == gates["--min-generality"]["passed"]
    assert Path(found["report"]).is_file()


def test_the_same_command_computes_nothing_and_another_is_refused(folder: Path, cluster: Cluster) -> None:
    words = ["--edits", "january.jsonl", "--out", "january", "--model", "random:tiny-llama", *QUICK]
    again = corsa(folder, cluster, "edit", *words)
    assert again.returncode == 0, again.stderr
    assert "9 done, 0 to do" in again.stdout
    other = corsa(folder, cluster, "edit", *words, "--seed", "1")
    assert other.returncode == 2
    assert "holds the adapter of another update" in other.stderr


def test_trials_choose_settings_and_the_best_is_the_adapter(folder: Path, cluster: Cluster) -> None:
    words = ["edit", "--edits", "january.jsonl", "--out", "tuned", "--model", "random:tiny-llama", *QUICK]
    words += ["--tune", "2"]
    done = corsa(folder, cluster, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--tune: 2 trainings of 2 facts each; the chosen one is the adapter" in done.stdout
    update = open_line(folder / "tuned").updates[-1]
    assert update.tuned is not None
    assert set(update.tuned) == {"ridge", "stop_above"}  # what QUICK does not give
    same = update.fingerprint == open_line(folder / "january").updates[-1].fingerprint
    assert same == (update.tuned == {"ridge": 0.01, "stop_above": 0.5})
    assert "trials on all 2 facts" in (folder / "tuned" / "README.md").read_text()
    again = corsa(folder, cluster, *words, "--json")
    assert again.stderr.count(" 0 to do") == 2  # the trials, the update
    assert json.loads(again.stdout)["tuned"] == update.tuned


def test_a_sample_of_the_earlier_facts_is_asked_again(folder: Path, cluster: Cluster) -> None:
    facts_file(folder, {"prompt": "Where is Oz?", "target_new": "Here"}, name="march.jsonl")
    words = ["edit", "--edits", "march.jsonl", "--adapter", "february", "--out", "march", *QUICK, "--recheck", "1"]
    done = corsa(folder, cluster, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pd.read_parquet(folder / "march" / "predictions.parquet")
    asked = rows[rows.trained == 3].groupby("method").edit.unique()
    standing = {"1/january/1", "2/february/0", "2/february/1"}
    (earlier,) = set(asked["lora"]) - {"3/march/0"}
    assert earlier in standing
    assert set(asked["lora"]) == {earlier, "3/march/0"}
    assert json.loads((folder / "march" / "metrics.json").read_text())["recheck"] == {"asked": 1, "of": 3}
    assert len(open_line(folder / "march").edits) == 5  # the line keeps every fact


def test_a_fact_is_taken_back_and_a_line_rolled_back(folder: Path, cluster: Cluster) -> None:
    undone = corsa(
        folder, cluster, "undo", "--adapter", "february", "--edit", "Where is Acme?", "--out", "mended", *QUICK
    )
    assert undone.returncode == 0, undone.stdout + undone.stderr
    line = open_line(folder / "mended")
    assert [update.kind for update in line.updates] == ["edit", "edit", "undo"]
    assert line.edits[-1].target_old == "Rome"
    assert line.edits[-1].chain == "2/february/1"
    back = corsa(folder, cluster, "undo", "--adapter", "mended", "--to", "1", "--out", "back")
    assert back.returncode == 0, back.stderr
    for name in ("adapter_model.safetensors", "line.json"):
        assert (folder / "back" / name).read_bytes() == (folder / "january" / name).read_bytes()
    assert "has no update 7" in corsa(folder, cluster, "undo", "--adapter", "mended", "--to", "7", "--out", "x").stderr


def test_the_examples_of_the_api(cluster: Cluster, tmp_path: Path) -> None:
    """Runs in a separate process: Ray reads its credentials for a cluster once per process."""
    code = (
        "import sys, test_doctests as own\n"
        f"done = own.run('corsa.api', own.NEED_A_CLUSTER, folder={str(tmp_path)!r})\n"
        "sys.exit(done.failed or not done.attempted)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=cluster.environment | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
