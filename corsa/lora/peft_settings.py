"""The settings of an adapter, `adapter_config.json`: read as text that anybody may have written."""

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
    """The settings that are read here; `None` is PEFT's for an absent one. The others may be anything."""

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
    """The settings of the adapter in a directory, of the types that PEFT writes.

    Raises:
        CorsaError: the file cannot be read, or a setting is not of its type or out of bounds.
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
    except ValueError as error:  # no JSON, no UTF-8, or a number with thousands of digits
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
    """What gives `lora_alpha` and `r` of a layer by its module name: its pattern's, by PEFT's rule (the first that
    matches the end of the name), else the adapter's.

    The patterns are regular expressions that anybody may have written. RE2 matches in time linear in the name's length.

    Raises:
        CorsaError: a pattern is no regular expression, or needs what no linear-time matcher has (look-around).
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
