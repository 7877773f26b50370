"""The page of the code domain: rates of every method, by update, and the run behind them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from corsa.report.dag import Dag
from corsa.report.findings import findings
from corsa.report.layout import write_page
from corsa.report.paper_figures import with_measured


def write_code_report(directory: Path, *, metrics: dict[str, Any], run: Mapping[str, Any]) -> Path:
    """Write `report.html` into a directory and return its path.

    Args:
        directory: created if absent.
        metrics: the metrics from `corsa.experiments.code.steps`.
        run: facts about the run (`corsa.report.page.write_report`).
    """
    return write_page(
        directory,
        "code.html",
        title=run["title"],
        run=run,
        metrics=metrics,
        findings=[*findings(metrics), *metrics["notes"]],
        published=with_measured(metrics),
        dag=Dag.of(run["steps"]),
        config=yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True),
    )
