"""Every notebook: no outputs, a title, short exported cells with prose between them, captions, plain parameters."""

import ast
import re
from itertools import pairwise

import pytest
from book_build import ROOT, toc_pages
from repository import EXPERIMENTS, NOTEBOOKS, code_cells, is_exported, name_of, read, source

CELL_KEYS = {"tags", "mystnb"}
LONGEST_EXPORTED_CELL = 60


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_is_clean(path):
    notebook = read(path)
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert set(notebook["metadata"]) <= {"kernelspec", "mystnb"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= CELL_KEYS, source(cell)[:80]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, source(cell)[:80]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook_opens_with_a_title_and_a_subtitle(path):
    first = read(path)["cells"][0]
    lines = [line for line in source(first).splitlines() if line.strip()]
    assert first["cell_type"] == "markdown"
    assert lines[0].startswith("# ") and lines[1].startswith("> ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_exported_cells_are_short_and_explained(path):
    cells = [
        cell for cell in read(path)["cells"] if not re.match(r"#\|\s*default_exp", source(cell))
    ]
    for before, cell in pairwise(cells):
        if cell["cell_type"] == "code" and is_exported(cell):
            length = len(source(cell).splitlines())
            assert length <= LONGEST_EXPORTED_CELL, f"{length} lines: {source(cell)[:120]}"
            assert not (before["cell_type"] == "code" and is_exported(before)), (
                f"two exported cells in a row: {source(cell)[:120]}"
            )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_figure_has_a_caption_and_alternative_text(path):
    for cell in code_cells(path):
        settings = cell["metadata"].get("mystnb", {})
        if "figure" in settings or "image" in settings:
            assert settings["figure"]["caption"] and settings["figure"]["name"].startswith("fig-")
            assert len(settings["image"]["alt"]) >= 15


def test_figure_names_are_unique_in_the_book():
    names = [
        cell["metadata"]["mystnb"]["figure"]["name"]
        for path in NOTEBOOKS
        for cell in code_cells(path)
        if "figure" in cell["metadata"].get("mystnb", {})
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiment_has_one_parameters_cell_and_nothing_assigns_before_it(path):
    cells = code_cells(path)
    tagged = [
        index
        for index, cell in enumerate(cells)
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    assigning = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.NamedExpr, ast.For, ast.With)
    for cell in cells[: tagged[0]]:
        assert not [
            node for node in ast.walk(ast.parse(source(cell))) if isinstance(node, assigning)
        ], source(cell)
    for statement in ast.parse(source(cells[tagged[0]])).body:
        single = isinstance(statement, ast.AnnAssign) or (
            isinstance(statement, ast.Assign) and len(statement.targets) == 1
        )
        assert single and isinstance(
            getattr(statement, "target", None) or statement.targets[0], ast.Name
        ), ast.unparse(statement)
        assert statement.lineno == statement.end_lineno
    assert ";" not in re.sub(r"#.*", "", source(cells[tagged[0]]))
    assert not [cell for cell in cells if is_exported(cell)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_papermill_sees_every_parameter_of_an_experiment(path):
    papermill = pytest.importorskip("papermill")
    cell = next(
        cell for cell in code_cells(path) if "parameters" in cell["metadata"].get("tags", [])
    )
    assigned = [
        ast.unparse(getattr(statement, "target", None) or statement.targets[0])
        for statement in ast.parse(source(cell)).body
    ]
    assert list(papermill.inspect_notebook(str(path))) == assigned


def test_the_table_of_contents_names_every_chapter_once_and_nothing_else():
    pages = toc_pages()
    assert pages[0] == "nbs/index"
    chapters = sorted(
        name_of(path).removesuffix(".ipynb") for path in ROOT.glob("nbs/[0-9]*.ipynb")
    )
    named = [page for page in pages if re.match(r"nbs/\d", page)]
    assert sorted(named) == chapters
    assert len(set(pages)) == len(pages)
    for page in pages:
        assert (ROOT / f"{page}.ipynb").is_file() or (ROOT / f"{page}.md").is_file(), page


def test_every_cited_work_is_in_the_bibliography():
    from pybtex.database import parse_file

    known = set(parse_file(str(ROOT / "references.bib")).entries)
    for path in NOTEBOOKS:
        for keys in re.findall(
            r"\{cite(?::\w+)?\}`([^`]+)`", "\n".join(source(cell) for cell in read(path)["cells"])
        ):
            assert {key.strip() for key in keys.split(",")} <= known, path.name
