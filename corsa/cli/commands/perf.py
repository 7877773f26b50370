"""`corsa perf ...`: one module of this folder for each group of measurements."""

from __future__ import annotations

from tyro.extras import SubcommandApp

from corsa.cli.commands import app

perf = SubcommandApp()
app.command(perf, name="perf", help="Measure speed and memory.")
