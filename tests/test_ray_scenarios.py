"""Every scenario of the paper end to end on a tiny model: first all together, then each alone on the stored results."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from ray_cluster import Cluster, Run, plain_environment, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
pytest_plugins = ["ray_fixtures"]

FACTS, SHAPE = 5, ["--model", "random:tiny-llama", "--placement.threads", "1", "--evaluation.new-tokens", "4"]
CHOSEN_ON = 2  # facts that sensitivity compares values on; the other scenarios skip them
TEACH = ["--training.batch", "3", "--training.epochs", "2", "--limit", str(FACTS)]
MEMIT = ["--memit.gradient-steps", "3"]
BOTH = ["--benchmark", "world_facts"]


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second benchmark, in ZsRE's format."""
    rows = [
        {
            "subject": f"Tower {i}",
            "src": f"Which town is Tower {i} in?",
            "rephrase": f"Where does Tower {i} stand?",
            "pred": f"Oldtown {i}",
            "answers": [f"Oldtown {i}"],
            "alt": f"Newtown {i}",
            "loc": f"nq question: how high is hill {i}",
            "loc_ans": f"{i}00 metres",
        }
        for i in range(CHOSEN_ON + FACTS)
    ]
    path = tmp_path_factory.mktemp("data") / "towers.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects in MMLU's format."""
    folder = tmp_path_factory.mktemp("mmlu")
    header = "question,choice0,choice1,choice2,choice3,answer\n"
    for part, count in (("dev", 5), ("test", 3)):
        (folder / part).mkdir()
        for subject in ("anatomy", "astronomy"):
            rows = "".join(f"What is {subject} fact {i}?,one,two,three,four,{i % 4}\n" for i in range(count))
            (folder / part / f"{subject}_{part}.csv").write_text(header + rows)
    return folder


@pytest.fixture(scope="session")
def together(cluster: Cluster, other: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """pipelines/paper.py over all scenarios, from an empty storage."""
    storage = tmp_path_factory.mktemp("paper")
    arguments = [*SHAPE, *TEACH, *MEMIT, *BOTH, "--then", "zsre", "--then-data", other, "--mmlu", questions]
    arguments += [
        "--development",
        str(CHOSEN_ON),
        "--fractions",
        "0.5,1.0",
        "--rounds",
        "2",
        "--parts",
        "2",
        "--storage",
        storage,
    ]
    return Run(storage, run(arguments, cluster.environment, pipeline="pipelines/paper.py", limit=700))


def metrics_of(finished: Run, scenario: str) -> dict:
    return json.loads(finished.finished.paths[-1].with_name("metrics.json").read_text())[scenario]


def test_all_scenarios_make_one_report(together: Run) -> None:
    page = together.finished.out.splitlines()[-2]
    assert page.endswith("report.html")
    found = json.loads(Path(page).with_name("metrics.json").read_text())
    assert set(found) == {
        *("single update", "ablation", "sensitivity", "injection", "merging", "continual", "fractions", "routing")
    }
    methods = {name: {row["method"] for row in metrics["rows"]} for name, metrics in found.items()}
    assert methods["single update"] == {"base", "lora", "memit", "f-learning", "corsa"}
    assert methods["ablation"] == {"base", "corsa", "corsa-no-sam", "corsa-no-dpo", "corsa-no-pcgrad", "lora"}
    assert len(methods["sensitivity"]) == 2 + 15 + 4
    assert {"lora linear", "corsa dare_linear", "f-learning sum"} <= methods["merging"]
    assert methods["routing"] == {"base", "corsa", "corsa by prompt", "corsa by embedding", "corsa by oracle"}
    for name, metrics in found.items():
        for row in metrics["rows"]:
            assert row["metrics"]["generality"]["value"] is not None, (name, row["method"])
    assert set(found["single update"]["specificity"]) == methods["single update"]
    assert found["single update"]["specificity"]["base"]["overall"]["questions"] == 6
    assert [axis["name"] for axis in found["sensitivity"]["axes"]] == ["lambda", "rho", "beta", "alpha"]
    assert "Beside the paper" in Path(page).read_text()


def test_injection_asks_both_benchmarks_after_the_second(together: Run) -> None:
    record = together.records["report/injection"]
    path = together.storage / f"steps/{record.fingerprint[:16]}/{record.attempt}/predictions.parquet"
    rows = pd.read_parquet(path)
    for _, asked in rows[(rows.method != "base") & (rows.trained == 2)].groupby("method"):
        benchmarks = asked.edit.str.split("/").str[0]
        assert asked[benchmarks == "zsre"].edit.nunique() == FACTS
        assert asked[benchmarks == "world_facts"].edit.nunique() == FACTS
        assert set(asked[benchmarks == "zsre"].learnt) == {2}
        assert set(asked[benchmarks == "world_facts"].learnt) == {1}


ALL = ["--methods", "lora,memit,f-learning,corsa"]
ALONE = {
    "single": ("single_update", []),
    "ablation": ("ablation", []),
    "sensitivity": ("sensitivity", []),
    "routing": ("routing", ["--parts", "2"]),
    "merging": ("merging", ["--other", "zsre", "--other-data", "OTHER", "--methods", "lora,f-learning,corsa"]),
    "temporal": ("continual", ["--rounds", "2", *ALL]),
    "fractions": ("continual", ["--rounds", "2", "--fractions", "0.5,1.0", *ALL]),
    "injection": ("continual", ["--scenario", "injection", "--then", "zsre", "--then-data", "OTHER", *ALL]),
}


@pytest.mark.parametrize(("pipeline", "arguments"), ALONE.values(), ids=ALONE)
def test_a_scenario_alone_finds_everything_done(
    together: Run, other: Path, questions: Path, pipeline: str, arguments: list[str]
) -> None:
    """Only its own report must be made: its configuration differs from that of all scenarios together."""
    places = {"OTHER": str(other)}
    words = [
        *SHAPE,
        *TEACH,
        *BOTH,
        *MEMIT,
        *(["--development", str(CHOSEN_ON)] if pipeline == "sensitivity" else ["--offset", str(CHOSEN_ON)]),
        "--mmlu",
        questions,
        *(places.get(word, word) for word in arguments),
        "--storage",
        together.storage,
    ]
    environment = plain_environment()
    seen = run([*words, "--dry-run"], environment, pipeline=f"pipelines/{pipeline}.py").out
    assert " 1 to do" in seen.splitlines()[0], seen
    first = run(words, environment, pipeline=f"pipelines/{pipeline}.py")
    assert "dashboard" not in first.out  # a report needs no cluster
    again = run(words, environment, pipeline=f"pipelines/{pipeline}.py")
    assert "0 to do" in again.out
    assert first.paths == again.paths
