"""A process that requests the embedded model: `python conversion.py LOG SECONDS`. The conversion is a fake."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from corsa.models import embedded


def convert(wheel: Path, target: Path) -> None:
    """Writes a line to the log, waits, and writes the model as two files."""
    with log.open("a") as file:
        file.write(f"{os.getpid()} {wheel}\n")
    target.mkdir()
    (target / "config.json").write_text("{}")
    time.sleep(seconds)
    (target / "model.safetensors").write_text("whole")


if __name__ == "__main__":
    log, seconds = Path(sys.argv[1]), float(sys.argv[2])
    embedded._wheel = lambda: Path("wheel")
    embedded._convert = convert
    print(embedded.embedded_model(), (embedded.embedded_model() / "model.safetensors").read_text())
