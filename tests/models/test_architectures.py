"""The published sweep of architectures: some of it is done again; all of it where LPFT_ALL_ARCHITECTURES is set (minutes)."""

import json
import os
import sys

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures

PUBLISHED = {row["name"]: row for row in json.loads(architectures.TABLE.read_text())["rows"]}
SOME = (
    "bert",
    "xlm-roberta",
    "deberta-v2",
    "modernbert",
    "opt",
    "mamba",
    "gemma3_text",
    "umt5",
    "fnet",
    "yoso",
    "bart",
    "gptj",
)
TRIED = [name for name, row in PUBLISHED.items() if row["status"] != "not tried"]
NAMES = TRIED if os.environ.get("LPFT_ALL_ARCHITECTURES") else SOME


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_does_what_the_table_says(name):
    found, published = architectures.try_one(name), PUBLISHED[name]
    assert found["status"] == published["status"]
    if found["status"] == "works":
        same = ("pooling", "positions", "parameters", "lora")
        assert {key: found[key] for key in same} == {key: published[key] for key in same}
        assert (found["kernel_error"] or 0) < 1e-6


def test_the_table_holds_every_text_architecture():
    assert set(PUBLISHED) == set(architectures.text_architectures())
    works = [row for row in PUBLISHED.values() if row["status"] == "works"]
    assert len(works) >= 70
    assert max(row["kernel_error"] or 0 for row in works) < 1e-6
    assert all(row["reason"] for row in PUBLISHED.values() if row["status"] != "works")
