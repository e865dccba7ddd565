"""One table of truth, written in every layout, label type and format: load_task gives it back or names an error."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lpft_nb.tasks import TaskError, load_task

# Label types: how class 0, 1, 2 is written, and the name that it must have afterwards.
KINDS = {
    "from 0": [0, 1, 2],
    "from 1": [1, 2, 3],
    "floats": [0.0, 1.0, 2.0],
    "digits": ["1", "2", "3"],
    "names": ["good", "bad", "so-so"],
    "cases": ["US", "us", "Us"],
    "mixed": ["1", "2", "unrated"],
    "zeros": ["007", "7", "70"],
    "spaces": ["a", "a b", " a"],
    "flags": [False, True],
}
ODD = st.sampled_from(
    [
        "2012",
        "NA",
        "",
        " ",
        "1e5",
        'a "quote"',
        '"',
        "a,b;c|d",
        "x\ty",
        "two\nlines",
        "\u2028",
        "é 中 \U0001f600",
        "null",
        "'",
    ]
)
WORDS = st.text("abc xyz", min_size=1, max_size=12)
FORMATS = (
    "jsonl",
    "json",
    "csv",
    "csv.gz",
    "tsv",
    "semicolon",
    "parquet",
    "pandas",
    "features",
    "jsonl.gz",
)
NAMES = {
    "train": ["train", "Train", "training"],
    "validation": ["validation", "dev", "val", "valid"],
    "test": ["test", "TEST"],
}


def name_of(value) -> str:
    """What a label's class must be called: whole floats are integers, everything else is as written."""
    return str(int(value)) if isinstance(value, float) else str(value)


def write(folder: Path, split: str, kind: str, rows: list[tuple]) -> None:
    """The rows of one split as a file of a kind; CSV has no types, so everything in it is text."""
    records = [{"text": text, "label": label} for text, label in rows]
    path = folder / f"{split}.{kind}"
    if kind in ("csv", "csv.gz", "tsv", "semicolon"):
        path = folder / f"{split}.{'csv' if kind == 'semicolon' else kind}"
        mark = {"tsv": "\t", "semicolon": ";"}.get(kind, ",")
        with (gzip.open if kind == "csv.gz" else open)(
            path, "wt", encoding="utf-8", newline=""
        ) as file:
            writer = csv.writer(file, delimiter=mark)
            writer.writerows([["text", "label"], *rows])
    elif kind in ("jsonl", "jsonl.gz"):
        text = "".join(json.dumps(record) + "\n" for record in records)
        path.write_bytes(gzip.compress(text.encode()) if kind == "jsonl.gz" else text.encode())
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "pandas":
        index = [f"row-{number}" for number in range(len(rows))]
        pandas.DataFrame(records, index=index).to_parquet(folder / f"{split}.parquet")
    elif kind == "features":
        names = list(dict.fromkeys(name_of(label) for _, label in rows))
        columns = {
            "text": [text for text, _ in rows],
            "label": [name_of(label) for _, label in rows],
        }
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict(columns, features=kinds).to_parquet(str(folder / f"{split}.parquet"))
    else:
        pandas.DataFrame(records).to_parquet(folder / f"{split}.parquet")


@st.composite
def truths(draw):
    """Rows of each split with labels of one type; every class in train, four times at least."""
    labels = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    text = draw(st.sampled_from([WORDS, st.one_of(WORDS, ODD)]))
    rows = {"train": [(draw(text), label) for label in labels for _ in range(4)]}
    for split in draw(st.sampled_from([(), ("validation",), ("test",), ("validation", "test")])):
        rows[split] = draw(
            st.lists(st.tuples(text, st.sampled_from(labels)), min_size=1, max_size=8)
        )
    rows["train"] = draw(st.permutations(rows["train"]))
    return rows


def loaded_rows(task, splits=("train", "validation", "test")) -> Counter:
    """Text and class name of every example of some splits."""
    return Counter(
        (text, task.label_names[label])
        for split in splits
        for text, label in zip(task.splits()[split]["text"], task.splits()[split]["label"])
    )


def names_in(rows: list[tuple]) -> Counter:
    return Counter((text, name_of(label)) for text, label in rows)


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=truths(), data=st.data())
def test_a_folder_gives_back_the_truth_or_a_named_error(rows, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    kinds = {split: data.draw(st.sampled_from(FORMATS)) for split in rows}
    for split, part in rows.items():
        write(folder, data.draw(st.sampled_from(NAMES[split])), kinds[split], part)
    try:
        task = load_task(folder)
    except TaskError as error:
        event("refused")
        allowed = (
            "features" in kinds.values()
            or "runs over tabs" in str(error)
            or "expected after" in str(error)
        )
        assert allowed, error
        return
    event("read")
    if {"validation", "test"} <= set(rows):
        for split, part in rows.items():
            assert loaded_rows(task, [split]) == names_in(part)
        return
    tested = [split for split in ("test", "validation") if split in rows][:1]
    if tested:
        assert loaded_rows(task, ["test"]) == names_in(rows[tested[0]])
        assert loaded_rows(task, ["train", "validation"]) == names_in(rows["train"])
    else:
        assert loaded_rows(task) == names_in(rows["train"])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("labels", KINDS)
def test_every_format_and_label_type_alone(kind, labels, tmp_path):
    """Nothing is refused where all splits are written alike and the texts are plain."""
    values = KINDS[labels]
    rows = [(f"text {number}", values[number % len(values)]) for number in range(24)]
    for split in ("train", "dev", "test"):
        write(tmp_path, split, kind, rows)
    task = load_task(tmp_path)
    assert loaded_rows(task, ["train"]) == loaded_rows(task, ["test"]) == names_in(rows)
    assert set(task.label_names) == set(map(name_of, values))
