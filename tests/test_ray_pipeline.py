"""The pipeline end to end on a cluster: its results, what it recomputes, and with how many workers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from ray_cluster import (
    TINY,
    Cluster,
    Run,
    adapter,
    assert_same_adapters,
    plain_environment,
    records,
    run,
)

from corsa.evaluation.predict import PREDICTIONS
from corsa.flow import Store
from corsa.training.tokens import batch_order

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]  # the first test waits for the cluster and the shared run
pytest_plugins = ["ray_fixtures"]

ROUNDS = [f"world_facts-x3/{method}/seed0/round{number}" for method in ("lora", "corsa") for number in (1, 2, 3)]
BASE = "world_facts-x3/base"
FACTS, BATCH, EPOCHS = 7, 3, 40
REVISED = 4  # half of seven facts, rounded to even


def curves(run: Run) -> pd.DataFrame:
    return pd.read_parquet(run.finished.paths[0].with_name("curves.parquet"))


def test_a_run_ends_with_three_paths_and_a_table(undisturbed: Run) -> None:
    paths = undisturbed.finished.paths
    assert [path.name for path in paths] == ["report.html", "metrics.json", "predictions.parquet"]
    assert all(path.is_file() and path.is_absolute() for path in paths)
    assert "update efficacy" in undisturbed.finished.out
    assert "Traceback" not in undisturbed.finished.out + undisturbed.finished.err
    assert set(undisturbed.records) == {
        *(
            "edits/world_facts-x3",
            "reference/world_facts-x3",
            "schedule/world_facts-x3",
            BASE,
            "report/continual",
            *ROUNDS,
        )
    }


def test_what_a_method_cost_is_the_training_of_all_its_rounds(undisturbed: Run) -> None:
    cost = json.loads(undisturbed.finished.paths[1].read_text())["cost"]
    assert cost.keys() == {"lora", "corsa"}
    for method, seconds in cost.items():
        own = [record.metrics["training_s"] for name, record in undisturbed.records.items() if f"/{method}/" in name]
        assert len(own) == 3
        assert seconds == pytest.approx(sum(own))


def test_what_was_asked_is_in_the_predictions(undisturbed: Run) -> None:
    table = pq.read_table(undisturbed.finished.paths[2])
    assert {field.name for field in table.schema} == {*PREDICTIONS.names, "case"}  # what an interval takes as drawn
    rows = table.to_pandas()
    for (method, trained), asked in rows[rows.method != "base"].groupby(["method", "trained"]):
        edits = asked.drop_duplicates("edit")
        assert len(edits) == FACTS, f"{method} after round {trained}"  # each chain with its latest edit
        assert set(edits[edits.part == "update"].learnt) == {trained}
        assert set(edits[edits.part == "evaluation"].learnt) == {1}
        assert (edits.part == "update").sum() == REVISED
        assert not asked.duplicated(["edit", "probe", "wording"]).any()
    base = rows[rows.method == "base"]
    assert (base.seed == 0).all()
    assert (base.trained == 0).all()
    assert base.edit.nunique() == FACTS + 2 * REVISED  # all facts that any round teaches


def test_every_round_leaves_an_adapter_that_peft_loads(undisturbed: Run) -> None:
    from peft import PeftModel

    from corsa.config import ModelConfig
    from corsa.models.loading import load_model

    base = load_model(ModelConfig(name="random:tiny-llama"))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    factors = {name: adapter(undisturbed.storage, name) for name in ROUNDS}
    for name in ROUNDS:
        assert any(float(b.abs().max()) > 0 for key, b in factors[name].items() if "lora_B" in key), name
    for earlier, later in (ROUNDS[0:2], ROUNDS[2::3]):
        assert any(not factors[earlier][key].equal(factors[later][key]) for key in factors[earlier])
    directory = Store(undisturbed.storage).artifact(undisturbed.records[ROUNDS[-1]].fingerprint).path("adapter")
    loaded = PeftModel.from_pretrained(base, directory)  # type: ignore[arg-type]
    state = {name.replace(".default", ""): value for name, value in loaded.state_dict().items()}
    assert all(state[key].equal(value) for key, value in factors[ROUNDS[-1]].items())
    assert len(factors[ROUNDS[-1]]) == 2 * sum("proj" in name for name in before)  # every linear layer of the decoder


def test_the_curves_hold_every_step_once_and_every_epoch_all_edits(undisturbed: Run) -> None:
    for (_, number), rows in curves(undisturbed).groupby(["method", "round"]):
        round_ = int(str(number))
        edits = FACTS if round_ == 1 else REVISED
        steps = -(-edits // BATCH)
        assert rows.step.tolist() == list(range(1, steps * EPOCHS + 1))
        assert rows.epoch.tolist() == [epoch for epoch in range(1, EPOCHS + 1) for _ in range(steps)]
        assert not rows.skipped.any()
        assert rows.learning_rate.iloc[0] > 0
        assert rows.loss_sft.iloc[-steps:].mean() < rows.loss_sft.iloc[:steps].mean()
        for epoch in range(EPOCHS):
            order = batch_order(edits, BATCH, seed=0, round_=round_, epoch=epoch)
            assert sorted(i for batch in order for i in batch) == list(range(edits))


def test_the_first_steps_mean_log_probabilities_are_the_references(undisturbed: Run) -> None:
    """Recovers the batches of an epoch from the curves: with phi at zero, each batch shows its edits' reference."""
    reference = Store(undisturbed.storage).artifact(undisturbed.records["reference/world_facts-x3"].fingerprint)
    column = pd.read_parquet(reference.path("reference.parquet")).set_index("id")
    schedule = Store(undisturbed.storage).artifact(undisturbed.records["schedule/world_facts-x3"].fingerprint)
    taught = pd.read_parquet(schedule.path("schedule.parquet"))
    ids = taught[taught.learnt == 1].edit.tolist()
    first = curves(undisturbed)
    first = first[(first["round"] == 1) & (first.step == 1)]
    chosen = column.loc[[ids[i] for i in batch_order(FACTS, BATCH, seed=0, round_=1, epoch=0)[0]]]
    assert first.logp_new.tolist() == pytest.approx([chosen.reference_new.mean()] * 2, rel=1e-5)
    assert first.logp_old.tolist() == pytest.approx([chosen.reference_old.mean()] * 2, rel=1e-5)
    corsa = first[first.method == "corsa"]
    assert corsa.loss_dpo.tolist() == pytest.approx([0.693147], abs=1e-5)  # ln 2: nothing is learnt yet


def test_the_reference_is_computed_once_for_all_methods_and_rounds(undisturbed: Run) -> None:
    found = undisturbed.records
    edits = found["edits/world_facts-x3"].metrics["edits"]
    assert found["reference/world_facts-x3"].metrics["reference_forwards"] == edits == 3 * FACTS
    assert {found[name].inputs["reference"] for name in (*ROUNDS, BASE)} == {
        found["reference/world_facts-x3"].fingerprint
    }


def test_the_second_run_computes_nothing_and_starts_nothing(undisturbed: Run, tmp_path: Path) -> None:
    before = stamps(undisturbed.storage)
    (tmp_path / "ray.py").write_text("raise ImportError('ray was imported')")
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = plain_environment() | {"PYTHONPATH": str(tmp_path)}  # without a cluster, and unable to start one
    again = run([*TINY, "--storage", undisturbed.storage], environment)
    assert again.seconds < 10
    assert "11 steps: 11 done, 0 to do" in again.out
    assert "dashboard" not in again.out
    assert again.out.split("0 to do\n")[1] == table_of(undisturbed)
    assert stamps(undisturbed.storage) == before


def table_of(run: Run) -> str:
    """The output at the end of a run: the table and the paths."""
    before, _, after = run.finished.out.partition("done     report/continual")
    assert before
    return after.partition("\n")[2]


def stamps(storage: Path) -> dict[str, int]:
    """When each step was recorded."""
    store = Store(storage)
    return {
        name: (storage / store.record_path(record.fingerprint)).stat().st_mtime_ns
        for name, record in records(storage).items()
    }


def test_a_dry_run_says_that_all_is_done(undisturbed: Run) -> None:
    drawn = run([*TINY, "--storage", undisturbed.storage, "--dry-run"], plain_environment()).out
    assert "11 steps: 11 done, 0 to do" in drawn
    assert all(name in drawn for name in undisturbed.records)
    other = run([*TINY, "--storage", undisturbed.storage, "--dry-run", "--seeds", "0,1"], plain_environment()).out
    assert "17 steps: 10 done, 7 to do" in other  # six rounds of the other seed, and a separate report


def test_one_more_seed_trains_only_that_seed(undisturbed: Run, cluster: Cluster) -> None:
    before = stamps(undisturbed.storage)
    more = run([*TINY, "--storage", undisturbed.storage, "--methods", "lora", "--seeds", "0,1"], cluster.environment)
    assert "11 steps: 7 done, 4 to do" in more.out
    after = stamps(undisturbed.storage)
    assert before.items() <= {**after, "report/continual": before["report/continual"]}.items()
    assert set(after) - set(before) == {f"world_facts-x3/lora/seed1/round{number}" for number in (1, 2, 3)}
    rows = pd.read_parquet(more.paths[2])
    assert set(rows[rows.method == "lora"].seed) == {0, 1}
    assert set(rows.method) == {"base", "lora"}


def test_two_workers_learn_what_one_learns(
    undisturbed: Run,
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    two = Run(tmp_path, run([*TINY, "--storage", tmp_path, "--workers", "2"], cluster.environment))
    assert_same_adapters(undisturbed.storage, tmp_path, ROUNDS, tolerance=1e-5)
    # Every edit counts once: batch means would change if one were dropped, repeated or weighted twice.
    columns = ["loss_sft", "logp_new", "logp_old", "grad_norm"]
    mine, theirs = curves(undisturbed), curves(two)
    assert mine.step.tolist() == theirs.step.tolist()
    assert mine[columns].to_numpy() == pytest.approx(theirs[columns].to_numpy(), rel=1e-3)
    keys = ["method", "trained", "edit", "probe", "wording"]
    asked = [pd.read_parquet(one.finished.paths[2]).sort_values(keys, ignore_index=True) for one in (undisturbed, two)]
    assert asked[0][[*keys, "prompt", "answer"]].equals(asked[1][[*keys, "prompt", "answer"]])
    assert asked[0].logp_new.to_numpy() == pytest.approx(asked[1].logp_new.to_numpy(), rel=1e-3, nan_ok=True)
