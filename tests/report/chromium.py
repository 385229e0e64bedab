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
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.drawn") != "all":
        assert time.monotonic() < deadline, "the figures were not drawn within a minute"
        time.sleep(0.05)


def requests(browser: Any) -> list[str]:
    """Return the addresses asked for so far."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
