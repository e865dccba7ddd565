"""The rendered book, one browser, and a server of its pages."""

import functools
import http.server
import shutil
import socketserver
import threading

import pytest
from book_browser import FLAGS
from book_build import built_book


@pytest.fixture(scope="session")
def book():
    built = built_book()
    if not built.html.is_dir():
        pytest.fail(
            f"the book was not rendered; the build said:\n{built.log[-2000:]}", pytrace=False
        )
    return built


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium (extra `dev`) is not installed"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and chromedriver are not installed: the browser tests did not run")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.set_script_timeout(60)
    yield session
    session.quit()


@pytest.fixture(scope="session")
def server(book):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(book.html))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
