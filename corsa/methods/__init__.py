"""The methods by name. Each has its own file or folder here, with its record (`corsa.methods.base.Method`)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from corsa.config import Frozen
from corsa.errors import unknown_name
from corsa.methods.base import Method


def records() -> list[Method]:
    """`METHODS` of each module of this package, in the order of the modules' names; settings of the one step first."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = [method for module in modules for method in getattr(module, "METHODS", ())]
    return sorted(found, key=lambda method: method.load_teach is not None)


METHODS: dict[str, Method] = {method.name: method for method in records()}
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
