"""README.md is the home page: its text, its example, its figure, its links."""

import re
import xml.etree.ElementTree as ElementTree

from repository import ROOT


def test_readme_is_the_home_page_and_its_example_runs(book):
    """The book executes the home page; numbers in printed blocks are left open, the results table is not."""
    from readme import make_readme, read_home, without_measured_numbers

    assert book.failure("nbs/index") is None
    home, executed = read_home(), book.executed["nbs/index"].cells
    cells = [cell for cell in home.cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells] == [cell.source for cell in executed]
    for cell, done in zip(cells, executed, strict=True):
        cell.outputs = done.outputs
    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert without_measured_numbers(committed) == without_measured_numbers(make_readme(home)), (
        "run: make readme"
    )


def test_figure_of_the_readme_shows_the_published_records():
    """The numbers stand in the figure's description: drawings differ between versions of matplotlib, numbers do not."""
    from readme import FIGURE, figure_numbers, figure_rows, make_figure

    for text in (FIGURE.read_text(encoding="utf-8"), make_figure()):
        described = [
            node.text
            for node in ElementTree.fromstring(text).iter(
                "{http://purl.org/dc/elements/1.1/}description"
            )
        ]
        assert described == [figure_numbers(figure_rows())], "run: make readme"
        assert len(text.encode()) <= 60_000 and not re.search(r"<(?:script|image)\b|@import", text)


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [
        link
        for link in re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", text)
        if not (ROOT / link).exists()
    ] == []


def test_converter_turns_myst_into_githubs_markdown():
    from pybtex.database import parse_file
    from readme import markdown_text

    bibliography = parse_file(str(ROOT / "references.bib"))
    text = "See {cite:t}`kumar2022finetuning`, [a](01_tasks.ipynb), [b](../LICENSE), [c](https://example.org), [d](#e).\n\n```{important}\nOne.\nTwo.\n```"
    assert markdown_text(text, bibliography) == (
        "See Kumar et al. (2022), [a](nbs/01_tasks.ipynb), [b](LICENSE), [c](https://example.org), [d](#e).\n\n> [!IMPORTANT]\n> One.\n> Two."
    )
