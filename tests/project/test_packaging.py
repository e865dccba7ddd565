"""Requirements, version and the files of the tools that check them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from repository import ROOT


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
