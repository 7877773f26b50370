"""The table of programs that a model has written."""

from __future__ import annotations

import pyarrow as pa

PROGRAMS = pa.schema(
    [("problem", pa.string()), ("sample", pa.int32()), ("output", pa.string()), ("tokens", pa.int32())]
)
"""One row per answer. `tokens` excludes the end token; if it equals the limit, the answer was cut off."""
