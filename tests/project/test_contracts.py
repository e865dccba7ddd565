"""Which module may import which: the contracts of pyproject.toml, kept by the package and broken by planted imports."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import MODULES, ROOT, name_of

LONGEST_MODULE = 400  # lines


def broken(tree: Path) -> str:
    """The contracts that the package in `tree` breaks, as import-linter tells them; empty where it keeps all."""
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or pytest.skip(
        "import-linter (extra `dev`) is not installed"
    )
    done = subprocess.run(
        [lint, "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    assert "Contracts:" in done.stdout, done.stdout + done.stderr  # it came as far as the contracts
    return done.stdout if done.returncode else ""


def test_the_package_keeps_its_contracts():
    assert broken(ROOT) == ""


PLANTED = {
    "store/names.py": ("from lpft_nb.metrics import scores", "lpft_nb.store -> lpft_nb.metrics"),
    "models/head.py": ("from lpft_nb.tasks import Task", "lpft_nb.models -> lpft_nb.tasks"),
    "training/loop.py": ("from lpft_nb import stages", "lpft_nb.training -> lpft_nb.stages"),
    "classifier.py": ("import lpft_nb.experiments", "lpft_nb.classifier -> lpft_nb.experiments"),
    "plot.py": ("from .records import load_results", "lpft_nb.plot -> lpft_nb.records"),
    "metrics.py": ("import lpft_nb.store.tables", "lpft_nb.metrics -> lpft_nb.store"),
    "homeless.py": ("", "homeless"),
}  # module: (the import that goes into a function of it, how the report names the fault)


def test_every_rule_catches_an_import_that_breaks_it(tmp_path):
    """Lazy imports, in one copy of the package: each of them must be named."""
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    shutil.copytree(ROOT / "lpft_nb", tmp_path / "lpft_nb")
    for module, (line, _) in PLANTED.items():
        with (tmp_path / "lpft_nb" / module).open("a", encoding="utf-8") as file:
            file.write(f"\n\ndef planted():\n    {line or 'pass'}\n")
    report = broken(tmp_path).replace(" is not allowed to import ", " -> ")
    assert [fault for _, fault in PLANTED.values() if fault not in report] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_short(path):
    if path.name != "_modidx.py":  # nbdev's index
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_MODULE, f"{lines} lines: split the chapter, one module each"


POSITIONAL = 3  # arguments that a call may pass by position


def long_calls(code: str, own: set[str]) -> list[str]:
    """The calls of this package's functions and classes in `code` that pass more arguments by position than that."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = [getattr(call.func, "id", getattr(call.func, "attr", None)) for call in calls]
    return [
        ast.unparse(call)
        for call, name in zip(calls, names, strict=True)
        if name in own and len(call.args) > POSITIONAL
    ]


def takes_any_number(function: ast.FunctionDef) -> bool:
    """Whether a function takes arguments alike in any number."""
    return function.args.vararg is not None


def own_names() -> set[str]:
    """The functions and classes of the package."""
    nodes = [
        node for path in MODULES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    return classes.union(node.name for node in functions if not takes_any_number(node))


@pytest.fixture(scope="module")
def own() -> set[str]:
    return own_names()


def test_a_call_with_many_positions_is_found():
    code = "f(1, 2, 3)\nm.f(1, 2, 3, 4)\ng(1, 2, 3, 4)\nf(1, 2, 3, d=4)\nf(*a)"
    assert long_calls(code, {"f"}) == ["m.f(1, 2, 3, 4)"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_goes_by_position_past_three_arguments(path, own):
    assert long_calls(path.read_text(encoding="utf-8"), own) == []
