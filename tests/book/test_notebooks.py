"""Every chapter ran to its end when the book was built: one test a chapter, with the failing cell."""

import json
import resource
import subprocess
import sys

import pytest
from book_build import ROOT, built_book, toc_pages

PAGES = [page for page in toc_pages() if (ROOT / f"{page}.ipynb").is_file()]


@pytest.fixture(scope="module")
def book():
    return built_book()


@pytest.mark.parametrize("page", PAGES)
def test_chapter_runs(book, page):
    failure = book.failure(page)
    if failure:
        pytest.fail(f"{page}.ipynb\n{failure}", pytrace=False)
    assert page in book.executed, (
        f"{page}.ipynb was not executed; the build said:\n{book.log[-2000:]}"
    )


@pytest.mark.parametrize("page", PAGES)
def test_chapter_writes_nothing_to_stderr(book, page):
    notebook = book.executed.get(page)
    if notebook is None:
        pytest.skip("did not run to its end: see test_chapter_runs")
    written = [
        f"{cell.source.splitlines()[0]}\n  {output.text}"
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert not written, "\n".join(written)


@pytest.mark.parametrize("page", PAGES)
def test_chapter_was_executed_as_it_stands(book, page):
    """The executed code is the notebook's code: the book shows no stale result and no cell was passed over."""
    notebook = book.executed.get(page)
    if notebook is None:
        pytest.skip("did not run to its end: see test_chapter_runs")

    def code_lines(cells):
        sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        return [
            line
            for source in sources
            for line in source.splitlines()
            if line.strip() and not line.lstrip().startswith("#|")
        ]

    now = json.loads((ROOT / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert code_lines(notebook.cells) == code_lines(now)
    counts = [
        cell.execution_count
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.strip()
    ]
    assert counts == list(range(1, len(counts) + 1))


def loading_seconds():
    """CPU seconds that this machine takes to load what a chapter loads which trains a model."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import datasets; from transformers import BertModel, Trainer"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def limit():
    """Seconds for a chapter: 20, or on a machine that is slow today four times what loading the libraries takes there."""
    return max(20.0, 4 * min(loading_seconds() for _ in range(2)))


@pytest.mark.parametrize("page", PAGES)
def test_chapter_takes_at_most_twenty_seconds(book, limit, page):
    """CPU seconds of the kernel, which another load on the machine stretches less than the seconds on the wall."""
    if page not in book.executed:
        pytest.skip("did not run to its end: see test_chapter_runs")
    seconds = book.seconds[page]
    assert 0 < seconds["cpu"] <= limit or 0 < seconds["wall"] <= limit, (
        f"{page}.ipynb took {seconds['cpu']} s of CPU ({seconds['wall']} s on the wall), "
        f"of {limit:.1f}: cut the work, or read it from results/"
    )


def test_chapters_start_with_the_longest(monkeypatch):
    """Sphinx starts the first two chunks as they stand and takes the others from the end of the list."""
    monkeypatch.syspath_prepend(str(ROOT / "nbs" / "_ext"))
    from lpft_book import longest_first

    seconds = {page: {"wall": float(page[1:]), "cpu": 0.0} for page in ("p1", "p2", "p3", "p4")}
    chunks = longest_first(["p1", "p2", "new", "p3", "p4"], 2, seconds)
    started = [*chunks[:2], *reversed(chunks[2:])]
    assert started == [["new"], ["p4"], ["p3"], ["p2"], ["p1"]]


def test_the_book_built_without_warnings(book):
    warnings = "\n".join(
        line for line in book.log.splitlines() if "WARNING" in line or "ERROR" in line
    )
    assert book.status == 0, (
        f"jupyter-book build -n -W ended with {book.status}:\n{warnings or book.log[-3000:]}"
    )
