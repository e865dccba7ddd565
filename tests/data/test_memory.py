"""Data in memory: as good as a folder, with the same fingerprint, and refused by name where it is not data."""

import numpy
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from data_files import make_rows, write_jsonl, write_splits
from lpft_nb.tasks import LabelError, MissingColumn, TaskError, load_task

SPLITS = {
    "train": make_rows(40, 3),
    "validation": make_rows(9, 3, 50),
    "test": make_rows(12, 3, 70),
}


def columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def frame_with_index(rows: list[dict]) -> pandas.DataFrame:
    return pandas.DataFrame(rows, index=numpy.arange(len(rows))[::-1] + 100)


WAYS = {
    "datasets": lambda rows: Dataset.from_list(rows),
    "frames": frame_with_index,
    "columns": columns,
    "pairs": lambda rows: tuple(columns(rows).values()),
    "series": lambda rows: tuple(frame_with_index(rows)[name] for name in ("text", "label")),
    "arrays": lambda rows: (
        numpy.array(columns(rows)["text"]),
        torch.tensor(columns(rows)["label"]),
    ),
    "categories": lambda rows: pandas.DataFrame(rows).astype({"label": "category"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_splits_in_memory_are_the_folder(way, tmp_path):
    folder = load_task(write_splits(tmp_path / "mine", **SPLITS))
    task = load_task({split: WAYS[way](rows) for split, rows in SPLITS.items()}, name="mine")
    assert task.fingerprint == folder.fingerprint and task.label_names == folder.label_names
    assert (task.name, task.source["kind"]) == ("mine", "memory")


@pytest.mark.parametrize("way", WAYS)
def test_one_table_in_memory_is_the_single_file(way, tmp_path):
    path = write_jsonl(tmp_path / "all.jsonl", SPLITS["train"])
    task = load_task(WAYS[way](SPLITS["train"]))
    assert task.fingerprint == load_task(path).fingerprint
    assert "stratified" in task.source["splits"]["test"] and task.name == "data"


def test_a_dataset_dict_with_class_names_and_customary_split_names():
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["c", "b", "a"])})
    parts = {
        name: Dataset.from_dict(columns(SPLITS[split]), features=kinds)
        for name, split in {"train": "train", "dev": "validation", "test": "test"}.items()
    }
    task = load_task(DatasetDict(parts))
    assert task.label_names == ("c", "b", "a")
    assert task.train["label"][:] == columns(SPLITS["train"])["label"]
    assert task.sizes == {"train": 40, "validation": 9, "test": 12}


def test_pairs_other_columns_and_the_papers_protocol():
    rows = [{"a": f"a{n}", "b": f"b{n}", "stars": n % 2 + 1} for n in range(30)]
    task = load_task(pandas.DataFrame(rows), label_column="stars", protocol="paper")
    assert task.text_columns == ("a", "b") and task.label_names == ("1", "2")
    one = load_task(pandas.DataFrame(rows), label_column="stars", text_columns=["b"])
    assert one.text_columns == ("b",)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ((["a", "b"], [0]), TaskError, "differ in length: {'text': 2, 'label': 1}"),
        (("ab", [0, 1]), TaskError, "column 'text' must be a list, found str"),
        ((["a", "b"], 3), TaskError, "column 'label' must be a list, found int"),
        ({"body": ["a"], "y": [0]}, MissingColumn, "no label column 'label'"),
        (
            {"train": {"text": ["a"], "label": [0]}, "extra": {"text": ["a"], "label": [0]}},
            TaskError,
            "'extra' is no split: expected train, validation and test",
        ),
        (
            {
                "train": {"text": ["a"], "label": [0]},
                "dev": {"text": ["a"], "label": [0]},
                "val": {"text": ["a"], "label": [0]},
            },
            TaskError,
            "'val' is a second validation",
        ),
        (pandas.DataFrame([["a", "b", 0]], columns=["t", "t", "label"]), TaskError, "two columns"),
        (pandas.DataFrame({"text": ["a", "b"], "label": [0, None]}), LabelError, "row 2.*missing"),
        (3, TaskError, "a task's name, a path, or data in memory, found int"),
        (["a", "b"], TaskError, "found list"),
        ({}, TaskError, "data/train holds no example"),
        (
            Dataset.from_dict({"text": ["a"], "label": [0]}).to_iterable_dataset(),
            TaskError,
            "stream",
        ),
    ],
)
def test_what_is_no_data_is_refused_by_name(data, error, said):
    with pytest.raises(error, match=said):
        load_task(data)


def test_a_separator_is_for_files():
    with pytest.raises(TaskError, match="separator is for CSV files"):
        load_task((["a"], [0]), separator=";")
    with pytest.raises(TaskError, match="defines its own columns"):
        load_task("docstring-topic", separator=";")
