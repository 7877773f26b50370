"""Reads the settings of an adapter, `adapter_config.json`, as an untrusted file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corsa.errors import CorsaError

FILE = "adapter_config.json"
_LARGEST = 4 << 20  # bytes; PEFT writes about one KiB

_Rank = Annotated[int, Field(strict=True, ge=1, le=65_536)]
_Alpha = Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]
_Pattern = Annotated[str, Field(max_length=1_000)]


class _Settings(BaseModel):
    """The settings that are read here. `None` is PEFT's value for an absent setting. Other settings are not checked."""

    model_config = ConfigDict(extra="allow")

    peft_type: str | None = None
    base_model_name_or_path: Annotated[str, Field(max_length=4_096)] | None = None
    bias: str | None = None
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    rank_pattern: Annotated[dict[_Pattern, _Rank], Field(max_length=10_000)] | None = None
    alpha_pattern: Annotated[dict[_Pattern, _Alpha], Field(max_length=10_000)] | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = True


def read_settings(directory: Path) -> dict[str, Any]:
    """The settings of the adapter in a directory, with the types that PEFT writes.

    Raises:
        CorsaError: the file cannot be read, or a setting has a wrong type or is out of bounds.
    """
    file = directory / FILE
    try:
        with file.open("rb") as content:
            text = content.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise CorsaError(f"{file} has more than {_LARGEST >> 20} MiB: it is no adapter's configuration")
        found = json.loads(text)
    except OSError as error:
        raise CorsaError(f"{file} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise CorsaError(f"{file} is nested too deeply to be an adapter's configuration") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number with thousands of digits
        raise CorsaError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise CorsaError(f"{file} holds no settings of an adapter, but a {type(found).__name__}")
    try:
        _Settings.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise CorsaError(f"{file}: {where}: {first['msg']} (found {repr(first['input'])[:80]})") from error
    return found


def alpha_and_rank(settings: Mapping[str, Any], file: Path) -> Callable[[str], tuple[float, int]]:
    """A function from a layer's module name to its `lora_alpha` and `r`: those of the first pattern that matches the
    end of the name (PEFT's rule), else the adapter's.

    The patterns are untrusted regular expressions. RE2 matches in time linear in the name's length.

    Raises:
        CorsaError: a pattern is not a regular expression, or needs look-around, which linear-time matching excludes.
    """
    import re2

    quiet = re2.Options()
    quiet.log_errors = False

    def compiled(name: str) -> list[tuple[Any, Any]]:
        found = []
        for pattern, value in (settings.get(name) or {}).items():
            try:
                found.append((re2.compile(rf"(?:.*\.)?(?:{pattern})$", options=quiet), value))
            except re2.error as error:
                raise CorsaError(
                    f"{file}: {name}: {pattern[:80]!r} cannot be matched in linear time: give the names of layers"
                ) from error
        return found

    alphas, ranks = compiled("alpha_pattern"), compiled("rank_pattern")

    def of(module: str) -> tuple[float, int]:
        alpha = next((value for pattern, value in alphas if pattern.match(module)), settings.get("lora_alpha", 8))
        return alpha, next((value for pattern, value in ranks if pattern.match(module)), settings.get("r", 8))

    return of
