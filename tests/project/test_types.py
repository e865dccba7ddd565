"""The annotations of the package, as basedpyright reads them: strict, but for what the baseline still lists."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

BASELINE = ROOT / ".basedpyright" / "baseline.json"
FACES = sorted(
    f"lpft_nb/{path.name}" for path in ROOT.glob("lpft_nb/*.py") if path.name != "_modidx.py"
)
STRICT = [
    *FACES,
    "lpft_nb/data/embedded.py",
    "lpft_nb/data/splits.py",
    "lpft_nb/data/task.py",
    "lpft_nb/kernel/approximation.py",
    "lpft_nb/kernel/budget.py",
    "lpft_nb/kernel/contractions.py",
    "lpft_nb/kernel/packing.py",
    "lpft_nb/kernel/progress.py",
    "lpft_nb/kernel/projection.py",
    "lpft_nb/kernel/sides.py",
    "lpft_nb/kernel/streaming.py",
    "lpft_nb/lab/head_norm.py",
    "lpft_nb/lab/notebooks.py",
    "lpft_nb/models/configuration.py",
    "lpft_nb/models/encoding.py",
    "lpft_nb/models/head.py",
    "lpft_nb/models/lora.py",
    "lpft_nb/store/names.py",
]  # modules without a line in the baseline: this list only grows

STRICT_ONLY = {
    "reportConstantRedefinition",
    "reportDeprecated",
    "reportMissingParameterType",
    "reportMissingTypeArgument",
    "reportPrivateUsage",
}  # what pyright's basic mode does not ask for: nothing else may wait in the baseline


def test_no_type_error_is_new(tmp_path):
    """The checker gets a copy of the baseline, because it writes down what it no longer finds."""
    checker = shutil.which("basedpyright", path=str(Path(sys.executable).parent)) or pytest.skip(
        "basedpyright (extra `dev`) is not installed"
    )
    listed = shutil.copyfile(BASELINE, tmp_path / "baseline.json")
    done = subprocess.run(
        [checker, "--pythonpath", sys.executable, "--baselinefile", str(listed), "--outputjson"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 50, done.stderr
    errors = [
        f"{Path(fault['file']).relative_to(ROOT)}:{fault['range']['start']['line'] + 1}: {fault['message']}"
        for fault in report["generalDiagnostics"]
        if fault["severity"] == "error"
    ]
    assert not errors, "\n".join(errors)


def test_strict_modules_stay_strict():
    listed = json.loads(BASELINE.read_text(encoding="utf-8"))["files"]
    assert STRICT and all((ROOT / name).is_file() for name in STRICT)
    assert [name for name in STRICT if f"./{name}" in listed] == []


def test_everything_passes_the_basic_mode():
    listed = json.loads(BASELINE.read_text(encoding="utf-8"))["files"]
    assert {fault["code"] for faults in listed.values() for fault in faults} <= STRICT_ONLY
