"""Records of what a recommendation goes by: made and read back, the arm that an advice stands for, and what is not judged."""

import dataclasses
import math
from itertools import product

import pytest
from toy_records import SURROUNDINGS

from lpft_nb.advice import HeadMeasures, advise, measure_head
from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.intervals import Interval
from lpft_nb.lab.advice_runs import (
    ARMS,
    SEEDS,
    advised,
    arm_of,
    arm_table,
    judged,
    measure_rows,
    on_nearness,
    read_measures,
)
from lpft_nb.lab.answers import answer
from lpft_nb.lab.comparisons import Grid
from lpft_nb.lab.preparation_answers import PLAIN
from lpft_nb.lab.runs import load_model
from lpft_nb.records import make_record, read_record, write_record
from lpft_nb.tasks import load_task

ENERGIES = {"FT": 1.0, "4 epochs": 0.8, "16 epochs": 0.5, "64 epochs": 0.2, "LP-FT": 0.01}
MEASURES = HeadMeasures(
    examples=100, features=384, classes=2, majority=0.5, start_energy=1.0, held_out=Interval(0.8, 0.75, 0.85),
    fitted=1.0, left=0.01, walk=tuple(0.9**epoch for epoch in range(60)), learning_rate=0.3, ft_ratio=0.8,
)  # fmt: skip


def planned(loaded, **request):
    experiment = find_experiment("head_advice")
    small = {"device": "cpu", "max_length": 16, "kernel_examples": 4, "max_train": None}
    return experiment.plan(experiment.check(small | request), loaded)[0]


def test_a_record_holds_what_was_measured(toy_task, tiny_checkpoint, tmp_path):
    task = load_task(str(toy_task))
    asked = dict(task=str(toy_task), model=str(tiny_checkpoint), output=str(tmp_path))
    first, second = planned(task, seeds=[3, 4], **asked)
    for run in (first, second):
        assert run.make(run) == run.path
        model = load_model(run.settings, task, run.seed).eval()
        expected = measure_head(model, task, 4, seed=run.seed)
        assert read_measures(read_record(run.path)) == expected
    assert read_record(first.path)["task"]["fingerprint"] == task.fingerprint
    assert read_measures(read_record(first.path)) != read_measures(read_record(second.path))


def test_another_method_than_a_probe_is_refused(toy_task, tiny_checkpoint):
    asked = dict(task=str(toy_task), model=str(tiny_checkpoint), methods=["LP-FT"])
    with pytest.raises(ParameterError, match="expected LP, for nothing but a probe"):
        planned(load_task(str(toy_task)), **asked)


def test_an_interval_that_is_not_there_is_read_back_as_none():
    alone = dataclasses.replace(MEASURES, held_out=Interval(0.8, math.nan, math.nan))
    rows = measure_rows(alone)
    assert {"held_out_low", "held_out_high"}.isdisjoint(row["metric"] for row in rows)
    history = [{"step": step, "value": one} for step, one in enumerate(alone.walk)]
    found = read_measures({"metrics": rows, "history": history[::-1]})
    assert math.isnan(found.held_out.low) and found.walk == alone.walk


def test_an_arm_is_chosen_by_its_energy():
    of = lambda share, **changes: arm_of(
        advise(dataclasses.replace(MEASURES, held_out=Interval(share, share, share), **changes)),
        ENERGIES,
    )
    assert of(0.5) == "FT"  # no better than the largest class
    targets = {share: math.sqrt(2) * (1 - share) for share in (0.55, 0.7, 0.85)}
    assert [of(share) for share in targets] == ["16 epochs", "16 epochs", "64 epochs"]
    assert of(0.51, walk=(1.0, 0.95, 0.69)) == "4 epochs"  # 0.69 is nearer to 0.8 than to 0.5
    assert of(0.99) == "LP-FT"  # the walk stops near 0.01
    assert of(0.85, left=0.3) == "LP-FT"  # a converged probe leaves more than is wanted
    assert of(0.85, walk=(1.0, 0.9)) == "LP-FT"  # a walk that does not get there


def write(folder, name, best, *, seeds=SEEDS, share=0.99, fingerprint=None, model="all-MiniLM-L6-v2", arms=ARMS):  # fmt: skip
    "The records of one task: every arm, and the advice."
    about = {"name": name, "fingerprint": name, "sizes": {"train": 100}}
    base = dict(model={"id": model}, surroundings=SURROUNDINGS)
    for seed, (arm, length) in product(range(seeds), arms.items()):
        rows = [
            dict(stage="LP", split="train", metric="energy", value=ENERGIES[arm]),
            dict(stage="FT", split="test", metric="accuracy", value=0.6 + 0.1 * (arm == best)),
        ]
        record = make_record(
            **base, experiment="head_preparation", method="LP-FT", seed=seed, task=about,
            parameters={"task": name, "model": model, "learning_rate": 1e-4} | PLAIN | {"probe_epochs": length},
            stages=[{"name": "LP"}, {"name": "FT"}], metrics=rows,
        )  # fmt: skip
        write_record(record, None, folder / "head_preparation")
    measures = dataclasses.replace(MEASURES, held_out=Interval(share, share - 0.005, share + 0.005))
    history = [
        dict(stage="LP", step=step, epoch=step, metric="energy", value=one)
        for step, one in enumerate(measures.walk)
    ]
    record = make_record(
        **base, experiment="head_advice", method="LP", seed=0, task=about | {"fingerprint": fingerprint or name},
        parameters={"task": name}, stages=[{"name": "LP"}], metrics=measure_rows(measures), history=history,
    )  # fmt: skip
    write_record(record, None, folder / "head_advice")


def test_advice_is_judged_on_the_arms_of_its_tasks(tmp_path):
    for number in range(10):
        near = number % 2 == 0
        name, best = f"task{number}", "LP-FT" if near else "FT"
        write(tmp_path, name, best, share=0.99 if near else 0.5)
    grid = Grid(tmp_path)
    assert len(arm_table(grid)) == 10 * SEEDS * len(ARMS)
    told = judged(grid).set_index("policy")
    assert told.loc["advice", "regret"] == 0 and (told["tasks"] == 10).all()
    assert told.loc["always FT", "regret"] == pytest.approx(0.05)
    assert told.loc["always LP-FT", "verdict"] == "advice better"


def test_what_cannot_be_judged_is_left_out(tmp_path):
    write(tmp_path, "whole", "FT")
    write(tmp_path, "two-seeds", "FT", seeds=2)
    write(tmp_path, "other-model", "FT", model="mpnet")
    write(tmp_path, "an-arm-short", "FT", arms={arm: ARMS[arm] for arm in list(ARMS)[1:]})
    grid = Grid(tmp_path)
    assert set(arm_table(grid)["task"]) == {"whole", "two-seeds"}
    assert list(advised(grid)) == ["whole"]
    assert judged(grid) is None
    empty = Grid(tmp_path / "nothing")
    assert arm_table(empty).empty and advised(empty) == {} and judged(empty) is None


def test_other_training_texts_are_refused(tmp_path):
    write(tmp_path, "toy", "FT", fingerprint="another")
    with pytest.raises(ValueError, match="toy: the advice was given for other training texts"):
        advised(Grid(tmp_path))


def test_nearer_tasks_want_longer_probes_where_they_do(tmp_path):
    shares = (0.55, 0.6, 0.7, 0.8, 0.9)
    for number, (share, arm) in enumerate([*zip(shares, ARMS), *zip(shares, ARMS)]):
        write(tmp_path, f"task{number}", arm, share=share + 0.001 * number)
    said = {"says": "…", "experiment": "head_preparation", "curve": "nearness", "above": 0}
    said["of"] = {"method": "LP-FT", "metric": "accuracy"}
    found = answer(said, Grid(tmp_path))
    (row,) = found.table.to_dict("records")
    assert (row["place"], row["n"], row["aside"]) == ("10 tasks", 10, "")
    assert 0.9 < row["mean"] < 1 and found.verdict.word == "supported"
    write(tmp_path, "task0", "LP-FT", share=0.551)  # overwrites the furthest task
    assert on_nearness(Grid(tmp_path))[0]["mean"] < row["mean"]


def test_nearness_says_nothing_of_nine_tasks(tmp_path):
    for number in range(9):
        write(tmp_path, f"task{number}", "FT", share=0.6 + 0.01 * number)
    (row,) = on_nearness(Grid(tmp_path))
    assert row["aside"] == "9 of at least 10 tasks" and math.isnan(row["mean"])  # one arm for all
    (row,) = on_nearness(Grid(tmp_path / "nothing"))
    assert (row["n"], row["aside"]) == (0, "0 of at least 10 tasks")
