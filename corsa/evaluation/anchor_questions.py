"""The everyday questions whose answers an update is taught to leave as they are (`training.anchor`)."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import yaml
from pydantic import TypeAdapter

from corsa.data.edit import Text

_FILE = Path(__file__).with_name("anchor_questions.yaml")


@cache
def anchor_questions() -> tuple[str, ...]:
    """The questions that come with the project. None is among those that reports ask (`sanity_questions`)."""
    return TypeAdapter(tuple[Text, ...]).validate_python(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def digest() -> str:
    """The SHA-256 of the questions file: besides the model, the answers depend on it."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest()
