"""Floors and two sources of chance: against closed forms and by hand, with faults."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from lpft_nb.lab.first_results import (
    OTHER_LIBRARIES,
    accuracy_difference,
    bag_of_words_accuracy,
    cosine_drift,
    learning_rates,
    majority_share,
    right_answers,
)
from lpft_nb.records import load_results, read_records
from lpft_nb.tasks import load_task

FOLDER = ROOT / "results" / "lp_ft"


def test_the_largest_class_is_the_floor_and_no_example_is_an_error():
    assert majority_share([1, 3, 0]) == 0.75
    with pytest.raises(ValueError, match="got none"):
        majority_share([0, 0])


def write_task(folder: Path) -> Path:
    """Texts whose label is one word; the test split follows the rule, validation breaks it."""
    rule = [("alpha one", 0), ("beta one", 1), ("alpha two", 0), ("beta two", 1)]
    splits = {
        "train": rule * 3,
        "validation": [(text, 1 - label) for text, label in rule],
        "test": rule,
    }
    for name, rows in splits.items():
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_bag_of_words_finds_the_word_and_is_judged_on_the_named_splits(tmp_path):
    task = load_task(write_task(tmp_path))
    found = bag_of_words_accuracy(task, ("test", "validation"))
    assert found == {"test": 1.0, "validation": 0.0}


def test_a_bag_of_words_of_pairs_counts_the_words_of_either_text_apart(tmp_path):
    """The label is whether the second text is the word beta: a common bag could not tell."""
    rule = [("beta", "alpha", 0), ("alpha", "beta", 1)]
    for name in ("train", "validation", "test"):
        lines = [json.dumps({"text": a, "other": b, "label": label}) for a, b, label in rule * 6]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    task = load_task(tmp_path, text_columns=("text", "other"))
    assert bag_of_words_accuracy(task) == {"test": 1.0}


@pytest.fixture(scope="module")
def published():
    """Results and records of LP-FT and FT on CB."""
    records = [
        record
        for record in read_records(FOLDER)[0]
        if record["task"]["name"] == "cb" and record["method"] in ("LP-FT", "FT")
    ]
    return load_results(records), records


def test_right_answers_have_the_accuracies_of_the_records(published):
    results, records = published
    right = right_answers(records, FOLDER)
    assert set(right) == {("LP-FT", "cb", "test"), ("FT", "cb", "test")}
    for (method, _, split), table in right.items():
        rows = results[results["final"] & (results["method"] == method)]
        rows = rows[(rows["metric"] == "accuracy") & (rows["split"] == split)].set_index("seed")
        np.testing.assert_allclose(table.mean(axis=1), rows["value"].sort_index(), atol=1e-6)


def test_two_runs_of_one_seed_are_refused(published):
    with pytest.raises(ValueError, match="two of seed"):
        right_answers(published[1] + published[1][:1], FOLDER)


def test_a_difference_is_paired_and_wider_with_the_examples(published):
    results, records = published
    found = accuracy_difference(results, right_answers(records, FOLDER), ("LP-FT", "FT"), "cb")
    back = accuracy_difference(results, right_answers(records, FOLDER), ("FT", "LP-FT"), "cb")
    assert found.both.low < found.seeds.low < found.seeds.high < found.both.high
    np.testing.assert_allclose(found.both, [-back.both[0], -back.both[2], -back.both[1]])


def test_logits_of_other_runs_are_noticed(published):
    results, records = published
    right = right_answers(records, FOLDER)
    right["FT", "cb", "test"] = 1 - right["FT", "cb", "test"]
    with pytest.raises(ValueError, match="the same runs"):
        accuracy_difference(results, right, ("LP-FT", "FT"), "cb")


def test_rates_are_those_of_the_runs(published):
    results, _ = published
    assert learning_rates(results, "FT") == {"cb": {5e-5}}


def test_drift_of_the_cosine_keeps_its_sign_in_each_run():
    """Two runs that move by the same amount in opposite directions have moved."""
    rows = [
        ("LP", "start", 0, 0.5),
        ("LP", "start", 1, 0.5),
        ("FT", "FT", 0, 0.7),
        ("FT", "FT", 1, 0.3),
    ]
    frame = pd.DataFrame(rows, columns=["method", "stage", "seed", "value"]).assign(
        task="t", metric="mean_cosine", split="test"
    )
    frame["final"] = frame["stage"] != "start"
    drift = cosine_drift(frame, "FT")["t"]
    assert drift.mean() == pytest.approx(0) and drift.abs().mean() == pytest.approx(0.2)


def test_the_pooled_split_is_named_as_in_the_records():
    splits = load_results(FOLDER)["split"].unique()
    assert OTHER_LIBRARIES in splits
