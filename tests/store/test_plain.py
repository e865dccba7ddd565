"""Plain values: what JSON cannot hold becomes plain or is refused, and no folder of a machine stays."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from toy_records import make

from lpft_nb import records
from lpft_nb.store.plain import null, plain, portable


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/a/data/cb", "cb"), ("/home/a/data/cb/", "cb"), ("~/cb", "cb"), ("../data/cb", "cb"), ("./cb", "cb"), (r"C:\data\cb", "cb"),
     ("C:/data/cb", "cb"), (r"\\server\cb", "cb"), ("file:///data/cb", "cb"), (Path("/data/cb"), "cb"), (Path("a/b"), "b")],
)  # fmt: skip
def test_paths_lose_their_folders(path, expected):
    assert portable({"a": [path]}) == {"a": [expected]}


@pytest.mark.parametrize(
    "value",
    [
        "cb",
        "nyu-mll/glue",
        r"\.layer\.\d+",
        ".*query",
        "a.b",
        "",
        "https://example.org/x",
        "f(x) = Vφ/2",
        1e-5,
        None,
        True,
        [1, "a"],
    ],
)
def test_other_values_stay(value):
    assert portable({"a": value}) == {"a": value}


def test_portable_drops_the_output_everywhere():
    assert portable({"output": "/x", "a": {"output": "/y", "b": 1}}) == {"a": {"b": 1}}


def test_labels_are_not_taken_for_paths_or_outputs(tmp_path):
    record = records.read_record(records.write_record(make(), None, tmp_path))
    assert record["task"]["label_names"] == ["/a", "output"] and record["task"]["class_counts"] == {
        "output": 3
    }


def test_a_machine_path_is_refused(tmp_path):
    for part, value in (
        ("parameters", {"task": "/home/a/cb"}),
        ("model", {"id": "~/model"}),
        ("task", make()["task"] | {"source": {"path": "/data/cb"}}),
    ):
        record = make() | {part: value}
        with pytest.raises(records.RecordError, match=f"{part}: expected no paths"):
            records.write_record(record | {"run_id": records.record_id(record)}, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plain_values():
    value = {
        1: np.int64(2),
        "a": (np.float32(0.5), torch.tensor([1, 2]), np.bool_(True), pd.NA, float("-inf")),
    }
    assert plain(value) == {"1": 2, "a": [0.5, [1, 2], True, None, "-inf"]}
    assert plain([np.float64("nan"), np.inf], null) == [None, None]
    with pytest.raises(TypeError, match="expected text"):
        plain({"a": {1, 2}})


def test_an_infinite_penalty_is_not_a_missing_one():
    assert make(penalty=float("inf"))["run_id"] != make(penalty=None)["run_id"]
