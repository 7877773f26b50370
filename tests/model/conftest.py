"""Fixtures of the tests of the step."""

from __future__ import annotations

import pytest
import torch
from literal_step import Setting


@pytest.fixture(scope="module")
def made() -> Setting:
    return Setting()


@pytest.fixture
def setting(made: Setting) -> Setting:
    with torch.no_grad():
        made.lora.phi.copy_(made.start)
    return made
