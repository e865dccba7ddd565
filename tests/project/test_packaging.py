"""Requirements, version and the files of the tools that check them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from repository import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


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
        if canonicalize_name(requirement.name)
        not in ("snakemake", "snakemake-executor-plugin-slurm", "gguf")
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


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(command):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or pytest.skip(
        "ruff (extra `dev`) is not installed"
    )
    done = subprocess.run(
        [ruff, *command, ".", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def run_make(*words: str) -> str:
    """What make prints when it is called afresh, not by the `make test` that may run this test."""
    make = shutil.which("make") or pytest.skip("make is not installed")
    outer = ("MAKE", "MFLAGS", "LPFT_", "WORKERS")
    own = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    done = subprocess.run([make, *words], cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_help_tells_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    told = run_make().splitlines()
    assert [line.split()[0] for line in told] == targets
    assert all(len(line.split()) > 2 for line in told)


@pytest.mark.parametrize("target", ["check", "test"])
def test_tests_go_side_by_side_with_one_thread_each(target):
    line = run_make("-n", target).splitlines()[-1]
    for name in ("OMP", "MKL", "OPENBLAS"):
        assert f"{name}_NUM_THREADS=1 " in line
    assert "-m pytest -n 2 --dist loadgroup --no-loadscope-reorder" in line


def test_a_run_takes_half_of_the_cores_and_the_book_is_built_before_the_tests():
    run = next(line for line in run_make("-n", "run").splitlines() if "lpft-nb run" in line)
    threads = int(re.search(r" LPFT_THREADS=(\d+) ", run)[1])
    assert threads == (os.cpu_count() + 1) // 2 and f"OMP_NUM_THREADS={threads} " in run
    test = run_make("-n", "test")
    assert test.index("scripts/book.py") < test.index("-m pytest")
    assert re.search(r"--output (\S+)", test)[1] == re.search(r"LPFT_BOOK=(\S+)", test)[1]


def test_check_takes_format_and_lint_and_the_quick_tests():
    check = run_make("-n", "check")
    assert "ruff format --check" in check and "ruff check" in check and "-m quick" in check


def test_makefile_asks_for_no_rights_and_ci_only_adds_a_browser_and_slurm():
    assert "sudo" not in MAKEFILE and "apt-get" not in MAKEFILE
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script and script.rstrip().endswith("exec make test")
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci/run")]).returncode == 0
