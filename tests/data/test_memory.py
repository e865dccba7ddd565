"""Data in memory: as good as a folder, with the same fingerprint, and refused by name where it is not data."""

import numpy
import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from data_files import make_rows, write_jsonl, write_splits
from lpft_nb.tasks import LabelError, MissingColumn, NotText, TaskError, load_task

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
        ({"train": (["a"], [0]), "holdout": (["a"], [0])}, TaskError, "'holdout' is no split"),
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


NAMED = Features({"text": Value("string"), "label": ClassLabel(names=["y", "x"])})


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_the_format_of_a_dataset_changes_nothing(kind):
    data = Dataset.from_dict(columns(make_rows(30)), features=NAMED)
    task = load_task(data.with_format(kind))
    assert task.label_names == ("y", "x") and task.fingerprint == load_task(data).fingerprint


@pytest.mark.parametrize(
    "data",
    [
        (set("abc"), [0, 1, 0]),
        (["a", "b", "c"], frozenset([0, 1, 2])),
        ({"a": 1, "b": 2}, [0, 1]),
        (["a", "b"], {"a": 0, "b": 1}),
        (b"ab", [0, 1]),
    ],
)
def test_what_has_no_order_of_rows_is_no_column(data):
    with pytest.raises(TaskError, match="must be a list, found"):
        load_task(data)


def test_the_keys_of_a_dictionary_have_an_order():
    rated = {f"t{n}": n % 2 for n in range(30)}
    assert load_task((rated.keys(), rated.values())).fingerprint == (
        load_task((list(rated), list(rated.values()))).fingerprint
    )


def test_names_that_become_one_text_are_two_columns():
    data = {0: ["a", "b"], "0": ["c", "d"], "label": [0, 1]}
    for given in (data, pandas.DataFrame(data), {"train": data}):
        with pytest.raises(TaskError, match="two columns are called '0'"):
            load_task(given)


# --- which columns hold the text


def guessed(more: dict, label: str = "label") -> tuple[str, ...]:
    """The text columns of a table with a text, a label, and more columns."""
    frame = pandas.DataFrame({"text": [f"t{n}" for n in range(30)], label: [0, 1] * 15} | more)
    return load_task(frame, label_column=label).text_columns


@pytest.mark.parametrize(
    "name", ["Unnamed: 0", "__index_level_0__", "level_1", "key", "fine_label", "Labels", "target", "class"]
)  # fmt: skip
def test_an_index_or_another_label_is_no_second_text(name):
    assert guessed({name: ["one", "other"] * 15}) == ("text",)


def test_numbers_are_a_text_only_where_there_is_no_other():
    assert guessed({"score": ["0.5", "-1e3", ""] * 10}) == ("text",)
    assert load_task((["1", "22", "3.0"] * 10, [0, 1, 1] * 10)).text_columns == ("text",)
    with pytest.raises(MissingColumn, match="cannot tell which columns"):
        load_task({"a": ["1", "2"] * 15, "b": ["1", "2"] * 15, "label": [0, 1] * 15})


def test_the_index_that_datasets_takes_over_is_no_second_text():
    frame = pandas.DataFrame(make_rows(30), index=[f"k{n}" for n in range(30)])
    assert load_task(Dataset.from_pandas(frame)).text_columns == ("text",)


def test_a_second_column_of_classes_is_no_second_text():
    kinds = Features(NAMED | {"topic": ClassLabel(names=["a", "b"])})
    rows = columns(make_rows(30))
    data = Dataset.from_dict(rows | {"topic": rows["label"]}, features=kinds)
    assert load_task(data).text_columns == ("text",)


def test_a_guess_of_two_columns_is_said(caplog):
    with caplog.at_level("INFO", "lpft_nb"):
        assert guessed({"body": ["b", "c"] * 15}) == ("text", "body")
    assert "pairs of 'text' and 'body'" in caplog.text


@pytest.mark.parametrize("missing", [None, float("nan"), 3])
def test_one_missing_text_does_not_hide_its_column(missing):
    second = [f"h{n}" for n in range(30)]
    second[6] = missing
    with pytest.raises(NotText, match="row 7, column 'hypothesis'"):
        guessed({"hypothesis": pandas.Series(second, dtype=object)})


def test_a_column_may_be_a_pair_of_values():
    for data in ({"text": ("a", "b"), "label": (0, 1)}, {"text": ["a", "b"], "label": [0, 1]}):
        with pytest.raises(TaskError, match="a single file needs a class with at least three"):
            load_task(data)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text_columns": ["text", "text"]}, "each once, got"),
        ({"text_columns": 5}, "one or two columns.*got 5"),
        ({"text_columns": [0]}, "one or two columns"),
        (
            {"text_columns": "label", "label_column": "y"},
            "'label' is what a task calls its classes",
        ),
        ({"label_column": ["label"]}, "label_column must be the name of one column"),
    ],
)
def test_columns_that_cannot_be_asked_for(options, said):
    rows = columns(make_rows(30))
    with pytest.raises(TaskError, match=said):
        load_task(
            {"text": rows["text"], "label": rows["text"], "y": rows["label"]}
            | ({"label": rows["label"]} if "y" not in options.values() else {}),
            **options,
        )


def test_a_class_without_an_example_is_said(caplog):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["y", "x", "z"])})
    task = load_task(Dataset.from_dict(columns(make_rows(30)), features=kinds))
    assert task.source["findings"]["classes without any example in train"] == 1
    assert "1 classes without any example in train" in caplog.text


def test_half_a_character_in_the_name_of_a_text_column():
    with pytest.raises(NotText, match="column name .* holds half a character"):
        load_task({"\ud83d": columns(make_rows(30))["text"], "label": [0, 1] * 15})
