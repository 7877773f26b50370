"""Runs the examples in docstrings. Those of `edit` and `evaluate` need a cluster: tests/test_ray_edit.py."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.process

MODULES = (
    "corsa.errors",
    "corsa.data.text",
    "corsa.data.paraphrase_templates",
    "corsa.evaluation.matching",
    "corsa.data.benchmarks.world_facts",
    "corsa.flow.progress",
    "corsa.flow.waiting",
    "corsa.editing.merging",
    "corsa.api",
)
NEED_A_CLUSTER = ("corsa.api.edit", "corsa.api.evaluate")


def tiny_adapter(directory: str) -> None:
    """A PEFT directory of rank 2 on one layer."""
    import torch

    from corsa.lora.factors import Factors
    from corsa.lora.peft_format import write_factors

    write_factors({"layer": Factors(torch.ones(2, 4), torch.ones(3, 2))}, Path(directory), "random:tiny-llama")


def run(name: str, examples: tuple[str, ...] | None, **names: Any) -> doctest.TestResults:
    """The examples of a module, or some of them, with `names` as globals."""
    module = import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
        if test.examples and (test.name in examples if examples else test.name not in NEED_A_CLUSTER):
            runner.run(test)
    return doctest.TestResults(runner.failures, runner.tries)


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str) -> None:
    result = run(name, None, _tiny_adapter=tiny_adapter)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_api_is_a_handful_of_names_and_loads_nothing_at_first() -> None:
    import subprocess
    import sys

    code = (
        "import sys, corsa\n"
        "assert not {'torch', 'ray', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "print(sorted(n for n in dir(corsa) if callable(getattr(corsa, n)) and n in corsa.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['edit', 'evaluate', 'load_edits', 'merge', 'to_dataset']"
