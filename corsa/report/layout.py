"""The common layout of all pages: style, figures and data in a single HTML file that needs no network.

Large data is folded: compressed and encoded as text. The page unfolds it after its text is displayed.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from corsa.report.findings import LOOKS_BACK, difference, drawn, label, marked, shown, undecided
from corsa.report.paper_figures import differs

BUNDLE = "plotly-basic.min.js.gz"
"""From the npm package plotly.js-basic-dist-min (MIT), in the same version as the full bundle in the plotly package."""

_BASIC = {"scatter", "bar", "pie"}


def write_page(
    directory: Path,
    template: str | Path,
    *,
    title: str,
    plots: Mapping[str, go.Figure] | None = None,
    answers: Mapping[str, Any] | None = None,
    **context: Any,
) -> Path:
    """Write `report.html` into a directory and return its path.

    Args:
        directory: created if absent.
        template: a template of this package, or the path of another one. It extends `layout.html` (blocks `header`
            and `main`) and can include the other templates here.
        title: the page's title and first heading.
        plots: the figures of the page, by the id of their element: `<div class="plot" id="...">`.
        answers: the result of `corsa.report.answers.folded_answers`, for pages that include `answers.html`.
        context: variables of the template.

    Raises:
        OSError: the directory is not writable.
    """
    loaders = [FileSystemLoader(template.parent)] if isinstance(template, Path) else []
    name = template.name if isinstance(template, Path) else template
    drawn = {id_: json.loads(str(plot.to_json())) for id_, plot in (plots or {}).items()}
    html = (
        _environment(loaders)
        .get_template(name)
        .render(
            title=title,
            plots=drawn,
            answers=answers,
            plotly=_plotly(drawn) if drawn else "",
            asset=lambda name: Markup(files("corsa.report").joinpath(name).read_text(encoding="utf-8")),
            folded=lambda value: folded(json.dumps(value, ensure_ascii=False, separators=(",", ":"))),
            **context,
        )
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def folded(text: str) -> Markup:
    """Compresses a text with gzip and encodes it as base64. `unfold` in `page.js` decodes it."""
    return _as_text(gzip.compress(text.encode(), mtime=0))


def _as_text(packed: bytes) -> Markup:
    return Markup(base64.b64encode(packed).decode())


def _plotly(plots: Mapping[str, dict[str, Any]]) -> Markup:
    """plotly.js, folded: the basic bundle if it is enough. That is a quarter of the full size and starts in a third of
    the time.
    """
    if {trace.get("type", "scatter") for plot in plots.values() for trace in plot["data"]} <= _BASIC:
        return _as_text(files("corsa.report").joinpath(BUNDLE).read_bytes())
    return folded(get_plotlyjs())


def duration(seconds: float | None) -> str:
    """Formats seconds for people: 0.4 s, 41 s, 2 min 10 s, 3 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _environment(loaders: list[FileSystemLoader]) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([*loaders, PackageLoader("corsa.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label, "marked": marked, "duration": duration, "pairs": _pairs}
    environment.globals |= {"shown": shown, "drawn": drawn, "difference": difference, "undecided": undecided}
    environment.globals |= {"differs": differs, "looks_back": LOOKS_BACK}
    return environment


def _pairs(value: Any) -> list[tuple[str, str]]:
    """A mapping as rows of text; anything else as one unnamed row."""
    if isinstance(value, Mapping):
        return [(str(key), str(item)) for key, item in value.items()]
    return [("", str(value))] if value else []
