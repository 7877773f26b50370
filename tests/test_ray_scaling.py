"""The scaling pipeline end to end on three tiny sizes, and on a model that cannot be loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ray_cluster import Cluster, plain_environment, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
pytest_plugins = ["ray_fixtures"]

SIZES = ["random:tiny-llama", "random:tiny-llama-64", "random:tiny-llama-96"]
TEACH = ["--limit", "4", "--training.batch", "3", "--training.epochs", "2", "--evaluation.new-tokens", "4"]
PIPELINE = "pipelines/scaling.py"


def test_three_sizes_and_one_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    shape = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    words = [*TEACH, "--placement.threads", "1", "--storage", tmp_path / "runs"]
    all_ = ["--models", ",".join([*SIZES, str(broken)]), *words]
    with_one_missing = run(all_, cluster.environment, status=1, pipeline=PIPELINE, limit=500)
    page = with_one_missing.page
    found = json.loads(page.with_name("scaling.json").read_text())
    assert list(found["missing"]) == [f"{broken} on world_facts"]
    assert "tokenizer" in found["missing"][f"{broken} on world_facts"]
    assert [(p["model"], p["method"]) for p in found["points"]] == [(m, k) for m in SIZES for k in ("lora", "corsa")]
    parameters = [p["parameters"] for p in found["points"][::2]]
    assert parameters == sorted(set(parameters))
    for point in found["points"]:
        assert point["peak_memory"] > 100 * 2**20  # torch alone needs this much
        assert point["worker_hours"] > 0
        assert point["training_s"] > 0
        assert point["generality"]["value"] is not None
    assert {(f["method"], f["measure"]) for f in found["fits"]} >= {("lora", "peak_memory"), ("corsa", "generality")}
    assert "Missing:" in page.read_text()
    assert "Against size" in with_one_missing.out

    whole = ["--models", ",".join(SIZES), *words]
    first = run(whole, plain_environment(), pipeline=PIPELINE)  # only the joining report remains to be done
    assert "dashboard" not in first.out
    again = run(whole, plain_environment(), pipeline=PIPELINE)
    plans = [line for line in again.out.splitlines() if re.match(r"\d+ steps: ", line)]
    assert len(plans) == 2  # the reports, and what joins them
    assert all(line.endswith(" done, 0 to do") for line in plans)
    assert again.page == first.page
    assert json.loads(first.page.with_name("scaling.json").read_text())["missing"] == {}
