"""The rendered book, read as files and opened in headless Chromium over HTTP; test_layout.py opens every page by its path."""

import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from book_browser import anchors, check_content, in_browser, open_page, soup
from book_build import ROOT, toc_pages

PAGES = toc_pages()
OVER_HTTP = [PAGES[0], *PAGES[1 :: len(PAGES) // 4][:4]]  # a file path is stricter: five suffice


def prose(path: Path) -> str:
    """The text of the article of a page without code and formulas."""
    article = soup(path).find("article")
    left_out = {
        id(text)
        for element in article.select("pre, code, .math, script, style")
        for text in element.strings
    }
    return "".join(text for text in article.strings if id(text) not in left_out)


# --- the pages as files


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_the_source_language_shows(book, page):
    path = book.html / f"{page}.html"
    code = "\n".join(block.get_text() for block in soup(path).select("div.highlight pre"))
    assert not [
        line for line in code.splitlines() if line.lstrip().replace("# |", "#|").startswith("#|")
    ]
    outputs = " ".join(one.get_text() for one in soup(path).select("div.cell_output"))
    assert "np.float64(" not in outputs, "a number is printed as NumPy writes it: format it"
    text = prose(path)
    for mark in (
        ":::",
        "```",
        "{cite",
        "{numref",
        "{eq}",
        "{doc}",
        "{ref}",
        "{admonition",
        "{figure",
        "$$",
        "{{",
        "**",
    ):
        assert mark not in text, (
            f"{mark!r} stands unrendered: …{text[max(0, text.find(mark) - 80) : text.find(mark) + 80]}…"
        )


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_one_title_and_each_figure_caption_and_alternative_text(book, page):
    article = soup(book.html / f"{page}.html").find("article")
    assert len(article.find_all("h1")) == 1
    for image in article.find_all("img"):
        alternative = image.get("alt", "")
        assert len(alternative) >= 15 and not alternative.startswith(("../", "_images")), (
            f"no alternative text: {image}"
        )
        figure = image.find_parent("figure")
        assert figure is not None and len(figure.find("figcaption").get_text(strip=True)) >= 15, (
            f"no caption: {image}"
        )
        assert "Fig." in figure.find("figcaption").get_text(), f"not numbered: {image}"


@pytest.mark.parametrize("page", [*PAGES, "search", "genindex"])
def test_links_lead_somewhere(book, page):
    path = book.html / f"{page}.html"
    broken = []
    for element in soup(path).select("a[href], img[src], script[src], link[href]"):
        target = element.get("href") or element.get("src")
        parts = urlsplit(target)
        if parts.scheme or target.startswith("//") or element.get("rel") == ["search"]:
            continue
        file, anchor = urldefrag(target)
        goal = (path.parent / unquote(urlsplit(file).path)).resolve() if file else path
        if not goal.is_file() or (
            anchor and goal.suffix == ".html" and unquote(anchor) not in anchors(goal)
        ):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", [*PAGES, "index", "search", "genindex"])
def test_no_page_names_another_host_to_load_from(book, page):
    path = book.html / f"{page}.html"
    loaded = soup(path).select("script[src], link[href], img[src], iframe[src], source[src]")
    foreign = [
        element for element in loaded if urlsplit(element.get("src") or element.get("href")).netloc
    ]
    assert not foreign
    text = path.read_text(encoding="utf-8")
    assert not [
        name for name in ("jsdelivr", "unpkg", "cdnjs", "googleapis", "THEBE") if name in text
    ]


def test_every_page_of_the_table_of_contents_is_linked_from_the_home_page(book):
    sidebar = soup(book.html / "nbs/index.html").select_one("nav.bd-links, .bd-sidebar-primary")
    linked = {Path(urlsplit(link["href"]).path).stem for link in sidebar.select("a[href]")}
    assert {Path(page).name for page in PAGES if page != "nbs/index"} <= linked


# --- the pages in a browser


@in_browser
@pytest.mark.parametrize("page", OVER_HTTP)
def test_page_opened_over_http(book, browser, server, page):
    errors, asked = open_page(browser, f"{server}/{page}.html")
    assert not errors
    foreign = [
        address
        for address in asked
        if not address.startswith((server, "data:", "blob:", "chrome:"))
    ]
    assert not foreign
    check_content(browser)


@in_browser
def test_the_root_leads_to_the_home_page(book, browser):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((book.html / "index.html").as_uri())
    WebDriverWait(browser, 20).until(lambda session: session.current_url.endswith("nbs/index.html"))
    headings = WebDriverWait(browser, 20).until(
        lambda session: session.find_elements("css selector", "article h1")
    )  # the address changes before the page is read
    assert headings[0].text.startswith("lpft-nb")


@in_browser
def test_search_finds_a_chapter(book, browser, server):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{server}/search.html?q=probe")
    results = WebDriverWait(browser, 20).until(
        lambda session: session.find_elements("css selector", "#search-results li a")
    )
    assert any("nbs/" in result.get_attribute("href") for result in results)


# --- the page of a local run


def executed_notebook(error: bool = False) -> dict:
    """A small executed notebook, as papermill leaves one."""
    outputs = [{"output_type": "stream", "name": "stdout", "text": "accuracy 0.5\n"}]
    if error:
        outputs.append(
            {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["no"]}
        )
    cells = [
        {
            "cell_type": "markdown",
            "id": "a",
            "metadata": {"papermill": {}, "tags": []},
            "source": "# A run\n\n> Of a test.",
        },
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {"papermill": {}, "tags": ["parameters"]},
            "source": "seed: int = 0",
            "execution_count": 1,
            "outputs": [],
        },
        {
            "cell_type": "code",
            "id": "c",
            "metadata": {"papermill": {}, "tags": []},
            "source": "print('accuracy', 0.5)",
            "execution_count": 2,
            "outputs": outputs,
        },
    ]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "papermill": {}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


EXTENSION = ("nbs/_ext/lpft_book.py", "nbs/_ext/warm_python.py")


def test_the_newest_run_that_came_through_becomes_a_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import book as book_script

    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    (project / "nbs" / "_ext").mkdir(parents=True)
    shutil.copytree(ROOT / "nbs" / "_static", project / "nbs" / "_static")
    for name in ("_config.yml", "references.bib", "nbs/references.md", *EXTENSION):
        shutil.copyfile(ROOT / name, project / name)
    (project / "nbs" / "home.md").write_text("# Home\n\nSee {cite:t}`kumar2022finetuning`.\n")
    (project / "_toc.yml").write_text(
        "format: jb-book\nroot: nbs/home\nparts:\n  - caption: Back\n    chapters:\n      - file: nbs/references\n"
    )
    (project / "runs" / "good.ipynb").write_text(json.dumps(executed_notebook()))
    (project / "runs" / "bad.ipynb").write_text(json.dumps(executed_notebook(error=True)))

    assert book_script.newest_run(project / "runs").name == "good.ipynb"
    assert book_script.build_book(project, tmp_path / "out") == 0, (
        tmp_path / "out/_build/book.log"
    ).read_text()
    page = soup(tmp_path / "out/_build/html/nbs/_runs/your_run.html").find("article").get_text()
    assert "accuracy 0.5" in page and "runs/good.ipynb" in page

    assert (
        book_script.prepare(project, tmp_path / "out/_build", include_run=False)
        == project / "_toc.yml"
    )
    assert not (project / "nbs" / "_runs").exists()
