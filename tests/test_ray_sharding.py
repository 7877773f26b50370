"""A pipeline on the cluster whose workers shard the base, from the reference column to the answers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from ray_cluster import TINY, Cluster, Run, adapter, assert_same_adapters, plain_environment, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
pytest_plugins = ["ray_fixtures"]

ROUNDS = [f"world_facts-x3/corsa/seed0/round{number}" for number in (1, 2, 3)]
SHARDED = ["--methods", "corsa", "--workers", "2", "--sharding.zero-stage", "3"]


def test_two_workers_that_shard_the_base_learn_what_one_learns(
    undisturbed: Run, cluster: Cluster, tmp_path: Path
) -> None:
    ours = Run(tmp_path, run([*TINY, *SHARDED, "--storage", tmp_path], cluster.environment))
    assert_same_adapters(undisturbed.storage, tmp_path, ROUNDS, tolerance=1e-5)
    assert any(float(b.abs().max()) > 1e-3 for name, b in adapter(tmp_path, ROUNDS[-1]).items() if "lora_B" in name)
    keys = ["method", "trained", "edit", "probe", "wording"]
    alone, shared = (pd.read_parquet(one.finished.paths[2]) for one in (undisturbed, ours))
    alone = alone[alone.method != "lora"]
    alone, shared = (rows.sort_values(keys, ignore_index=True) for rows in (alone, shared))
    assert alone[[*keys, "output"]].equals(shared[[*keys, "output"]])
    assert alone.logp_new.to_numpy() == pytest.approx(shared.logp_new.to_numpy(), rel=1e-3, nan_ok=True)


def test_memit_is_refused_under_stage_3_before_anything_starts(tmp_path: Path) -> None:
    refused = run(
        [*TINY, *SHARDED, "--methods", "memit", "--storage", tmp_path / "none"], plain_environment(), status=2
    )
    assert "no worker has them whole: leave memit out of --methods" in refused.err
    assert not (tmp_path / "none").exists()
