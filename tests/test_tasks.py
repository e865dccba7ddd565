"""Tasks: embedded docstrings, named data sets behind a replaced hub, the user's own files, and bad input."""

import csv
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb import tasks
from lpft_nb.tasks import (
    EMBEDDED,
    NAMED,
    EmptySplit,
    LabelError,
    MissingColumn,
    NotReachable,
    NotText,
    SingleClass,
    Task,
    TaskError,
    UnknownTask,
    list_tasks,
    load_task,
    take,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_local_data(monkeypatch):
    monkeypatch.delenv("LPFT_DATA", raising=False)


@pytest.fixture(scope="module", params=EMBEDDED)
def embedded(request) -> Task:
    return load_task(request.param)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def write_splits(folder: Path, **splits: list[dict]) -> Path:
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def make_rows(number: int, classes: int = 2, start: int = 0) -> list[dict]:
    return [
        {"text": f"sentence number {start + row}", "label": row % classes} for row in range(number)
    ]


# --- embedded tasks


def test_embedded_splits_are_balanced_and_of_the_stated_size(embedded):
    definition = EMBEDDED[embedded.name]
    for split in ("train", "validation", "test"):
        counts = embedded.class_counts[split]
        assert len(set(counts)) == 1 and counts[0] == definition.per_class[split]
    counts = embedded.class_counts["ood/other-libraries"]
    assert len(set(counts)) == 1 and 30 <= counts[0] <= definition.per_class["ood"]


def test_no_sentence_stands_in_two_splits(embedded):
    seen = {}
    for name, split in embedded.splits().items():
        if name.startswith("ood/") and name != "ood/other-libraries":
            continue
        for text in split["text"]:
            key = " ".join(text.casefold().split())
            assert key not in seen, f"{text!r} in {seen[key]} and {name}"
            seen[key] = name


def test_the_ood_set_is_the_union_of_the_libraries(embedded):
    parts = {name: split for name, split in embedded.ood.items() if name != "other-libraries"}
    pooled = Counter(
        zip(embedded.ood["other-libraries"]["text"], embedded.ood["other-libraries"]["label"])
    )
    assert pooled == sum(
        (Counter(zip(part["text"], part["label"])) for part in parts.values()), Counter()
    )
    training = {location.split("/")[0] for location in EMBEDDED[embedded.name].inside}
    assert len(parts) == 4 and not training & set(parts)


def test_no_two_splits_share_a_docstring(embedded):
    definition = EMBEDDED[embedded.name]
    drawn, _ = tasks._draw(definition)
    inside, _ = tasks._candidates(definition.inside, definition)
    outside, _ = tasks._candidates(definition.outside, definition)
    owner = {
        tasks._key(text): candidate.order
        for candidate in tasks._without_repeats(inside + outside)
        for text in sum(candidate.ranked.values(), [])
    }
    owners = [one for rows in drawn.values() for one in {owner[tasks._key(row[0])] for row in rows}]
    assert len(set(owners)) == len(owners)


def test_sentences_are_real_sentences(embedded):
    for split in embedded.splits().values():
        for text in split["text"]:
            assert len(text.split()) >= 4 and any(character.isalpha() for character in text)
            assert (
                "\n" not in text and "``" not in text and ":func:" not in text and ">>>" not in text
            )


def test_another_process_gets_the_same_task_and_prints_imports_and_writes_nothing(tmp_path):
    mine = write_splits(
        tmp_path / "mine", train=make_rows(20), validation=make_rows(6), test=make_rows(8)
    )
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import sys, datasets, lpft_nb
before = set(sys.modules)
from lpft_nb.tasks import load_task
task = load_task("docstring-topic")
load_task({str(mine)!r})
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & {{"sklearn", "networkx", "scipy", "torch", "matplotlib"}}, new
sys.stderr.write(task.fingerprint)
"""
    environment = dict(
        os.environ,
        PYTHONHASHSEED="123",
        HF_HUB_OFFLINE="1",
        HOME=str(home),
        HF_HOME=str(home / "hf"),
        XDG_CACHE_HOME=str(home / "cache"),
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == load_task("docstring-topic").fingerprint
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert sorted(path.name for path in mine.iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]


def test_embedded_loading_prints_and_warns_nothing(capfd, recwarn):
    tasks._read_docstrings.cache_clear()
    load_task("docstring-topic")
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_embedded_record_holds_versions(embedded):
    import sklearn

    source = embedded.source
    assert source["kind"] == "embedded" and source["missing"] == [] and json.dumps(source)
    assert source["versions"]["sklearn"] == sklearn.__version__
    assert sum(source["ranks"]["train"].values()) == len(embedded.train)


def hide(monkeypatch, package):
    find = tasks.importlib.util.find_spec
    monkeypatch.setattr(
        tasks.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )
    tasks._read_docstrings.cache_clear()


def test_a_missing_optional_package_leaves_its_set_out(monkeypatch, caplog):
    complete = load_task("docstring-topic")
    hide(monkeypatch, "networkx")
    with caplog.at_level("WARNING", logger="lpft_nb"):
        task = load_task("docstring-topic")
    tasks._read_docstrings.cache_clear()
    assert "networkx is not installed" in caplog.text
    assert (
        "networkx" not in task.ood
        and task.source["missing"] == ["networkx"]
        and "networkx" not in task.source["versions"]
    )
    assert task.train["text"][:] == complete.train["text"][:]
    assert len(set(task.class_counts["ood/other-libraries"])) == 1


def test_a_missing_training_package_is_an_error(monkeypatch):
    hide(monkeypatch, "scipy")
    with pytest.raises(NotReachable, match="scipy.*not installed"):
        load_task("docstring-topic")
    tasks._read_docstrings.cache_clear()


def test_docstrings_agree_with_the_imported_package():
    """Oracle: the docstrings that Python itself sees on networkx.linalg's functions."""
    import inspect

    import networkx

    read = {
        docstring.place.split("::")[1]: docstring
        for docstring in tasks._read_docstrings("networkx/linalg")
    }
    seen = 0
    for name, docstring in read.items():
        function = getattr(networkx, name, None)
        if function is not None:
            assert (
                inspect.getdoc(function).split("\n")[0] == docstring.text.split("\n")[0]
                and docstring.kind == "function"
            )
            seen += 1
    assert seen >= 10


def test_protocol_paper_is_refused_for_embedded_tasks():
    with pytest.raises(TaskError, match="in no paper"):
        load_task("docstring-topic", protocol="paper")


# --- the task object


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


@pytest.mark.parametrize("wrong", [1, 0, -3, 2.5, True, "20"])
def test_take_refuses(tmp_path, wrong):
    task = load_task(
        write_splits(
            tmp_path / "mine", train=make_rows(20), validation=make_rows(6), test=make_rows(8)
        )
    )
    with pytest.raises(TaskError, match="max_train"):
        take(task, wrong)


@pytest.mark.parametrize("number", [2, 9, 10, 11, 25, 101, 250, 2490, 8551])
def test_the_papers_split_is_scikit_learns(number):
    from sklearn.model_selection import train_test_split

    parts = tasks._split_tail({"row": list(range(number))})
    assert [part["row"] for part in parts] == train_test_split(
        list(range(number)), test_size=0.1, shuffle=False
    )


# --- named tasks behind a replaced hub


def hub_rows(definition: tasks.NamedTask, number: int, labelled: bool) -> dict[str, list]:
    """A hub's columns for a definition: inputs under the hub's names, and label in the hub's style."""
    theirs = {ours: hub for hub, ours in definition.rename.items()}
    columns = {
        theirs.get(name, name): [f"Some {name.upper()} {row}" for row in range(number)]
        for name in definition.inputs
    }
    labels = [row % len(definition.label_names) if labelled else -1 for row in range(number)]
    label = theirs.get("label", "label")
    if label != "label":
        columns["label"] = [
            99 - value for value in labels
        ]  # the hub's own numbers must not be used
        labels = [definition.label_names[value].lower() for value in labels]
    elif definition.hub == "armanc/pubmed-rct20k":
        labels = [definition.label_names[value].lower() for value in labels]
    return columns | {label: labels, "idx": list(range(number))}


class LocalHub:
    """Serves parquet copies of made-up data under the ids of the definitions."""

    def __init__(self, folder: Path, name: str):
        self.definition, self.folder, self.calls = NAMED[name], folder, []
        hidden = self.definition.hub == tasks.GLUE
        self.splits = {
            "train": (40, True),
            self.definition.validation: (12, True),
            "test": (6, not hidden),
        }
        for split, (number, labelled) in self.splits.items():
            table = pyarrow.table(hub_rows(self.definition, number, labelled))
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")

    def __call__(self, path, name=None, **rest):
        self.calls.append((path, name))
        loaded = {}
        for split in self.splits:
            data = Dataset.from_parquet(
                str(self.folder / f"{split}.parquet"), cache_dir=str(self.folder / "cache")
            )
            if (
                data.features["label"].dtype == "int64"
                and "label" not in self.definition.rename.values()
            ):
                data = data.cast_column(
                    "label", ClassLabel(names=list(self.definition.label_names))
                )
            loaded[split] = data
        return datasets.DatasetDict(loaded)


@pytest.mark.parametrize("name", [name for name, definition in NAMED.items() if definition.hub])
def test_hub_task_loads_with_its_format(name, tmp_path, monkeypatch):
    hub = LocalHub(tmp_path, name)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    definition = NAMED[name]
    task = load_task(name, protocol="paper")
    assert hub.calls == [(definition.hub, definition.config)]
    assert (
        task.text_columns == (definition.text_columns or definition.inputs)
        and task.label_names == definition.label_names
    )
    assert task.source["id"] == definition.hub and task.source["tried"] is False
    expected = (
        {"train": 40, "validation": 12, "test": 6}
        if definition.paper == "own"
        else {"train": 36, "validation": 4, "test": 12}
    )
    assert task.sizes == expected
    assert task.train["label"][:] == [row % task.num_labels for row in range(expected["train"])]
    first = task.train[0]
    if name == "wic":
        assert (
            first["text"]
            == "Some SENTENCE1 0 Some SENTENCE2 0 Does Some WORD 0 have the same meaning in both sentences?"
        )
    elif name == "wsc":
        assert (first["sentence1"], first["sentence2"]) == (
            "Some SPAN2_TEXT 0: Some TEXT 0",
            "Some SPAN1_TEXT 0",
        )
    else:
        for column, source in zip(task.text_columns, definition.inputs):
            text = f"Some {source.upper()} 0"
            assert first[column] == (text.lower() if name == "pubmed20k" else text)


@pytest.mark.parametrize("name", ["rte", "lmbff_qnli", "lmbff_snli"])
def test_default_protocol_uses_test_labels_where_they_are_public(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", LocalHub(tmp_path, name))
    hidden = NAMED[name].hub == tasks.GLUE
    expected = (
        {"train": 36, "validation": 4, "test": 12}
        if hidden
        else {"train": 40, "validation": 12, "test": 6}
    )
    assert load_task(name).sizes == expected


def test_hub_labels_go_by_name_and_unlabelled_rows_are_dropped(monkeypatch):
    turned = Features(
        {
            "premise": Value("string"),
            "hypothesis": Value("string"),
            "label": ClassLabel(names=["contradiction", "neutral", "entailment"]),
        }
    )
    split = Dataset.from_dict(
        {"premise": list("abcdef"), "hypothesis": list("ghijkl"), "label": [0, 1, 2, -1, 2, 0]},
        features=turned,
    )
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_: datasets.DatasetDict(train=split, validation=split, test=split),
    )
    task = load_task("lmbff_snli")
    assert task.train["label"][:] == [2, 1, 0, 0, 2] and task.train["sentence1"][:] == list("abcef")


def test_every_hub_id_stands_with_a_source_and_is_marked():
    frame = list_tasks()
    assert (
        list(frame.columns[:5]) == ["name", "kind", "classes", "source", "tried"]
        and frame["name"].is_unique
    )
    assert set(frame[frame.kind == "hub"].tried) == {False} and set(
        frame[frame.kind == "embedded"].tried
    ) == {True}
    assert sum(frame["name"].str.startswith("lmbff_")) == 14
    assert {"cb", "rte", "boolq", "wic", "wsc", "cola", "sst2", "mrpc", "pubmed20k", "boss"} <= set(
        frame["name"]
    )


@pytest.mark.parametrize(
    "error",
    [ConnectionError("offline"), FileNotFoundError("gone"), ValueError("BuilderConfig not found")],
)
def test_no_hub_is_a_named_error_with_advice(monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(NotReachable, match="LPFT_DATA.*docstring-topic") as caught:
        load_task("cb")
    assert str(error) in str(caught.value)


def test_no_known_hub_copy_is_a_named_error():
    with pytest.raises(NotReachable, match="LPFT_DATA"):
        load_task("amazon")


# --- LPFT_DATA and real data


def test_local_data_goes_before_the_hub_and_is_formatted(tmp_path, monkeypatch):
    rows = [
        {"word": "bank", "sentence1": f"A {row}.", "sentence2": "B.", "label": row % 2}
        for row in range(10)
    ]
    write_splits(tmp_path / "wic", train=rows, validation=rows)
    monkeypatch.setenv("LPFT_DATA", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("the hub was asked"))
    task = load_task("wic")
    assert task.train[1] == {
        "text": "A 1. B. Does bank have the same meaning in both sentences?",
        "label": 1,
    }
    assert task.label_names == ("False", "True") and task.source["kind"] == "directory"
    assert list_tasks().set_index("name").loc["wic", "kind"] == "directory"
    assert str(tmp_path) not in json.dumps(task.source)


def test_boss_has_its_out_of_distribution_sets(tmp_path, monkeypatch, caplog):
    rows = make_rows(30, classes=3)
    write_splits(tmp_path / "amazon", train=rows, validation=rows[:6], test=rows[:9])
    write_splits(tmp_path / "dynasent", validation=rows[:3], test=rows[:12])
    write_splits(tmp_path / "semeval", test=rows[:7])
    monkeypatch.setenv("LPFT_DATA", str(tmp_path))
    task = load_task("boss", protocol="paper")
    assert task.sizes == {
        "train": 27,
        "validation": 3,
        "test": 9,
        "ood/dynasent": 12,
        "ood/semeval": 7,
    }
    assert task.source["missing"] == ["sst5_ood"] and "sst5_ood is left out" in caplog.text
    assert task.label_names == ("negative", "positive", "neutral")
    with pytest.raises(EmptySplit, match="boss"):
        load_task("dynasent")


def test_a_wrong_data_root_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("LPFT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(NotReachable, match="no directory"):
        load_task("cb")


ROWS = {  # train / validation / test rows of the data's README
    "cb": (250, 56, None),
    "rte": (2490, 277, None),
    "boolq": (1834, 1500, None),
    "cola": (8551, 1043, None),
    "sst2": (20000, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "pubmed20k": (8208, 1191, 2339),
    "amazon": (1181, 150, 587),
    "sst5_ood": (4004, 533, 1067),
    "sst5": (8544, 1101, 2210),
    "lmbff_sst-2": (3000, None, 872),
    "lmbff_sst-5": (3000, None, 1000),
    "lmbff_mr": (3000, None, 1000),
    "lmbff_cr": (1769, None, 1000),
    "lmbff_mpqa": (3000, None, 1000),
    "lmbff_mnli": (3000, None, 1000),
    "lmbff_snli": (3000, None, 1000),
    "lmbff_qnli": (3000, None, 1000),
    "lmbff_rte": (2488, None, 277),
    "lmbff_mrpc": (3000, None, 408),
    "lmbff_qqp": (3000, None, 1000),
    "lmbff_agnews": (3000, None, 1000),
}


@pytest.mark.parametrize("name", ROWS)
def test_real_data_by_name_and_by_directory(name, shared_data, monkeypatch):
    if not (shared_data / name).is_dir():
        pytest.skip(f"{name} is not in the data root")
    monkeypatch.setenv("LPFT_DATA", str(shared_data))
    train, validation, test = ROWS[name]
    if validation is None or test is None:
        last = math.ceil(0.1 * train)
        train, validation, test = train - last, last, test or validation
    by_name, by_directory = load_task(name), load_task(shared_data / name)
    assert (
        by_name.sizes
        == by_directory.sizes
        == {"train": train, "validation": validation, "test": test}
    )
    assert (
        by_name.num_labels == by_directory.num_labels
        and by_name.class_counts == by_directory.class_counts
    )
    assert (by_name.fingerprint == by_directory.fingerprint) == (
        name != "pubmed20k"
    )  # that one is lower-cased by name


def test_real_data_in_the_papers_splits(shared_data, monkeypatch):
    """Table 7 of paper A, where the data is complete."""
    monkeypatch.setenv("LPFT_DATA", str(shared_data))
    for name, sizes in {
        "cb": (225, 25, 56),
        "rte": (2241, 249, 277),
        "cola": (7695, 856, 1043),
        "mrpc": (3301, 367, 408),
    }.items():
        assert tuple(load_task(name, protocol="paper").sizes.values()) == sizes
    boss = load_task("boss")
    assert boss.sizes["ood/dynasent"] == 4320 and boss.sizes["ood/sst5_ood"] == 1067


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


def test_unknown_protocol():
    with pytest.raises(TaskError, match="Did you mean 'paper'"):
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
        "bad/test: 1 of 8 labels.*found 2",
        changed("test", lambda rows: rows[2].update(label=2)),
    ),
    "negative label in train": (
        LabelError,
        "found -1, 0, 1",
        changed("train", lambda rows: rows[2].update(label=-1)),
    ),
    "labels start at one": (
        LabelError,
        "must be 0, 1, ..., C-1",
        {
            split: [row | {"label": row["label"] + 1} for row in rows]
            for split, rows in GOOD.items()
        },
    ),
    "float label": (LabelError, "0.5", changed("train", lambda rows: rows[2].update(label=0.5))),
    "missing label": (LabelError, "None", changed("validation", lambda rows: rows[2].pop("label"))),
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
    expect(tmp_path, LabelError, "4", {"train": rows, "test": rows[:8]})


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
    with pytest.raises(TaskError, match="more fields than the header"):
        load_task(tmp_path / "bad.csv")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(TaskError, match="cannot be read as .parquet"):
        load_task(tmp_path / "bad.parquet")
    (tmp_path / "data.tsv").write_text("text\tlabel\n")
    with pytest.raises(TaskError, match="expected .jsonl, .csv, .parquet"):
        load_task(tmp_path / "data.tsv")


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
