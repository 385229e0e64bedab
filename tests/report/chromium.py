"""A page in a real browser."""

import json
import time
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


def open_page(browser: Any, page: Path) -> None:
    """Open a page and wait until its script has drawn everything."""
    browser.get(page.as_uri())
    _drawn(browser)


def _drawn(browser: Any) -> None:
    deadline = time.monotonic() + 60
    wanted = "document.querySelectorAll('.plot').values().every(plot => plot.closest('details.run:not([open])') || "
    wanted += "plot.hidden || plot.querySelector('svg.main-svg'))"
    while not browser.execute_script(f"return document.documentElement.dataset.drawn === 'all' && {wanted}"):
        assert time.monotonic() < deadline, "the figures were not drawn within a minute"
        time.sleep(0.05)


def unfold(browser: Any) -> None:
    """Open the details of every run, and wait until their figures are drawn."""
    browser.execute_script("document.querySelectorAll('details.run').forEach(run => { run.open = true; })")
    _drawn(browser)


def requests(browser: Any) -> list[str]:
    """Return the addresses asked for so far."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
