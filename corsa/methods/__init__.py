"""One folder (or file) a method, each with one record (`corsa.methods.base.Method`); here they are by name."""

from __future__ import annotations

from corsa.config import Frozen
from corsa.errors import unknown_name
from corsa.methods import f_learning, memit, step_methods
from corsa.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (*step_methods.METHODS, f_learning.METHOD, memit.METHOD)
}
"""Every method by name. The unedited model, "base", is asked in every scenario and is none of them."""


def known_method(name: str) -> Method:
    """The method of this name.

    Raises:
        CorsaError: there is none.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def method_of(config: Frozen) -> Method | None:
    """The method whose rounds have a configuration of this type and a function of their own; None: it has none."""
    return next((m for m in METHODS.values() if m.config is type(config) and m.load_teach), None)
