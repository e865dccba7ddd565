"""Which module may import which: the contracts of pyproject.toml, kept by the package and broken by planted imports."""

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
