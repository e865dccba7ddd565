"""The wheel: what is in it, and that it works in an empty environment with no checkout near."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import Distribution, PackagePath, distribution
from pathlib import Path

import pytest
from book_build import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SOURCES = (
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "constraints.txt",
)


def run(command, **keywords) -> subprocess.CompletedProcess:
    """Run a command to its end; where it fails, show what it wrote."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **keywords
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that nothing of an earlier build gets in."""
    pytest.importorskip(
        "setuptools", "77", reason="setuptools >= 77 builds the wheel; `make test` installs it"
    )
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(
        ROOT / "lpft_nb",
        source / "lpft_nb",
        ignore=shutil.ignore_patterns("__pycache__", "_notebooks"),
    )
    shutil.copytree(ROOT / "nbs", source / "nbs", ignore=shutil.ignore_patterns("_runs", ".*"))
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            source,
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            target,
        ]
    )
    return next(target.glob("*.whl"))


def test_wheel_holds_the_package_and_the_experiments_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("lpft_nb/**/*.py")}
    notebooks = {f"lpft_nb/_notebooks/{path.name}" for path in ROOT.glob("nbs/experiments/*.ipynb")}
    assert "lpft_nb/_notebooks/lp_ft.ipynb" in notebooks
    typed = {"lpft_nb/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == modules | notebooks | typed
    assert any(name.endswith("LICENSE") for name in names)


def test_the_notebooks_in_the_wheel_are_the_experiments(wheel):
    archive = zipfile.ZipFile(wheel)
    for path in ROOT.glob("nbs/experiments/*.ipynb"):
        assert archive.read(f"lpft_nb/_notebooks/{path.name}") == path.read_bytes()


def test_metadata_comes_from_settings(wheel):
    from constraints import EXTRAS, read_settings

    settings, metadata = read_settings(), metadata_of(wheel)
    assert (metadata["Name"], metadata["Version"]) == (settings["repo"], settings["version"])
    assert metadata["Requires-Python"] == f">={settings['min_python']}"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    core = {(item.name, item.specifier) for item in required if item.marker is None}
    assert core == {
        (item.name, item.specifier) for item in map(Requirement, settings["requirements"].split())
    }
    for extra in EXTRAS:
        of_extra = {
            item.name for item in required if item.marker and item.marker.evaluate({"extra": extra})
        }
        assert of_extra == {
            Requirement(word).name for word in settings[f"{extra}_requirements"].split()
        }


def required(texts: list[str], extras: set[str], found: dict) -> dict[tuple, Distribution]:
    """What requirements lead to in the environment of the tests: {(name, extras): distribution}."""
    for item in map(Requirement, texts):
        wanted = item.marker is None or any(
            item.marker.evaluate({"extra": extra}) for extra in extras or {""}
        )
        key = (canonicalize_name(item.name), frozenset(item.extras))
        if wanted and key not in found:
            found[key] = distribution(item.name)
            required(found[key].requires or [], item.extras, found)
    return found


def metadata_of(wheel: Path) -> Message:
    """The METADATA of a wheel."""
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("METADATA"))
    return Parser().parsestr(archive.read(name).decode())


def pip_for(programs: Path) -> list:
    """The command that lets the pip of the tests act on another environment."""
    return [sys.executable, "-m", "pip", "--python", programs / "python"]


def links(needed: Distribution) -> list[PackagePath]:
    """The files of a distribution, programs left out (their first line names another Python), bytecode where it lies."""
    files = [file for file in needed.files if file.parts[0] != ".." and file.suffix != ".pyc"]
    modules = [str(file) for file in files if file.suffix == ".py"]
    bytecode = map(PackagePath, map(importlib.util.cache_from_source, modules))
    return [*files, *(file for file in bytecode if needed.locate_file(file).is_file())]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of programs of an environment that holds the wheel, what it requires, and nothing else.

    The wheel is installed; what it requires is linked from the environment of the tests, where pip put it under the
    same constraints: unpacking torch once more would take longer than all tests of this file.
    """
    home = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", home])
    programs = home / "bin"
    site = Path(
        run(
            [programs / "python", "-c", "import site; print(site.getsitepackages()[0])"]
        ).stdout.strip()
    )
    found = required(metadata_of(wheel).get_all("Requires-Dist"), {"offline"}, {})
    for needed in {item.name: item for item in found.values()}.values():
        for file in links(needed):
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).symlink_to(needed.locate_file(file))
    run([*pip_for(programs), "install", "--no-deps", wheel])
    return programs


@pytest.fixture
def clean_environment(tmp_path) -> dict[str, str]:
    """A surrounding that names neither this checkout nor a local data root nor a used cache."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("LPFT_", "PYTHON", "VIRTUAL_ENV", "HF_"))
    }
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "LPFT_CACHE": str(tmp_path / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_installed_environment_is_consistent_and_has_no_tools(
    installed, tmp_path, clean_environment
):
    run([*pip_for(installed), "check"])
    probe = "import importlib.util, lpft_nb; print([n for n in ('nbdev', 'fastcore') if importlib.util.find_spec(n)], lpft_nb.__file__)"
    printed = run([installed / "python", "-c", probe], cwd=tmp_path, env=clean_environment).stdout
    assert printed.startswith("[] ") and str(ROOT / "lpft_nb") not in printed


def test_installed_command_lists_the_experiments(installed, tmp_path, clean_environment):
    assert (
        "lp_ft" in run([installed / "lpft-nb", "list"], cwd=tmp_path, env=clean_environment).stdout
    )
    assert (
        "lp_ft"
        in run(
            [installed / "python", "-m", "lpft_nb", "list"], cwd=tmp_path, env=clean_environment
        ).stdout
    )


def test_installed_command_runs_the_experiment_with_no_checkout(
    installed, tmp_path, clean_environment
):
    small = [
        "-p",
        "methods",
        "LP",
        "-p",
        "seeds",
        "0",
        "-p",
        "max_train",
        "48",
        "-p",
        "epochs",
        "1",
        "-p",
        "max_length",
        "16",
    ]
    command = [installed / "lpft-nb", "run", "lp_ft", *small]
    run(command, cwd=tmp_path, env=clean_environment, timeout=600)
    assert list(tmp_path.glob("runs/**/*.ipynb")) and list(tmp_path.glob("runs/**/*.json"))
