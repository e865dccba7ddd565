"""The notebooks, modules and files of this repository, as its tests read them."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted([*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/experiments/*.ipynb")])
EXPERIMENTS = sorted(ROOT.glob("nbs/experiments/*.ipynb"))
MODULES = sorted(ROOT.glob("lpft_nb/**/*.py"))


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
