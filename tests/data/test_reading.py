"""Files as they come: formats, separators, layouts of folders, and what each fault is called."""

import gzip
import json
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data_files import make_rows, write_jsonl, write_splits
from lpft_nb.data.reading import read_file
from lpft_nb.data.splits import read_folder
from lpft_nb.data.table import EmptySplit, TaskError
from lpft_nb.tasks import NotText, load_task

TEXTS = ["2012", "1e5", "NA", " led by a space", "true", "0x10", "null", "-", "1,5"]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "ndjson", "parquet", "csv.gz"])
def test_a_text_is_never_converted(kind, tmp_path):
    rows = [{"text": text, "label": str(number % 2)} for number, text in enumerate(TEXTS)]
    frame, path = pandas.DataFrame(rows), tmp_path / f"train.{kind}"
    if kind.startswith(("csv", "tsv")):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    assert read_file(path).columns == {"text": TEXTS, "label": [row["label"] for row in rows]}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_a_packed_file_is_the_file(ending, tmp_path):
    plain = written(
        tmp_path,
        f"train{ending}",
        "text,label\na,0\n" if ending == ".csv" else '{"text": "a", "label": "0"}\n',
    )
    packed = written(tmp_path, f"packed{ending}.gz", gzip.compress(plain.read_bytes()))
    assert read_file(packed).columns == read_file(plain).columns
    packed.write_bytes(packed.read_bytes()[:-6])
    with pytest.raises(TaskError, match="gzip cannot unpack"):
        read_file(packed)


def test_a_field_may_be_long_and_the_limit_of_others_stays(tmp_path):
    import csv

    before = csv.field_size_limit()
    path = written(tmp_path, "long.csv", f"text,label\n{'word ' * 60_000},a\n")
    assert len(read_file(path).columns["text"][0]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_the_separator_is_found_or_named(mark, tmp_path):
    content = f"text{mark}label\nwell, well{mark}1\n"
    expected = {"text": ["well, well"], "label": ["1"]}
    assert read_file(written(tmp_path, "a.csv", content)).columns == expected
    assert read_file(tmp_path / "a.csv", mark).columns == expected
    wrong = written(tmp_path, "b.csv", f"my,text{mark}label\nwell, well{mark}1\n")
    assert read_file(wrong, mark).columns == {"my,text": ["well, well"], "label": ["1"]}


def test_a_separator_may_be_called_by_its_name(tmp_path):
    path = written(tmp_path, "a.csv", "text;label\na;0\n")
    assert read_file(path, "semicolon").columns == read_file(path, ";").columns
    for wrong in ("", ";;", "dot", "\n", 5):
        with pytest.raises(TaskError, match="expected one mark, or one of comma, semicolon"):
            read_file(path, wrong)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("begin", ["", "\n", "  \n", "\n\n", "sep=;\n", "SEP=;\n\n", '"sep=;"\n'])
def test_line_ends_blank_lines_and_a_line_that_tells_the_separator(end, begin, tmp_path):
    content = f"{begin}text;label\nwell, well;1\n\nPK, b;0\n".replace("\n", end)
    table = read_file(written(tmp_path, "a.csv", content))
    assert table.columns == {"text": ["well, well", "PK, b"], "label": ["1", "0"]}
    assert table.row(0) == f"a.csv, line {begin.count(chr(10)) + 2}"


def test_a_header_may_be_long_or_hold_line_ends(tmp_path):
    name = "x" * 140_000
    assert list(read_file(written(tmp_path, "a.csv", f"{name},label\na,0\n")).columns) == [
        name,
        "label",
    ]
    path = written(tmp_path, "b.csv", '"my\ntext";"label"\na;0\n')
    assert read_file(path).columns == {"my\ntext": ["a"], "label": ["0"]}


def test_two_possible_separators_are_not_guessed(tmp_path):
    with pytest.raises(TaskError, match="separated by semicolon or bar.*separator="):
        read_file(written(tmp_path, "a.csv", "a;b|c\n1;2|3\n"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\na,0\nb\n", "a.csv, line 3: 1 fields where the header has 2"),
        ("a.csv", "text,label\na, b,0\n", "line 2: 3 fields.*Quote texts that hold a comma"),
        ("a.csv", "text,text\na,0\n", "the header names 'text' twice"),
        ("a.csv", "text,,label\na,b,0\n", "column 2 has no name"),
        (
            "a.csv",
            'text,label\n"two\nlines",0\ntext,label\n',
            "line 4: the header stands here again",
        ),
        ("a.csv", 'text,label\n"never closed,0\n', "line 2:.*quotation mark never closed"),
        ("a.tsv", 'text\tlabel\n"odd\t0\nmore" here\t1\n', "line 2"),
        ("a.csv", b"text,label\ncaf\xe9,0\n", "a.csv, line 2: the byte 0xe9 is no UTF-8"),
        ("a.csv", "text,label\n".encode("utf-16"), "UTF-16"),
        ("a.csv", "text,label\na,0\n".encode("utf-16-le"), "is UTF-16 text.*Save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-be"), "is UTF-16 text"),
        ("a.csv", "text,label\n".encode("utf-32"), "is UTF-32 text"),
        ("a.csv", "text,label\na,0\n".encode("utf-32-be"), "is UTF-32 text"),
        ("a.csv", gzip.compress(b"text,label\n", mtime=0), "a.csv is a file packed by gzip"),
        (
            "a.csv.gz",
            gzip.compress(gzip.compress(b"text", mtime=0), mtime=0),
            "is a file packed by gzip",
        ),
        ("a.jsonl", b"PK\x03\x04\x14", "is a zip archive or a spreadsheet"),
        ("a.csv", b"PAR1\x15\x04\x15", "is a parquet file.*name it by what it is"),
        ("a.jsonl", '{"text": "a"}\n\nnot json\n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1.*'text' stands in it twice"),
        ("a.jsonl", '["a"]\n', "line 1: expected a JSON object, found list"),
        ("a.json", '[{"text": "a"}, 3]', "row 2: expected a JSON object, found int"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.parquet", b"PAR1", "a.parquet cannot be read as .parquet"),
        ("a.xlsx", b"PK", "cannot read '.xlsx'; expected .jsonl"),
        ("a", b"", "a file without suffix"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(name, content, said, tmp_path):
    with pytest.raises(TaskError, match=said):
        read_file(written(tmp_path, name, content))


def test_rows_are_named_by_the_line_on_which_they_begin(tmp_path):
    path = written(tmp_path, "a.csv", 'text,label\n"one\ntwo",0\n\nb,1\n')
    assert [read_file(path).row(index) for index in (0, 1)] == ["a.csv, line 2", "a.csv, line 5"]


def test_an_unnamed_first_column_is_the_index_of_pandas(tmp_path):
    frame = pandas.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}, index=["r1", "r2"])
    frame.to_csv(tmp_path / "a.csv")
    assert read_file(tmp_path / "a.csv").columns == {"text": ["a", "b"], "label": ["x", "y"]}


@pytest.mark.parametrize("name", [None, "writer"])
def test_the_index_of_pandas_is_no_second_text(name, tmp_path):
    rows = make_rows(20)
    frame = pandas.DataFrame(rows, index=pandas.Index([f"w{n}" for n in range(20)], name=name))
    frame.to_parquet(tmp_path / "train.parquet")
    task = load_task(tmp_path / "train.parquet")
    assert task.text_columns == ("text",)
    if name:  # it may still be asked for
        assert (
            load_task(tmp_path / "train.parquet", text_columns="writer").train["writer"][0][0]
            == "w"
        )


def test_names_of_classes_are_read_from_parquet(tmp_path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    rows = {"text": [f"t{n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=kinds).to_parquet(str(tmp_path / f"{split}.parquet"))
    task = load_task(tmp_path)
    assert task.label_names == ("spam", "ham") and task.test["label"][:] == rows["label"]


def test_class_numbers_beside_plain_numbers_are_refused(tmp_path):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    rows = {"text": [f"t{n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    Dataset.from_dict(rows, features=kinds).to_parquet(str(tmp_path / "train.parquet"))
    write_jsonl(tmp_path / "test.jsonl", make_rows(6))
    with pytest.raises(TaskError, match=r"test.jsonl, line 1.*expected one of \['spam', 'ham'\]"):
        load_task(tmp_path)


# --- folders


@pytest.mark.parametrize(
    "name", ["dev", "val", "valid", "validation", "Dev", "VALIDATION", "dev-00000-of-00001"]
)
def test_customary_names_of_validation(name, tmp_path):
    write_splits(tmp_path, train=make_rows(20), test=make_rows(8, start=50))
    write_jsonl(tmp_path / f"{name}.jsonl", make_rows(6, start=30))
    task = load_task(tmp_path)
    assert task.sizes == {"train": 20, "validation": 6, "test": 8}
    assert task.source["splits"]["validation"] == "validation"


@pytest.mark.parametrize(
    "name",
    [
        "test_old.jsonl",
        "dev-2.csv",
        "test.txt",
        "validation.xlsx",
        "train-00000-of-00002.parquet",
        "valdiation.csv",
        "trian.jsonl",
        *(
            "test.tar.gz",
            "test.gz",
            "test.txt.gz",
            "test.parquet.gz",
            "test.tab",
            "test.dat",
            "test",
        ),
        *(
            "test.jsonlines",
            "test.pq",
            "test.psv",
            "test.npy",
            "test.7z",
            "test.xml",
            "test.csv.part",
        ),
        *("tests.csv", "testset.csv", "TestData.csv", "mytest.csv", "devel.csv", "devset.csv"),
        *("validate.csv", "eval.csv", "holdout.csv", "tets.csv", "tset.csv", "test_old.pickle"),
    ],
)
def test_what_looks_like_a_split_and_is_not_read_is_an_error(name, tmp_path):
    write_splits(tmp_path, train=make_rows(20), validation=make_rows(6))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(TaskError, match="looks like a split") as caught:
        load_task(tmp_path)
    assert name in str(caught.value)


def test_a_folder_for_a_split_is_an_error_and_other_files_are_left_alone(tmp_path):
    write_splits(tmp_path, train=make_rows(20), validation=make_rows(6, start=40))
    for name in (
        "README.md",
        "notes.csv",
        "text.csv",
        "testimonials.csv",
        ".test.jsonl.swp",
        "train.log",
        "test.md",
        "test.py",
        "test.csv.bak",
        "test.csv~",
        "latest.csv",
        "invalid.csv",
        "devices.csv",
    ):
        (tmp_path / name).write_text("x")
    assert load_task(tmp_path).sizes["train"] == 18
    (tmp_path / "test").mkdir()
    with pytest.raises(TaskError, match="test looks like a split and is a folder.*load_from_disk"):
        load_task(tmp_path)


@pytest.mark.parametrize("name", ["test.csv", "test-00000-of-00001.parquet"])
def test_a_split_one_folder_down_is_an_error_where_the_folder_lacks_it(name, tmp_path):
    write_splits(tmp_path, train=make_rows(20), validation=make_rows(6, start=40))
    (tmp_path / "data").mkdir()
    for harmless in ("train.csv", "notes.csv"):
        (tmp_path / "data" / harmless).write_text("x")
    assert load_task(tmp_path).sizes["train"] == 18
    (tmp_path / "data" / name).write_text("x")
    with pytest.raises(TaskError, match=f"/data/{name} looks like a split"):
        load_task(tmp_path)


def test_a_link_that_points_nowhere_is_an_error(tmp_path):
    write_splits(tmp_path, train=make_rows(20), validation=make_rows(6, start=40))
    (tmp_path / "test.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(TaskError, match="test.csv points nowhere.*gone.csv"):
        load_task(tmp_path)


def test_a_separator_is_for_the_csv_files_of_a_folder(tmp_path):
    write_splits(tmp_path, train=make_rows(20), validation=make_rows(6, start=40))
    for place in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(TaskError, match="separator is for CSV files"):
            load_task(place, separator=";")
    (tmp_path / "test.csv").write_text("text;label\na;0\nb;1\n")
    assert load_task(tmp_path, separator=";").sizes["test"] == 2


def test_two_files_for_one_split(tmp_path):
    write_splits(tmp_path, train=make_rows(20), validation=make_rows(6), dev=make_rows(6))
    with pytest.raises(TaskError, match="holds validation more than once.*dev.jsonl"):
        read_folder(tmp_path)


def test_a_folder_with_one_other_file_says_how_to_read_it(tmp_path):
    written(tmp_path, "reviews.csv", "text,label\na,0\n")
    with pytest.raises(EmptySplit, match="reviews.csv.*by its own path"):
        read_folder(tmp_path)


# --- texts


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": None, "label": 0}, "line 21.*such as None"),
        ({"label": 0}, "line 21.*such as None"),
        ({"text": 2012, "label": 0}, r"line 21.*such as 2012 \(int\)"),
        ({"text": ["a"], "label": 0}, "list"),
        ({"text": "\ud83d", "label": 0}, "lone surrogate"),
    ],
)
def test_what_is_no_text_is_refused_by_its_line(row, said, tmp_path):
    lines = [json.dumps(one) for one in [*make_rows(20), row]]
    written(tmp_path, "train.jsonl", "\n".join(lines))
    write_jsonl(tmp_path / "test.jsonl", make_rows(6, start=50))
    with pytest.raises(NotText, match=f"train.jsonl.*{said}"):
        load_task(tmp_path, text_columns="text", protocol="default")


def test_a_file_without_a_label_column_says_so_whether_it_has_rows_or_not(tmp_path):
    for content in ("review,stars\ngood,5\n", "review,stars\n"):
        path = written(tmp_path, "train.csv", content)
        with pytest.raises(
            TaskError, match=r"no label column 'label'; found \['review', 'stars'\]"
        ):
            load_task(path)


def test_a_disk_error_is_a_task_error(tmp_path, monkeypatch):
    def fails(self):
        raise PermissionError(13, "Permission denied")

    path = write_jsonl(tmp_path / "train.jsonl", make_rows(4))
    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(TaskError, match="train.jsonl cannot be read .Permission denied."):
        read_file(path)


def test_pyarrow_and_pandas_give_one_fingerprint(tmp_path):
    rows = make_rows(20)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    pandas.DataFrame(rows).to_parquet(tmp_path / "b.parquet")
    first, second = (load_task(tmp_path / f"{name}.parquet") for name in "ab")
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("kind", ["null", "absent", "parquet"])
def test_a_row_without_its_second_text_is_refused_by_its_line(kind, tmp_path):
    rows = [row | {"second": f"s {row['text']}"} for row in make_rows(30)]
    rows[6]["second"] = None
    if kind == "parquet":
        pandas.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    elif kind == "absent":
        del rows[6]["second"]
    if kind != "parquet":
        write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(NotText, match=r"train\.\w+, (line|row) 7, column 'second'"):
        load_task(next(tmp_path.iterdir()))


# --- parquet


def parquet_file(path: Path, *, metadata: dict | None = None, **columns) -> Path:
    """Two rows of a text and a label, and more columns of Arrow."""
    table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]} | columns)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


UNREADABLE = {
    "timestamp out of range": pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
    "unknown zone": pyarrow.array([0, 0], pyarrow.timestamp("us", tz="Mars/Base")),
    "no UTF-8": pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([b"\xff", b"a"]).buffers()
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_column_that_python_cannot_hold_is_named(case, tmp_path):
    path = parquet_file(tmp_path / "a.parquet", when=UNREADABLE[case])
    with pytest.raises(TaskError, match="a.parquet: column 'when' cannot be read") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"huggingface": "xx"},
        {"huggingface": '{"info": null}'},
        {"huggingface": '{"info": {"features": [1]}}'},
        {"huggingface": '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}'},
        {"pandas": "{"},
        {"pandas": "[]"},
        {"pandas": '{"index_columns": 3, "columns": 4}'},
        {"pandas": '{"index_columns": ["key"], "columns": [{"name": "key"}, 3]}'},
        {"pandas": b"\xff"},
    ],
)
def test_notes_that_cannot_be_read_are_left_alone(metadata, tmp_path):
    path = parquet_file(tmp_path / "a.parquet", metadata=metadata)
    assert read_file(path).columns == {"text": ["a", "b"], "label": [0, 1]}


def test_an_error_of_parquet_is_one_line(tmp_path):
    with pytest.raises(TaskError, match="cannot be read as .parquet") as caught:
        read_file(written(tmp_path, "a.parquet", b"PAR1 and nothing else that is one"))
    assert "\n" not in str(caught.value)
