"""Floors, rates and drift by seed: against closed forms and by hand, with faults."""

import json
from pathlib import Path

import pandas as pd
import pytest

from conftest import ROOT
from lpft_nb.lab.first_results import (
    bag_of_words_accuracy,
    cosine_drift,
    learning_rates,
    majority_share,
    values_by_seed,
)
from lpft_nb.records import load_results
from lpft_nb.tasks import load_task


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


def test_rates_are_those_of_the_runs():
    results = load_results(ROOT / "results" / "lp_ft")
    of_cb = results[results["task"] == "cb"]
    assert learning_rates(of_cb, "FT") == {"cb": {5e-5}}


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


def test_two_models_of_one_task_are_not_taken_for_one():
    row = dict(task="cb", method="LP", metric="accuracy", split="test", seed=1, stage="LP")
    one = pd.DataFrame([row | {"value": 0.5, "final": True}])
    assert values_by_seed(one, "LP", "accuracy")["cb"].to_dict() == {1: 0.5}
    with pytest.raises(ValueError, match="one run of LP a task and seed, got several of cb with"):
        values_by_seed(pd.concat([one, one.assign(value=0.7)]), "LP", "accuracy")
