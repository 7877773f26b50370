"""The report page in a browser: on a desktop and a phone, light and dark, in print, with many answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import Window, chromium, sized
from synthetic_run import RUN, curves, predictions

from corsa.evaluation.metrics import compute
from corsa.report.page import Scenario, write_paper, write_report

pytestmark = pytest.mark.process

READY = "const data = document.documentElement.dataset; return data.drawn === 'yes' && data.listed === 'yes'"


def long_winded(chains: int) -> pd.DataFrame:
    """Answers as long and as varied as a model's."""
    table = predictions(chains=chains)
    table["output"] += [f", and then it said something about {n % 9973} and {n * n} others" for n in range(len(table))]
    return table


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A page of more than 50,000 answers, and the number of answers of edited models."""
    table = long_winded(chains=1300)
    assert len(table) > 50_000
    few = compute(predictions(chains=16))
    directory = tmp_path_factory.mktemp("many")
    page = write_report(directory, metrics=few, predictions=table, curves=curves(), run=RUN)
    return page, table[table.method != "base"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    with chromium(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def page(browser: Window, tmp_path_factory: pytest.TempPathFactory) -> Window:
    """A page of a small run, opened once."""
    table = predictions(chains=8)
    directory = tmp_path_factory.mktemp("page")
    opened(browser, write_report(directory, metrics=compute(table), predictions=table, curves=curves(), run=RUN))
    return browser


def opened(browser: Window, page: Path) -> None:
    browser.get(page.as_uri())
    awaited(lambda: browser.execute_script(READY))


def awaited(look: Callable[[], Any], seconds: float = 60) -> Any:
    """The first non-empty result of `look`."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "the page never got there"
        time.sleep(0.05)
    return found


def chosen(browser: Window, name: str, option: str) -> None:
    """Chooses an option of a select as a user would."""
    browser.find_element("xpath", f"//select[@name='{name}']/option[.='{option}']").click()


def complaints(browser: Window) -> list[Any]:
    """Console messages of our pages. The browser's own first page sometimes reports a slow network."""
    return [entry for entry in browser.get_log("browser") if not entry["message"].startswith("chrome://")]


def test_fifty_thousand_answers_are_ready_in_two_seconds(browser: Window, many: tuple[Path, pd.DataFrame]) -> None:
    """Measures the CPU seconds of the page's main thread, which other work on this machine does not change."""

    def worked() -> float:
        found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(entry["value"] for entry in found if entry["name"] == "TaskDuration")

    sized(browser, 1440)
    browser.get("about:blank")
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    before = worked()
    opened(browser, many[0])
    assert worked() - before < 2
    assert many[0].stat().st_size < 8e6
    assert complaints(browser) == []


def test_search_and_filters_find_what_the_table_holds(browser: Window, many: tuple[Path, pd.DataFrame]) -> None:
    table = many[1]
    opened(browser, many[0])

    def shown() -> int:
        text = browser.find_element("id", "answers-count").text
        return int(text.split(" of ")[1].split()[0].replace(",", "")) if " of " in text else 0

    def outcome(value: str) -> None:
        browser.execute_script("document.querySelector(`[name=outcome][value='${arguments[0]}']`).click()", value)

    assert shown() == len(table)
    neighbor = table.kind == "neighbor"
    outcome("took")
    assert shown() == (table.matched_new & ~neighbor).sum()
    outcome("reverted")
    assert shown() == (~table.matched_new & table.matched_old & ~neighbor).sum()
    outcome("failed")
    assert shown() == (~table.matched_new & ~table.matched_old & ~neighbor).sum()
    answers = browser.find_elements("css selector", "#answers-table .gives")
    assert {answer.text.split(",")[0] for answer in answers} == {"neither answer"}
    outcome("changed")
    changed = shown()
    outcome("unchanged")
    assert changed + shown() == neighbor.sum()
    outcome("")

    chosen(browser, "method", "CoRSA")
    chosen(browser, "trained", "3")
    narrowed = table[(table.method == "corsa") & (table.trained == 3)]
    assert shown() == len(narrowed)
    search = browser.find_element("name", "search")
    search.send_keys("ORGANISATION 77,")
    assert shown() == narrowed.prompt.str.contains("organisation 77,").sum() > 0
    search.send_keys("no such words")
    assert "No answer fits" in browser.find_element("id", "answers-count").text
    assert not browser.find_element("id", "answers-table").is_displayed()
    search.clear()

    first = browser.find_element("css selector", "#answers-table tbody tr").text
    browser.execute_script("document.querySelector(`#answers [data-go='1']`).click()")
    assert browser.find_element("css selector", "#answers-table tbody tr").text != first
    assert browser.find_element("id", "answers-count").text.startswith("26–50 of")
    assert complaints(browser) == []


CUT_OFF = """
const width = arguments[0];  // not innerWidth: a phone's grows with what does not fit
const scrolls = (part) => part.closest('.wide') !== null;
const beyond = [...document.querySelectorAll('body *')].filter((part) => {
  const box = part.getBoundingClientRect();
  return box.width > 1 && box.right > width + 1 && !scrolls(part) && !part.closest('svg.main-svg');
});
return [document.documentElement.scrollWidth - width, beyond.map((part) => part.outerHTML.slice(0, 80))];
"""


def assert_nothing_is_cut_off(page: Window, *, dark: bool = False) -> None:
    """All sections open, on a phone and on a desktop."""
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    for width in (390, 1440):
        sized(page, width, dark=dark)
        time.sleep(0.3)  # the figures follow the width
        assert page.execute_script(CUT_OFF, width) == [0, []]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_cut_off_and_everyone_can_read_it(page: Window, dark: bool) -> None:
    assert_nothing_is_cut_off(page, dark=dark)
    page.execute_script(files("axe_core_python").joinpath("axe.min.js").read_text())
    found = page.execute_async_script(
        "const done = arguments[0]; axe.run({exclude: [['.plot']]}, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', "
        "'wcag21aa', 'best-practice']}).then((result) => done(result.violations))"
    )
    assert [(rule["id"], [node["html"][:150] for node in rule["nodes"][:3]]) for rule in found] == []
    assert complaints(page) == []


def test_figures_answer_the_pointer(page: Window) -> None:
    plot = page.find_element("id", "rounds-0")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    page.execute_script("Plotly.Fx.hover(arguments[0], [{curveNumber: 1, pointNumber: 0}])", plot)
    text = awaited(lambda: plot.find_element("css selector", ".hoverlayer .hovertext").text)
    assert "%" in text


def test_paper_shows_what_the_screen_folds_away(page: Window) -> None:
    page.execute_script("for (const part of document.querySelectorAll('details')) part.open = false")
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert page.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    sized(page, 720, paper=True)
    assert not page.find_element("id", "answers-filters").is_displayed()
    assert page.execute_script("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert page.execute_script("return document.querySelectorAll('details:not([open])').length") > 0


def test_nothing_is_cut_off_of_several_scenarios_with_long_titles(browser: Window, tmp_path: Path) -> None:
    table = predictions(chains=4)
    one = Scenario(compute(table), table, curves(), RUN)
    titles = [f"{name}: counterfact and mquake-remastered on an-organisation/a-model-32b" for name in ("one", "two")]
    opened(browser, write_paper(tmp_path, dict.fromkeys(titles, one), RUN))
    assert_nothing_is_cut_off(browser)
    assert complaints(browser) == []
