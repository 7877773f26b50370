"""Programs that a model has written: the table they are kept in."""

from __future__ import annotations

import pyarrow as pa

PROGRAMS = pa.schema(
    [("problem", pa.string()), ("sample", pa.int32()), ("output", pa.string()), ("tokens", pa.int32())]
)
"""One row an answer; `tokens` without the end token: as many as were allowed means that it was cut off."""
