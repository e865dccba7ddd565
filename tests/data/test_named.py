"""Named data sets behind a replaced hub, in LPFT_DATA, and the real ones where they are at hand."""

import json
import math
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data_files import make_rows, write_splits
from lpft_nb.data import named, splits
from lpft_nb.data.table import Table
from lpft_nb.tasks import NAMED, EmptySplit, NotReachable, list_tasks, load_task


@pytest.fixture(autouse=True)
def no_local_data(monkeypatch):
    monkeypatch.delenv("LPFT_DATA", raising=False)


@pytest.mark.parametrize("number", [2, 9, 10, 11, 25, 101, 250, 2490, 8551])
def test_the_papers_split_is_scikit_learns(number):
    from sklearn.model_selection import train_test_split

    parts = splits.cut_tail(Table({"row": list(range(number))}, "toy"))
    assert [part.columns["row"] for part in parts] == train_test_split(
        list(range(number)), test_size=0.1, shuffle=False
    )


def hub_rows(definition: named.NamedTask, number: int, labelled: bool) -> dict[str, list]:
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
        hidden = self.definition.hub == named.GLUE
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
    numbers = [row % task.num_labels for row in range(40)]  # of the rows of train
    if definition.cut is splits.cut_stratified:
        cut = [max(1, round(0.1 * numbers.count(label))) for label in range(task.num_labels)]
        assert task.class_counts["validation"] == cut and task.sizes["test"] == 12
        assert sorted([*task.train["label"], *task.validation["label"]]) == sorted(numbers)
    else:
        expected = (
            {"train": 40, "validation": 12, "test": 6}
            if definition.paper == "own"
            else {"train": 36, "validation": 4, "test": 12}
        )
        assert task.sizes == expected
        assert task.train["label"][:] == numbers[: expected["train"]]
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
    hidden = NAMED[name].hub == named.GLUE
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


def _by_class(task):
    return "stratified" in task.source["splits"]["validation"]


@pytest.mark.parametrize("name", ROWS)
def test_real_data_by_name_and_by_directory(name, shared_data, monkeypatch):
    if not (shared_data / name).is_dir():
        pytest.skip(f"{name} is not in the data root")
    monkeypatch.setenv("LPFT_DATA", str(shared_data))
    train, validation, test = ROWS[name]
    by_name, by_directory = load_task(name), load_task(shared_data / name)
    assert _by_class(by_name) == name.startswith("lmbff_")
    if _by_class(by_directory) and not _by_class(by_name):  # ours, where validation is cut
        by_directory = load_task(shared_data / name, protocol="paper")
    if _by_class(by_name):
        counts = by_name.class_counts
        for left, cut in zip(counts["train"], counts["validation"], strict=True):
            assert cut == round(0.1 * (left + cut))
        validation = sum(counts["validation"])
        train, test = train - validation, test or validation
    elif validation is None or test is None:
        last = math.ceil(0.1 * train)
        train, validation, test = train - last, last, test or validation
    sizes = {"train": train, "validation": validation, "test": test}
    assert by_name.sizes == by_directory.sizes == sizes
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


def test_true_and_false_of_json_are_the_classes_of_boolq(tmp_path, monkeypatch):
    rows = [{"question": f"q{n}", "passage": f"p{n}", "label": n % 2 == 1} for n in range(20)]
    write_splits(tmp_path / "boolq", train=rows, validation=rows)
    monkeypatch.setenv("LPFT_DATA", str(tmp_path))
    task = load_task("boolq")
    assert task.label_names == ("False", "True") and task.test["label"][:] == [0, 1] * 10
