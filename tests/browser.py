"""Headless Chromium for tests of pages. Without it, the tests skip and name the reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")

Window = Any
"""A selenium.webdriver.Chrome; the type is not named, so that a checkout without selenium can still be checked."""

FLAGS = (
    "--headless",
    "--no-sandbox",  # a test may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@contextmanager
def chromium(profile: Path) -> Iterator[Window]:
    """A browser with a fresh profile in a separate directory; skips the test if there is no browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no Chromium with its chromedriver on this machine: install the packages chromium, chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield window
    finally:
        window.quit()


def sized(window: Window, width: int, height: int = 900, *, dark: bool = False, paper: bool = False) -> None:
    """Sets the page's width in CSS pixels, its colour scheme and its medium."""
    window.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    window.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {
            "media": "print" if paper else "screen",
            "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        },
    )
