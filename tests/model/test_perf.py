"""The measurements at toy size. The tests check what is measured, never the durations."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from fact_files import one_counterfact_record
from tiny import CPU, LORA, shaken, tiny_model, triplets, with_reference

from corsa.algorithm.batch import Batch, MicroBatch, counts
from corsa.algorithm.packing import pack
from corsa.algorithm.row_settings import RowSettings
from corsa.algorithm.step import corsa_step
from corsa.cli.main import main
from corsa.config import STEPS, StepConfig, published_trainer
from corsa.errors import CorsaError
from corsa.flow.store import Record
from corsa.lora.flat import Lora
from corsa.models.encoding import Encoder
from corsa.perf import accelerator
from corsa.perf.accelerator import CHECKED, Case, cases, markdown, measure, measure_all
from corsa.perf.literal import literal_step
from corsa.perf.overhead import itemised
from corsa.perf.rounding import DROWNED, measure_rounding
from corsa.perf.timeline import Timeline, clock
from corsa.training.adamw import PlainAdamW
from corsa.training.tokens import batch_order
from corsa.training.worker_context import Loaded

pytestmark = pytest.mark.usefixtures("one_thread")


def after(steps: int, config: StepConfig, take: str) -> torch.Tensor:
    """Phi after some updates of the tiny model, in one of the two ways."""
    base = tiny_model()
    edits = with_reference(base, triplets(12))
    lora = shaken(Lora(base, LORA))
    optimizer = PlainAdamW(lora.phi)
    optimizer.param_groups[0]["lr"] = 2e-4
    timeline = Timeline(base, optimizer, clock(CPU))
    for chosen in batch_order(len(edits), 4, seed=0, round_=1, epoch=0)[:steps]:
        whole = [edits[i] for i in chosen]
        if take == "literal":
            literal_step(base, lora, whole, config, optimizer, clip=1.0)
        else:
            reference = torch.tensor([t.reference for t in whole]).T
            batch = Batch([MicroBatch(pack(whole), reference)], len(whole), counts([whole], CPU))
            timeline.start()
            corsa_step(timeline.model, lora.phi, batch, RowSettings.of([config], CPU), optimizer, 1.0, timeline.reduce)
            assert {"forward", "backward_1", "optimizer"} <= set(timeline.seconds)
            assert ("backward_2" in timeline.seconds) is (config.rho > 0)
            assert 0 < timeline.outside_the_passes < sum(timeline.seconds.values())
    return lora.phi.detach() - shaken(Lora(tiny_model(), LORA)).phi.detach()


@pytest.mark.parametrize(
    "config",
    [
        StepConfig(rho=0.3),
        StepConfig(rho=0.3, pcgrad="off", reduction="sequence"),
        published_trainer(StepConfig(rho=0.3)).model_copy(update={"scope": "step"}),
        StepConfig(rho=0.3, pcgrad="algorithm1"),
        StepConfig(rho=0.02, radius="relative"),
        StepConfig(rho=0.5, radius="adaptive"),
        STEPS["lora"](StepConfig()),
    ],
    ids=["corsa", "summed", "as the authors", "algorithm 1", "relative", "adaptive", "lora"],
)
def test_the_literal_and_the_packed_step_take_the_same_update(config: StepConfig) -> None:
    literal, packed = after(3, config, "literal"), after(3, config, "packed")
    assert float(literal.abs().max()) > 1e-4
    assert float((literal - packed).abs().max()) <= 1e-5


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["perf", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_is_measured_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "step", "--model", "random:tiny-llama", "--batch", "4", "--steps", "1", "--threads", "1")
    assert found["max_update_error"] <= 1e-5
    assert found["rounding"] is None  # float32 has nothing to compare
    assert 1.0 <= found["padding_ratio"] <= 1.08
    assert found["tokens_processed"] == pytest.approx(found["padding_ratio"] * found["tokens_needed"], abs=1)
    assert 0 < found["overhead_fraction"] < 1
    assert sum(found["breakdown_s"].values()) == pytest.approx(found["corsa_s"])
    assert found["corsa_over_lora"] == pytest.approx(found["corsa_s"] / found["lora_s"])
    assert found["literal_over_corsa"] == pytest.approx(found["literal_s"] / found["corsa_s"])


@pytest.mark.parametrize(("dtype", "rho"), [(torch.float32, 0.05), (torch.bfloat16, 3.0), (torch.bfloat16, 1e-5)])
def test_the_change_of_the_gradient_is_compared_with_that_in_float32(dtype: torch.dtype, rho: float) -> None:
    """In float32 nothing is lost. In bfloat16 a large perturbation survives and a tiny one does not."""
    model = tiny_model().to(dtype)  # type: ignore[arg-type]
    lora, edits = shaken(Lora(model, LORA), 0.02), triplets(4)
    loaded = Loaded(model, lora, cast(Encoder, None), packed=True)
    settings = RowSettings.of([StepConfig(rho=rho)], CPU)

    def batch() -> Batch:
        part = MicroBatch(pack(edits, dtype=model.dtype), torch.full((2, 4), -5.0), counts([edits], CPU))
        return Batch([part], 4, counts([edits], CPU))

    before = lora.phi.detach().clone()
    found = measure_rounding(loaded, batch, settings)
    assert torch.equal(lora.phi, before)
    assert model.dtype == torch.float32
    if dtype == torch.float32:
        assert found.change == found.change_float32 > 0
        assert found.cosine == pytest.approx(1.0)
    else:
        assert (found.cosine > DROWNED) == (rho == 3.0)
        assert ("survives" in found.told) == (rho == 3.0)
        assert found.change > found.change_float32 * (rho == 1e-5)


def test_a_batch_larger_than_the_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perf", "step", "--model", "random:tiny-llama", "--batch", "5000"]) == 2
    assert "lower --batch" in capsys.readouterr().err


def test_answers_are_those_of_transformers_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--limit", "2", "--repeats", "1", "--threads", "1", "--cpu-time")
    found = measured(capsys, "evaluate", "--model", "random:tiny-llama", *sizes)
    assert found["different_answers"] == 0
    assert found["probes"] > 2
    assert found["speedup"] == pytest.approx(found["probes_per_s"] / found["transformers_probes_per_s"])


def test_mmlu_is_answered_alike_with_the_worked_examples_computed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, questions in (("test", 6), ("dev", 5)):
        for subject in ("anatomy", "virology", "sociology"):
            file = tmp_path / part / f"{subject}_{part}.csv"
            file.parent.mkdir(exist_ok=True)
            rows = [
                f"Which one of {subject} is number {i} of {part}?,one,two,three,four,{i % 4}" for i in range(questions)
            ]
            file.write_text("question,choice0,choice1,choice2,choice3,answer\n" + "\n".join(rows))
    sizes = ("--limit", "4", "--subjects", "2", "--threads", "1", "--cpu-time")
    found = measured(capsys, "mmlu", "--data", str(tmp_path), "--model", "random:tiny-llama", *sizes)
    assert (found["questions"], found["subjects"]) == (8, 2)
    assert found["different_answers"] == 0
    assert found["largest_difference"] < 1e-4
    assert found["tokens"] < 0.5 * found["recomputed_tokens"]  # four questions share their examples
    assert found["speedup"] == pytest.approx(found["questions_per_s"] / found["recomputed_questions_per_s"])


@pytest.mark.process
def test_a_file_becomes_an_epoch_of_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = one_counterfact_record(tmp_path)
    found = measured(capsys, "data", "--data", str(file), "--edits", "5000", "--batch", "64")
    assert found["edits"] == 5000
    assert found["first_batch_s"] is None  # no cluster was requested
    assert 50 < found["memory_bytes_per_edit_tenfold"] < 1024
    assert found["padding_ratio"] >= 1.0
    assert found["table_bytes_per_edit"] > 4 * 10  # at least its token ids
    file.write_text("[]")
    assert main(["perf", "data", "--data", str(file)]) == 2
    assert "case_id" in capsys.readouterr().err


SCENARIO = """
import sys, time
from pathlib import Path
if "--dry-run" in sys.argv:
    sys.exit()
root = Path(sys.argv[sys.argv.index("--storage") + 1])
done = (root / "done").exists()
root.mkdir(exist_ok=True)
time.sleep(0 if done else 0.3)
(root / "done").touch()
"""


def record(name: str, kind: str, ends: float, seconds: float, **metrics: float) -> Record:
    created = datetime.fromtimestamp(ends, UTC).isoformat(timespec="milliseconds")
    rest = {
        "version": 1,
        "config": {},
        "inputs": {},
        "fingerprint": "f" * 64,
        "attempt": "a",
        "versions": {},
        "files": {},
    }
    return Record.model_validate(
        rest | {"name": name, "kind": kind, "seconds": seconds, "metrics": metrics, "created": created}
    )


def test_what_a_run_takes_beside_its_work_is_itemised() -> None:
    records = [
        record("edits/x", "edits", 1003.0, 1.0),
        record("reference/x", "reference", 1010.0, 5.0),
        record("x/base", "round", 1030.0, 9.0, evaluation_s=6.5, stream_s=3.0, loading_s=1.0, data_s=1.0),
        record("x/lora/seed0/round1", "round", 1050.0, 20.0, training_s=12.0, evaluation_s=6.5, checkpoints_s=1.0),
        record("report/x", "report", 1053.0, 2.0),
    ]
    found = itemised(records, began=1000.0, plain=0.5, wall=60.0, again=1.0)
    assert (found.training_s, found.evaluation_s, found.overhead_s, found.chains) == (12.0, 13.0, 35.0, 1)
    assert found.items_s == pytest.approx(
        {
            "imports and planning": 0.5,
            "edits": 1.0,
            "the import of Ray, and cluster start or connecting": 3.5,
            "reference": 5.0,
            "worker group start": 8.0,
            "data": 4.0,
            "model load": 1.0,
            "checkpoints and adapters": 1.0,
            "all else in rounds": 1.0,
            "report": 2.0,
            "between steps, and the end of workers and cluster": 8.0,
        }
    )
    assert sum(found.items_s.values()) == pytest.approx(found.overhead_s)


def test_a_run_is_taken_twice_and_only_into_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "scenario.py"
    script.write_text(SCENARIO)
    command = ("--command", f"python {script}", "--storage", str(tmp_path / "runs"))
    found = measured(capsys, "overhead", *command)
    assert found["wall_s"] >= 0.3
    assert found["wall_s"] > found["again_s"]
    assert main(["perf", "overhead", *command]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_case_is_checked_against_the_literal_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(CHECKED, "corsa", 0, "float32", edits=2, steps=1, gpu=False, rank=4, check=True)
    monkeypatch.setattr("corsa.planning.rates.matrix_product", lambda device: 2.0)
    found = measure(case)
    assert found["matmul_tflops"] == 2.0
    assert found["planned"] == sum(found["items"].values())
    monkeypatch.setattr("corsa.perf.literal._project", lambda g, other, eps: g + g.abs())
    with pytest.raises(CorsaError, match=r"away from the literal Algorithm 1, 0\.0001 is allowed"):
        measure(case)


def test_a_case_whose_check_fails_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of one method does not stop another, and the ratios are those of what was measured."""
    asked: list[Case] = []

    def run(case: Case, seconds: float) -> dict[str, Any]:
        asked.append(case)
        assert 0 < seconds <= 60 * 8
        if case.check and case.stage == 3:
            return {"error": "no module named deepspeed"}
        sizes = {"peak": 3 * 2**30 if case.method == "corsa" else 2**30, "planned": 2**30}
        return {"step_s": 0.6 if case.method == "corsa" else 0.3, "tflops": 5.0, "matmul_tflops": 20.0} | sizes

    monkeypatch.setattr(accelerator, "_in_a_process", run)
    chosen = list(cases(["random:a"], ["lora", "corsa"], [0, 3], edits=4, steps=2, gpu=False))
    said: list[str] = []
    found = measure_all(chosen, 8, said.append)
    assert [case.check for case in asked] == [True] * 4 + [False] * 2
    assert {case.model for case in asked if case.check} == {CHECKED}
    assert found["ratios"] == [{"model": "random:a", "stage": 0, "method": "corsa", "step": 2.0, "peak": 3.0}]
    assert [row["error"] for row in found["rows"] if "error" in row] == ["check failed: no module named deepspeed"] * 2
    assert "check on random:tiny-llama, corsa, stage 3: no module named deepspeed" in said
    shown = markdown(found)
    assert "| random:a | corsa | 0 | 0.6 | 5 | 25 % | 3.00 | 1.00 | 0.33 |" in shown
    assert "random:a, stage 0: corsa / lora 2.00 in time, 3.00 in memory" in shown


@pytest.mark.long
def test_the_command_for_a_machine_with_a_gpu_measures_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sharded step on the CPU: its cost, its plan, and a failing case that does not affect the others."""
    file = tmp_path / "gpu.json"
    cases = ("--models", "random:none-such,random:tiny-llama", "--methods", "corsa", "--stages", "3", "--steps", "1")
    assert main(["perf", "gpu", "--cpu", *cases, "--edits", "4", "--output", str(file)]) == 0
    table = capsys.readouterr().out
    broken, row = json.loads(file.read_text())["rows"]
    assert "none-such" in broken["error"]
    assert row["step_s"] > 0
    assert row["tflops"] > 0
    assert row["matmul_tflops"] > 0
    assert row["peak"] > row["items"]["base"] > 4 * row["parameters"] - 1
    assert row["planned"] == sum(row["items"].values())
    assert f"| random:tiny-llama | corsa | 3 | {row['step_s']:.3g} |" in table
    assert main(["plan", "--model", "random:tiny-llama", "--measured", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rate"]["tflops"] == row["tflops"]
