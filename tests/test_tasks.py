"""Tasks: the object, the user's own files, and bad input."""

import csv
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from data_files import make_rows, write_jsonl, write_splits
from lpft_nb import tasks

from lpft_nb.tasks import (
    EmptySplit,
    LabelError,
    MissingColumn,
    NotText,
    SingleClass,
    TaskError,
    UnknownTask,
    few_shot,
    load_task,
    take,
)


@pytest.fixture(autouse=True)
def no_local_data(monkeypatch):
    monkeypatch.delenv("LPFT_DATA", raising=False)


def test_task_splits_sizes_and_counts(tmp_path):
    task = load_task(
        write_splits(
            tmp_path / "mine", train=make_rows(20), validation=make_rows(6), test=make_rows(8)
        )
    )
    assert list(task.splits()) == ["train", "validation", "test"]
    assert task.sizes == {"train": 20, "validation": 6, "test": 8} and task.class_counts[
        "test"
    ] == [4, 4]
    assert (
        task.num_labels == 2 and task.label_names == ("0", "1") and task.text_columns == ("text",)
    )
    for split in task.splits().values():
        assert split.column_names == ["text", "label"]
        assert split.features == Features({"text": Value("string"), "label": Value("int64")})


def test_fingerprint_reads_every_text_and_label(tmp_path):
    def fingerprint(change=lambda rows: rows):
        rows = {
            split: change([dict(row) for row in make_rows(10)])
            if split == "test"
            else make_rows(10)
            for split in ("train", "validation", "test")
        }
        return load_task(write_splits(tmp_path / "mine", **rows)).fingerprint

    def other_text(rows):
        rows[3]["text"] += "!"
        return rows

    def other_label(rows):
        rows[3]["label"] = 0
        return rows

    first = fingerprint()
    assert len(first) == 16 and int(first, 16) >= 0 and fingerprint() == first
    assert (
        len(
            {
                first,
                fingerprint(other_text),
                fingerprint(other_label),
                fingerprint(lambda rows: rows[::-1]),
            }
        )
        == 4
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.data())
def test_allotment_is_proportional(counts, data):
    total = data.draw(st.integers(len(counts), sum(counts)))
    given_ = tasks._allot(counts, total)
    assert sum(given_) == total
    assert all(1 <= part <= count for part, count in zip(given_, counts))
    for part, count in zip(given_, counts):
        assert part == 1 or abs(part - total * count / sum(counts)) <= len(counts)


def test_take_is_stratified_fixed_and_recorded(tmp_path):
    rows = [{"text": f"t{row}", "label": int(row % 4 == 0)} for row in range(80)]
    task = load_task(
        write_splits(tmp_path / "mine", train=rows, validation=make_rows(6), test=make_rows(8))
    )
    small = take(task, 20)
    assert small.class_counts["train"] == [15, 5] and len(set(small.train["text"])) == 20
    assert (
        small.train["text"][:]
        == take(task, 20).train["text"][:]
        != take(task, 20, seed=1).train["text"][:]
    )
    order = [int(text[1:]) for text in small.train["text"]]
    assert order == sorted(order) and small.test["text"][:] == task.test["text"][:]
    assert (
        small.source["max_train"] == 20
        and small.fingerprint != task.fingerprint
        and "max_train" not in task.source
    )
    assert take(task, None) is task and take(task, 1000).fingerprint == task.fingerprint


def test_few_shots_come_from_the_training_split_alone(tmp_path):
    splits = {
        name: make_rows(size) for name, size in (("train", 80), ("validation", 8), ("test", 30))
    }
    task = load_task(write_splits(tmp_path / "mine", **splits))
    few = few_shot(task, 5, seed=13)
    assert few.class_counts["train"] == few.class_counts["validation"] == [5, 5]
    known, drawn = set(task.train["text"]), [set(few.train["text"]), set(few.validation["text"])]
    assert drawn[0] | drawn[1] <= known and not drawn[0] & drawn[1]
    assert few.test["text"][:] == task.test["text"][:]
    assert few.source["shots"] == 5 and few.source["shots_seed"] == 13
    again, other = few_shot(task, 5, seed=13), few_shot(task, 5, seed=21)
    assert again.fingerprint == few.fingerprint != other.fingerprint
    more = few_shot(
        task, 10, seed=13
    )  # what five shots learned from is part of what ten learn from
    assert drawn[0] < set(more.train["text"])


def test_the_test_sets_of_all_split_seeds_are_one(tmp_path):
    splits = {"train": make_rows(40), "validation": make_rows(8), "test": make_rows(50)}
    task = load_task(write_splits(tmp_path / "mine", **splits))
    task = replace(task, ood={"else": task.test})
    cuts = [few_shot(task, 3, seed=seed, max_test=20) for seed in (0, 1)]
    assert cuts[0].test["text"][:] == cuts[1].test["text"][:]
    assert len(cuts[0].test) == len(cuts[0].ood["else"]) == 20
    assert set(cuts[0].test["text"]) < set(task.test["text"])
    assert len(few_shot(task, 3, max_test=None).test) == 50


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(shots=0), "shots must be a whole number of at least 1, got 0"),
        (dict(shots=True), "shots must be"),
        (dict(shots=2.0), "shots must be"),
        (dict(shots=3, max_test=0), "max_test must be"),
        (dict(shots=11), "11 shots take 22 training examples of each class.* '0' has 20"),
    ],
)
def test_few_shots_that_there_are_not(tmp_path, options, said):
    splits = {"train": make_rows(40), "validation": make_rows(8), "test": make_rows(8)}
    task = load_task(write_splits(tmp_path / "mine", **splits))
    with pytest.raises(TaskError, match=said):
        few_shot(task, **options)


@pytest.mark.parametrize("wrong", [1, 0, -3, 2.5, True, "20"])
def test_take_refuses(tmp_path, wrong):
    task = load_task(
        write_splits(
            tmp_path / "mine", train=make_rows(20), validation=make_rows(6), test=make_rows(8)
        )
    )
    with pytest.raises(TaskError, match="max_train"):
        take(task, wrong)


# --- the user's own files


def write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_three_formats_agree(tmp_path):
    splits = {"train": make_rows(20), "validation": make_rows(6), "test": make_rows(8)}
    splits["train"][0]["text"] = 'quotes " and, commas \u2028 \u0085 é'
    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / kind).mkdir()
        for split, rows in splits.items():
            path = tmp_path / kind / f"{split}.{kind}"
            if kind == "jsonl":
                write_jsonl(path, rows)
            elif kind == "csv":
                write_csv(path, rows)
            else:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = [load_task(tmp_path / kind) for kind in ("jsonl", "csv", "parquet")]
    assert len({task.fingerprint for task in loaded}) == 1
    assert loaded[0].train["text"][0] == splits["train"][0]["text"]


def test_a_single_file_is_split_stratified(tmp_path):
    rows = [
        {"text": f"t{row}", "label": "rare" if row % 5 == 0 else "common"} for row in range(100)
    ]
    task = load_task(write_jsonl(tmp_path / "all.jsonl", rows))
    assert task.label_names == ("common", "rare")
    assert task.class_counts == {"train": [64, 16], "validation": [8, 2], "test": [8, 2]}
    assert sorted(sum((split["text"][:] for split in task.splits().values()), [])) == sorted(
        row["text"] for row in rows
    )
    assert (
        "stratified" in task.source["splits"]["test"]
        and load_task(tmp_path / "all.jsonl").fingerprint == task.fingerprint
    )


def test_pairs_strings_and_identifiers(tmp_path):
    rows = [
        {
            "question": f"q{row}",
            "passage": f"p{row}",
            "uid": f"id-{row}",
            "score": row,
            "label": ("yes", "no")[row % 2],
        }
        for row in range(20)
    ]
    task = load_task(write_splits(tmp_path / "mine", train=rows, test=rows[:4]))
    assert task.text_columns == ("question", "passage") and task.label_names == ("no", "yes")
    assert task.sizes == {"train": 18, "validation": 2, "test": 4}
    one = load_task(tmp_path / "mine", text_columns="passage")
    assert one.text_columns == ("passage",) and one.train.column_names == ["passage", "label"]


def test_another_label_column(tmp_path):
    rows = [{"text": f"t{row}", "stars": row % 3} for row in range(30)]
    assert (
        load_task(write_jsonl(tmp_path / "all.jsonl", rows), label_column="stars").num_labels == 3
    )


# --- bad input


def test_unknown_task_offers_close_names():
    with pytest.raises(UnknownTask, match="docstring-topic"):
        load_task("docstring-topics")
    with pytest.raises(UnknownTask, match="'cola'"):
        load_task("colla")


def test_what_cannot_be_a_path_is_an_error(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("~nosuchuser/x", tmp_path / "loop", "a\0b", "x" * 500, Path("no such folder")):
        with pytest.raises(UnknownTask, match="neither a task nor a path that exists"):
            load_task(place)
    for empty in ("", " "):
        with pytest.raises(TaskError, match="found an empty text"):
            load_task(empty)
    with pytest.raises(UnknownTask, match="the name of a task is a text: write 'docstring-topic'"):
        load_task(Path("docstring-topic"))


def test_a_folder_of_data_that_cannot_be_is_no_traceback(monkeypatch):
    for place in ("~nosuchuser/x", "x" * 500):
        monkeypatch.setenv("LPFT_DATA", place)
        with pytest.raises(TaskError, match="LPFT_DATA names"):
            load_task("cb")


def test_unknown_protocol():
    with pytest.raises(TaskError, match="unknown protocol 'papers': did you mean 'paper'"):
        load_task("cb", protocol="papers")


def test_columns_of_a_named_task_are_its_own():
    with pytest.raises(TaskError, match="its own columns"):
        load_task("cb", text_columns="premise")


def expect(tmp_path, error, match, splits, **options):
    with pytest.raises(error, match=match) as caught:
        load_task(write_splits(tmp_path / "bad", **splits), **options)
    assert isinstance(caught.value, TaskError)


GOOD = {"train": make_rows(20), "validation": make_rows(6), "test": make_rows(8)}


def changed(split, change):
    rows = [dict(row) for row in GOOD[split]]
    change(rows)
    return GOOD | {split: rows}


BAD = {
    "no label column": (
        MissingColumn,
        "no label column 'label'",
        {split: [{"text": row["text"]} for row in rows] for split, rows in GOOD.items()},
    ),
    "no text column": (
        MissingColumn,
        "cannot tell which columns",
        {split: [{"label": row["label"]} for row in rows] for split, rows in GOOD.items()},
    ),
    "three text columns": (
        MissingColumn,
        "text_columns=",
        {split: [row | {"b": "x", "c": "y"} for row in rows] for split, rows in GOOD.items()},
    ),
    "text column missing in test": (
        MissingColumn,
        r"bad/test: no column \['text'\]",
        GOOD | {"test": [{"body": "x", "label": 0}, {"body": "y", "label": 1}]},
    ),
    "empty test": (EmptySplit, "bad/test holds no example", GOOD | {"test": []}),
    "empty train": (EmptySplit, "bad/train holds no example", GOOD | {"train": []}),
    "one class": (
        SingleClass,
        "one class only",
        changed("train", lambda rows: [row.update(label=0) for row in rows])
        | {"test": [{"text": "a", "label": 0}], "validation": [{"text": "a", "label": 0}]},
    ),
    "label out of range in test": (
        LabelError,
        "test.jsonl, line 3, column 'label': 1 of 8 labels.*found 2",
        changed("test", lambda rows: rows[2].update(label=2)),
    ),
    "negative label in train": (
        LabelError,
        "found -1, 0, 1",
        changed("train", lambda rows: rows[2].update(label=-1)),
    ),
    "labels with a gap": (
        LabelError,
        "must be 0, 1, ..., C-1, or 1, 2, ..., C, found 0, 2.*write names",
        {
            split: [row | {"label": 2 * row["label"]} for row in rows]
            for split, rows in GOOD.items()
        },
    ),
    "float label": (LabelError, "0.5", changed("train", lambda rows: rows[2].update(label=0.5))),
    "missing label": (
        LabelError,
        "validation.jsonl, line 3, column 'label': the label is missing",
        changed("validation", lambda rows: rows[2].pop("label")),
    ),
    "string labels in test only": (
        LabelError,
        "'maybe'",
        changed("test", lambda rows: rows[2].update(label="maybe")),
    ),
    "number as text": (
        NotText,
        "such as 3.5",
        changed("test", lambda rows: rows[1].update(text=3.5)),
    ),
    "missing text": (
        NotText,
        "such as None",
        changed("validation", lambda rows: rows[1].update(text=None)),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_named_error(case, tmp_path):
    expect(tmp_path, *BAD[case])


def test_text_columns_asked_for_must_exist_and_be_text(tmp_path):
    expect(tmp_path, MissingColumn, "no column", GOOD, text_columns=("body",))
    expect(tmp_path, MissingColumn, "one or two columns", GOOD, text_columns=("label",))
    expect(
        tmp_path,
        NotText,
        "must hold text",
        {split: [row | {"n": 1} for row in rows] for split, rows in GOOD.items()},
        text_columns="n",
    )


def test_a_class_only_in_test(tmp_path):
    rows = [{"text": f"t{row}", "label": ("a", "b")[row % 2]} for row in range(20)]
    expect(
        tmp_path,
        LabelError,
        "not among the 2 classes.*'c'",
        {"train": rows, "validation": rows, "test": [*rows, {"text": "x", "label": "c"}]},
    )


def test_an_unshuffled_split_of_a_sorted_file_is_an_error(tmp_path):
    rows = sorted(make_rows(40, classes=4), key=lambda row: row["label"]) + [
        {"text": f"last {row}", "label": 4} for row in range(4)
    ]
    splits = {"train": rows, "test": rows[:8]}
    expect(tmp_path, LabelError, "4", splits, protocol="paper")
    assert load_task(tmp_path / "bad").class_counts["validation"] == [1] * 5  # ours is stratified


def test_unreadable_files(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": 0}\n{"text": \n')
    with pytest.raises(TaskError, match="line 2: not JSON"):
        load_task(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    with pytest.raises(TaskError, match="expected a JSON object"):
        load_task(tmp_path / "list.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é", "label": 0}\n'.encode("latin-1"))
    with pytest.raises(TaskError, match="UTF-8"):
        load_task(tmp_path / "latin.jsonl")
    (tmp_path / "bad.csv").write_text("text,label\na,b,0\n")
    with pytest.raises(TaskError, match="bad.csv, line 2: 3 fields where the header has 2"):
        load_task(tmp_path / "bad.csv")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(TaskError, match="cannot be read as .parquet"):
        load_task(tmp_path / "bad.parquet")
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(TaskError, match="expected .jsonl, .csv, .tsv, .parquet"):
        load_task(tmp_path / "data.xlsx")


def test_folders_without_or_with_too_many_files(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptySplit, match="train.jsonl, train.csv or train.parquet"):
        load_task(tmp_path / "empty")
    mine = write_splits(tmp_path / "mine", **GOOD)
    write_csv(mine / "test.csv", GOOD["test"])
    with pytest.raises(TaskError, match="more than once"):
        load_task(mine)
    with pytest.raises(EmptySplit, match="no training split"):
        load_task(write_splits(tmp_path / "tests only", test=GOOD["test"]))


def test_a_task_made_by_hand_has_the_columns_that_it_names(tmp_path):
    """Another column is no second text; a column that is named and not there is an error."""
    good = load_task(write_splits(tmp_path / "mine", **GOOD))
    more = {
        name: getattr(good, name).add_column("title", ["t"] * len(getattr(good, name)))
        for name in ("train", "validation", "test")
    }
    task = replace(good, **more, ood={"other": more["test"]})
    assert {tuple(split.column_names) for split in task.splits().values()} == {("text", "label")}
    assert task.train["text"][:] == good.train["text"][:]
    with pytest.raises(MissingColumn, match=r"mine/train: no column \['body'\]"):
        replace(good, text_columns=("body",))
    with pytest.raises(MissingColumn, match=r"no column \['label'\]"):
        replace(good, test=good.test.remove_columns("label"))
