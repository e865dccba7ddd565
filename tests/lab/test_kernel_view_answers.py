"""Paper C's claims answered from made-up records: the right numbers by hand, the right word, and what is set aside."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from toy_records import SURROUNDINGS

from conftest import ROOT
from lpft_nb.evidence import crossed_interval
from lpft_nb.lab.answers import answer, register
from lpft_nb.lab.comparisons import EXPERIMENTS, Grid, read_comparison
from lpft_nb.lab.kernel_view_answers import TUNED, with_view_numbers
from lpft_nb.lab.kernel_view_runs import STARTS
from lpft_nb.lab.notebooks import find_experiment
from lpft_nb.records import make_record, write_record

CLAIMS = yaml.safe_load((ROOT / "nbs" / "claims.yml").read_text(encoding="utf-8"))
C = [claim for claim in CLAIMS if claim["paper"] == "C"]
PARTS = {name: part for claim in C for name, part in claim["parts"].items()}
SPLITS = (13, 21, 42, 87, 100)


def write(folder, task="toy", *, prompt=True, formula="sgd", optimiser="sgd", tuned=0.9, kernel=0.88, holds=1.0, derivative=0.4, ranks=(0.5, 0.3), seeds=SPLITS, model="all-MiniLM-L6-v2", **settings):  # fmt: skip
    "The records of one task, a split each; the kernel's accuracy falls by a thousandth from split to split."
    for number, seed in enumerate(seeds):
        labels = torch.arange(100) % 2
        right = torch.arange(100) < round(100 * tuned)
        given = torch.where(right, labels, 1 - labels)
        reached = kernel - 0.001 * number
        values = {
            ("start", "train", "output_derivative"): derivative,
            ("FT", "test", "accuracy"): tuned,
            ("FT", "test", "kernel_accuracy"): reached,
            ("FT", "stage", "solves"): reached / tuned,
            ("FT", "stage", "kernel_behaviour"): holds if reached / tuned >= 0.9 else 0.0,
            ("start", "train", "lora_distance_2"): ranks[0] + 0.001 * number,
            ("start", "train", "lora_distance_16"): ranks[1],
        }
        used = {"task": task, "shots": 16, "prompt": prompt, "formula": formula, "optimiser": optimiser, "learning_rate": 1e-3, "epochs": 5}  # fmt: skip
        record = make_record(
            experiment="kernel_view", method="FT", seed=seed, parameters=used | settings,
            task={"name": task, "fingerprint": f"{seed:016d}", "sizes": {"train": 32, "test": 100}},
            model={"id": model}, stages=[{"name": "start"}, {"name": "FT"}],
            metrics=[dict(zip(("stage", "split", "metric"), key), value=value) for key, value in values.items()],
            surroundings=SURROUNDINGS,
        )  # fmt: skip
        scores = torch.nn.functional.one_hot(given, 2).double()
        arrays = {"scores/fine-tuned": scores, "labels/test": labels}
        axes = {"scores/fine-tuned": "example,class", "labels/test": "example"}
        write_record(record, arrays, folder / "kernel_view", axes)


def told(folder, part):
    found = answer(PARTS[part], Grid(folder))
    return found.table.to_dict("records"), found.verdict.word


def test_the_declared_parts_meet_records_of_which_the_answer_is_known(tmp_path):
    for name, kernel, bare, derivative in (
        ("right", 0.88, 0.5, 0.4),
        ("wrong", 0.7, 0.8, 0.9),
    ):
        folder = tmp_path / name
        write(folder, kernel=kernel, derivative=derivative)
        write(folder, prompt=False, kernel=bare, tuned=0.85, derivative=0.7)
        write(folder, formula="signgd", optimiser="adamw", kernel=0.87 if name == "right" else 0.4, learning_rate=2e-4)  # fmt: skip
        words = register(C, Grid(folder)).set_index("part")["verdict"]
        expected = "supported" if name == "right" else "contradicted"
        assert (words[["C1", "C2", "C4", "C5"]] == expected).all(), words
        few = "supported" if name == "right" else "not testable"  # none solved
        assert words["C3"] == few and words["C6"] == few
    write(tmp_path / "moved", holds=0.0)
    assert told(tmp_path / "moved", "C3")[1] == "contradicted"
    assert told(tmp_path / "moved", "C6")[1] == "not testable"  # speaks of kernel behaviour alone
    write(tmp_path / "apart", ranks=(0.3, 0.5))
    assert told(tmp_path / "apart", "C6")[1] == "contradicted"


def test_the_numbers_are_those_of_hand(tmp_path):
    write(tmp_path, kernel=0.88)
    write(tmp_path, prompt=False, kernel=0.5, tuned=0.8, learning_rate=1e-2)
    ((row,), _) = told(tmp_path, "C1")
    reached = 0.88 - 0.001 * np.arange(5)
    assert row["mean"] == pytest.approx(reached.mean() / 0.9) and row["n"] == 5
    ((row,), word) = told(tmp_path, "C2")
    gaps = (0.8 - (0.5 - 0.001 * np.arange(5))) - (0.9 - reached)
    expected = crossed_interval(gaps[:, None])
    assert (row["mean"], row["low"]) == pytest.approx((expected.mean, expected.low))
    assert word == "supported" and row["place"] == "toy"


def test_tasks_shots_and_models_are_places(tmp_path):
    write(tmp_path)
    write(tmp_path, "other")
    write(tmp_path, "other", shots=64, epochs=50)
    write(tmp_path, model="mpnet")
    rows, _ = told(tmp_path, "C1")
    assert [row["place"] for row in rows] == ["other, shots 16", "other, shots 64", "toy", "toy, mpnet"]  # fmt: skip


def test_two_settings_beside_what_a_side_names_are_not_compared(tmp_path):
    write(tmp_path)
    write(tmp_path, prompt=False, shots=64)
    rows, word = told(tmp_path, "C2")
    assert rows == [] and word == "not testable"


def test_two_runs_of_one_split_are_refused(tmp_path):
    write(tmp_path)
    write(tmp_path, learning_rate=5e-2)
    with pytest.raises(ValueError, match="one number a seed, got several"):
        told(tmp_path, "C1")


def test_places_that_cannot_tell_say_why(tmp_path):
    write(tmp_path, "few", seeds=SPLITS[:2])
    write(tmp_path, "chance", tuned=0.52, kernel=0.5)
    for task in ("few", "chance"):
        write(tmp_path, task, prompt=False, tuned=0.52, kernel=0.5, derivative=0.7, seeds=SPLITS[: 2 if task == "few" else 5])  # fmt: skip
    rows = {row["place"]: row["aside"] for row in told(tmp_path, "C2")[0]}
    assert rows == {"few": "2 replicates", "chance": "at chance"}
    rows = {row["place"]: row["aside"] for row in told(tmp_path, "C5")[0]}
    assert rows == {"few": "2 replicates", "chance": ""}  # stands before any training


def test_only_splits_that_the_kernel_solves_can_follow():
    rows = [
        dict(run_id=name, stage="FT", final=True, split="stage", metric=metric, value=value)
        for name, solves, behaviour in (("a", 0.95, 1.0), ("b", 0.95, 0.0), ("c", 0.5, 0.0), ("d", 0.95, math.nan))
        for metric, value in (("solves", solves), ("kernel_behaviour", behaviour))
        if math.isfinite(value)
    ]  # fmt: skip
    found = with_view_numbers(pd.DataFrame(rows))
    follows = found[found["metric"] == "follows"].set_index("run_id")["value"]
    assert follows.to_dict() == {"a": 1.0, "b": 0.0}
    assert len(found) == len(rows) + 2


def test_names_are_those_of_the_experiment():
    known = find_experiment("kernel_view").parameters
    assert set(TUNED) <= set(known) and EXPERIMENTS["kernel_view"] == STARTS
    for part in PARTS.values():
        if "experiment" in part:
            sides = read_comparison(part).sides
            assert all(set(side.at or {}) <= set(known) - set(TUNED) for side in sides)


def test_without_records_every_measured_part_is_not_testable(tmp_path):
    words = register(C, Grid(tmp_path)).set_index("part")["verdict"].to_dict()
    assert words == {"C7": "supported"} | dict.fromkeys(
        ("C1", "C2", "C3", "C4", "C5", "C6"), "not testable"
    )
