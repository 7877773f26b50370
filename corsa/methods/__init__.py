"""The methods by name. Each has its own folder or file, with one record (`corsa.methods.base.Method`)."""

from __future__ import annotations

from corsa.config import Frozen
from corsa.errors import unknown_name
from corsa.methods import f_learning, joint, memit, step_methods
from corsa.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (*step_methods.METHODS, joint.METHOD, f_learning.METHOD, memit.METHOD)
}
"""Every method by name. The unedited model, "base", is evaluated in every scenario and is not a method."""


def known_method(name: str) -> Method:
    """The method of this name.

    Raises:
        CorsaError: there is none.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def looks_back(config: Frozen) -> bool:
    """Whether a round with this configuration is taught facts of earlier rounds again."""
    return any(m.looks_back(config) for m in METHODS.values() if m.config is type(config))


def method_of(config: Frozen) -> Method | None:
    """The method with this configuration type and its own teaching function; None if there is none."""
    return next((m for m in METHODS.values() if m.config is type(config) and m.load_teach), None)
