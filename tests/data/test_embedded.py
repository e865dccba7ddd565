"""Embedded docstrings: balanced, disjoint, repeatable, and honest about what is missing."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from conftest import ROOT
from data_files import make_rows, write_splits
from lpft_nb.data import docstrings
from lpft_nb.data import embedded as data_embedded
from lpft_nb.tasks import EMBEDDED, NotReachable, Task, TaskError, load_task


@pytest.fixture(scope="module", params=EMBEDDED)
def embedded(request) -> Task:
    return load_task(request.param)


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
    drawn, _ = data_embedded._draw(definition)
    inside, _ = data_embedded._candidates(definition.inside, definition)
    outside, _ = data_embedded._candidates(definition.outside, definition)
    owner = {
        data_embedded._key(text): candidate.order
        for candidate in data_embedded._without_repeats(inside + outside)
        for text in sum(candidate.ranked.values(), [])
    }
    owners = [
        one
        for rows in drawn.values()
        for one in {owner[data_embedded._key(row[0])] for row in rows}
    ]
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
        tmp_path / "mine",
        train=make_rows(20),
        validation=make_rows(6, start=20),
        test=make_rows(8, start=30),
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
    docstrings.read_docstrings.cache_clear()
    load_task("docstring-topic")
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_embedded_record_holds_versions(embedded):
    import sklearn

    source = embedded.source
    assert source["kind"] == "embedded" and source["missing"] == [] and json.dumps(source)
    assert source["versions"]["sklearn"] == sklearn.__version__
    assert sum(source["ranks"]["train"].values()) == len(embedded.train)


def hide(monkeypatch, package):
    find = docstrings.importlib.util.find_spec
    monkeypatch.setattr(
        docstrings.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )
    docstrings.read_docstrings.cache_clear()


def test_a_missing_optional_package_leaves_its_set_out(monkeypatch, caplog):
    complete = load_task("docstring-topic")
    hide(monkeypatch, "networkx")
    with caplog.at_level("WARNING", logger="lpft_nb"):
        task = load_task("docstring-topic")
    docstrings.read_docstrings.cache_clear()
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
    docstrings.read_docstrings.cache_clear()


def test_docstrings_agree_with_the_imported_package():
    """Oracle: the docstrings that Python itself sees on networkx.linalg's functions."""
    import inspect

    import networkx

    read = {
        docstring.place.split("::")[1]: docstring
        for docstring in docstrings.read_docstrings("networkx/linalg")
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
