"""What the browser tests share: a page as a tree, a page in headless Chromium."""

import functools
import json
from pathlib import Path

import pytest

bs4 = pytest.importorskip("bs4", reason="beautifulsoup4 (extra `dev`) is not installed")
in_browser = pytest.mark.xdist_group("browser")  # one worker holds the one browser
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,1000",
]
MATHJAX_DONE = """
const done = arguments[arguments.length - 1];
const start = performance.now();
(function look() {
    const state = window.MathJax && MathJax.startup && MathJax.startup.promise;
    if (state) state.then(() => done("rendered"), error => done("failed: " + error));
    else if (performance.now() - start > 20000) done("MathJax did not load");
    else setTimeout(look, 50);
})();
"""


@functools.lru_cache
def soup(path: Path):
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.lru_cache
def anchors(path: Path) -> set[str]:
    """What an address on this page may name after its #."""
    return {element["id"] for element in soup(path).select("[id]")}


def open_page(browser, address: str) -> tuple[list[str], list[str]]:
    """Open a page and wait for its formulas; return the console's errors and the addresses it asked for."""
    browser.get("about:blank")  # the page before asks for nothing any more
    browser.get_log("browser"), browser.get_log("performance")  # empty both
    browser.get(address)
    state = (
        browser.execute_async_script(MATHJAX_DONE)
        if browser.find_elements("css selector", ".math")
        else "rendered"
    )
    assert state == "rendered", state
    errors = [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return errors, asked


def check_content(browser):
    """Formulas are set without errors; every image has arrived."""
    formulas = browser.find_elements("css selector", "article .math")
    set_formulas = browser.execute_script(
        "return document.querySelectorAll('article .math mjx-container').length"
    )
    assert set_formulas >= len(formulas)
    assert not browser.find_elements(
        "css selector", "mjx-merror, [data-mml-node='merror'], [data-mjx-error]"
    )
    missing = browser.execute_script(
        "return Array.from(document.images).filter(i => i.loading !== 'lazy' && (!i.complete || !i.naturalWidth)).map(i => i.src)"
    )
    assert not missing
