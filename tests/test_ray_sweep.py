"""Sweeps on a cluster: what remains when one is killed, and how a failed or slow trial affects the others."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray_cluster import Cluster, records, run, start, wait_until

pytest_plugins = ["ray_fixtures"]

SWEEP = "tune/sweep.py"
TINY = [
    *("--model", "random:tiny-llama", "--placement.threads", "1", "--evaluation.new-tokens", "4"),
    *("--development", "6", "--training.batch", "3", "--training.epochs", "8"),
]


def study(storage: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials, as plain Optuna reads them; empty before the study exists."""
    journal = storage / "studies/sweep/journal.log"
    if not journal.exists():
        return []
    found = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    return [trial for each in found.get_all_studies() for trial in found.get_all_trials(each._study_id)]


def results(out: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of trials and the best configuration, from the paths in the last lines of output."""
    _, table, best = (Path(line) for line in out.splitlines()[-3:])
    return pd.read_parquet(table), yaml.safe_load(best.read_text())


@pytest.mark.ray
def test_a_trial_that_diverges_is_recorded_and_the_others_end(cluster: Cluster, tmp_path: Path) -> None:
    space = ["--sampler", "grid", "--space.learning-rate", "2e-4,1e-3,1e30", "--trials", "3", "--pack", "3"]
    two = ["--objectives", "margin,edit_success", "--storage", tmp_path]
    out = run([*TINY, *space, *two], cluster.environment, pipeline=SWEEP).out
    table, best = results(out)
    again = ["--config", out.splitlines()[-1], "--storage", tmp_path, "--dry-run"]
    drawn = run(again, cluster.environment).out  # a pipeline accepts it
    assert "/corsa/seed0/round1" in drawn
    states = dict(zip(table.learning_rate, table.state, strict=True))
    assert states == {2e-4: "done", 1e-3: "done", 1e30: "failed"}
    assert "finite" in table.cause[table.state == "failed"].item()
    assert best["training"]["learning_rate"] in (2e-4, 1e-3)
    assert best["offset"] == 6  # the development facts are not asked again
    trained = [r.metrics["packed"] for name, r in records(tmp_path).items() if "/trial" in name]
    assert trained == [3, 3]  # with the third, in one worker group


@pytest.mark.long
def test_a_killed_sweep_keeps_what_is_finished_and_repeats_nothing(cluster: Cluster, tmp_path: Path) -> None:
    sweep = [*TINY, "--trials", "8", "--pack", "2", "--objectives", "margin", "--storage", tmp_path]

    def finished() -> dict[int, Any]:
        return {t.number: t for t in study(tmp_path) if t.state is TrialState.COMPLETE}

    process = start(sweep, cluster.environment, SWEEP)
    wait_until(lambda: finished() or process.poll() is not None, 200, "a finished trial")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before, begun = finished(), {t.number: t.params for t in study(tmp_path)}
    assert 0 < len(before) < 8
    rounds = {name: record.fingerprint for name, record in records(tmp_path).items()}
    began = time.monotonic()
    out = run(sweep, cluster.environment, pipeline=SWEEP).out
    assert time.monotonic() - began < 250
    table, _ = results(out)
    assert list(table.trial) == list(range(8))
    assert set(table.state) == {"done"}
    assert table[["lambda", "rho", "beta"]].drop_duplicates().shape[0] == 8
    after = {t.number: t for t in study(tmp_path)}
    assert {n: after[n].params for n in begun} == begun
    assert {n: after[n].datetime_complete for n in before} == {n: t.datetime_complete for n, t in before.items()}
    assert rounds.items() <= {name: record.fingerprint for name, record in records(tmp_path).items()}.items()


@pytest.mark.long
def test_a_poor_trial_is_stopped_early(cluster: Cluster, tmp_path: Path) -> None:
    # The first trial learns; the later ones hardly do. In any order, at least one finds better scores at its rung.
    learning = ["--training.learning-rate", "0.01", "--sampler", "grid", "--space.learning-rate", "1e-8,1e-7"]
    stop = ["--training.epochs", "40", "--stop", "asha", "--rung", "10", "--trials", "3"]
    last = ["--objectives", "margin", "--storage", tmp_path]
    table, best = results(run([*TINY, *learning, *stop, *last], cluster.environment, pipeline=SWEEP).out)
    assert best["training"]["learning_rate"] == 0.01
    stopped = table[table.state == "stopped"]
    assert len(stopped) >= 1
    assert set(stopped.stopped_at) <= {10, 20, 30}
    scores = {t.number: t.intermediate_values for t in study(tmp_path)}
    assert all(10 in scores[number] for number in table.trial)
