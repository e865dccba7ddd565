"""Which runs of a sweep are done, which are to be made and why, and which value the tries choose."""

import hashlib
import json
import math

import pytest
import yaml
from toy_experiment import SCRIPT, use_toy, write_toy

from lpft_nb.lab.code_in_use import code_state
from lpft_nb.lab.parameters import ParameterError
from lpft_nb.lab.sweep_file import read_sweep
from lpft_nb.lab.sweep_plan import (
    computing_versions,
    estimated_seconds,
    job_table,
    note_path,
    past_seconds,
    plan_sweep,
)
from lpft_nb.records import make_record, write_record


@pytest.fixture
def toys(tmp_path, monkeypatch):
    use_toy(tmp_path / "toys", monkeypatch)
    return tmp_path / "toys"


@pytest.fixture
def sweep(tmp_path, toys):
    def read(**said):
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump({"experiment": "toy"} | said))
        return read_sweep(path)

    return read


def make(job, *, score=0.5, status="finished", seconds=2.0):
    "The record of a job, as its run would leave it."
    rows = [{"stage": "LP", "split": "validation", "metric": "accuracy", "value": score}]
    rows = rows if status == "finished" else []
    record = make_record(
        **job.run.identity, stages=[{"name": "LP"}], metrics=rows, wall_seconds=seconds, status=status,
        error=None if status == "finished" else "E: no",
    )  # fmt: skip
    return write_record(record, None, job.run.path.parent)


def reasons(plan):
    return [job.reason for job in plan.jobs]


# --- states --------------------------------------------------------------------------------------------------------


def test_what_is_missing_damaged_or_failed_is_to_be_made(sweep, tmp_path):
    five = sweep(value=[1, 2, 3, 4])
    first = plan_sweep(five, tmp_path)
    assert reasons(first) == ["no record"] * 4 and len({job.name for job in first.jobs}) == 4
    make(first.jobs[0])
    path = make(first.jobs[1])
    path.write_bytes(path.read_bytes().replace(b"validation", b"vblidation", 1))
    make(first.jobs[2], status="failed")
    assert reasons(plan_sweep(five, tmp_path)) == [
        "",
        "damaged record",
        "failed before",
        "no record",
    ]


def note_on(job, output, toys, modules=("lpft_nb.store.names",)):
    digest = hashlib.sha256(job.run.path.read_bytes()).hexdigest()
    code = code_state(toys / "toy.ipynb", modules, computing_versions())
    path = note_path(output, "made", job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"record": digest, "code": code}))
    return path


def test_a_record_is_old_when_code_or_versions_are_and_not_when_prose_is(sweep, toys, tmp_path):
    one = sweep()
    job = plan_sweep(one, tmp_path).jobs[0]
    make(job)
    path = note_on(job, tmp_path, toys)
    assert reasons(plan_sweep(one, tmp_path)) == [""]
    write_toy(toys, prose="Other words.")
    assert reasons(plan_sweep(one, tmp_path)) == [""]
    write_toy(toys, script=SCRIPT + "\n\n\nNEW = 1")
    assert reasons(plan_sweep(one, tmp_path)) == ["code of toy.ipynb"]
    assert reasons(plan_sweep(one, tmp_path, missing_only=True)) == [""]
    write_toy(toys)
    note = json.loads(path.read_text())
    note["code"]["versions"]["torch"] = "1.0"
    note["code"]["modules"]["lpft_nb.store.names"] = "0" * 12
    path.write_text(json.dumps(note))
    (reason,) = reasons(plan_sweep(one, tmp_path))
    assert "code of lpft_nb.store.names" in reason and "torch 1.0 →" in reason
    path.write_text("{half a no")
    assert reasons(plan_sweep(one, tmp_path)) == [""]


def test_a_record_made_by_another_hand_since_counts_as_it_is(sweep, toys, tmp_path):
    one = sweep()
    job = plan_sweep(one, tmp_path).jobs[0]
    make(job)
    note_on(job, tmp_path, toys)
    write_toy(toys, script=SCRIPT + "\n\n\nNEW = 1")
    job.run.path.unlink()
    make(job, seconds=9.0)
    assert reasons(plan_sweep(one, tmp_path)) == [""]


def test_an_experiment_that_makes_several_runs_for_one_value_is_refused(sweep, toys, tmp_path):
    twice = SCRIPT.replace(
        "        yield Run(method, seed, settings,",
        "        yield Run(method, seed, settings | {'rate': 9.0}, make=toy_make.make, task=task, model=model)\n"
        "        yield Run(method, seed, settings,",
    )
    write_toy(toys, script=twice)
    with pytest.raises(ParameterError, match="several runs for one value of each axis"):
        plan_sweep(sweep(), tmp_path)


# --- tries ---------------------------------------------------------------------------------------------------------

TUNE = {"values": {"rate": [1.0, 2.0, 4.0]}, "seeds": [7, 8]}


def test_the_best_mean_over_the_tuning_seeds_is_evaluated(sweep, tmp_path):
    tuned = sweep(seeds=[0, 1], methods=["LP", "FT"], tune=TUNE)
    plan = plan_sweep(tuned, tmp_path)
    assert len(plan.jobs) == 2 * 6 and plan.waiting == 4 and all(job.tuning for job in plan.jobs)
    assert all(job.run.path.parents[1].name == "tries" for job in plan.jobs)
    scores = {("FT", 1.0, 7): 0.9, ("FT", 1.0, 8): 0.2, ("FT", 2.0, 7): 0.6, ("FT", 2.0, 8): 0.6}
    for job in plan.jobs:
        key = (job.run.method, job.requested["rate"], job.run.seed)
        if job.run.method == "FT":
            make(job, score=scores.get(key, 0.1))
    plan = plan_sweep(tuned, tmp_path)
    evaluated = [job for job in plan.jobs if not job.tuning]
    assert plan.waiting == 2 and [job.run.method for job in evaluated] == ["FT", "FT"]
    assert {job.requested["rate"] for job in evaluated} == {2.0}
    assert [job.run.seed for job in evaluated] == [0, 1]
    best = plan.choices[plan.choices["best"]]
    assert best["mean"].tolist() == [0.6] and best["n"].tolist() == [2]


@pytest.mark.parametrize(("largest", "chosen"), [(True, 2.0), (False, 1.0)])
def test_small_can_be_good_and_the_first_of_equals_is_taken(largest, chosen, sweep, tmp_path):
    tuned = sweep(tune=TUNE | {"largest": largest})
    for job in plan_sweep(tuned, tmp_path).jobs:
        make(job, score={1.0: 0.1, 2.0: 0.5, 4.0: 0.5}[job.requested["rate"]])
    (job,) = [job for job in plan_sweep(tuned, tmp_path).jobs if not job.tuning]
    assert job.requested["rate"] == chosen


def test_nothing_is_chosen_from_half_of_the_tries_or_from_nan(sweep, tmp_path):
    tuned = sweep(tune=TUNE)
    jobs = plan_sweep(tuned, tmp_path).jobs
    for job in jobs[:-1]:
        make(job)
    assert plan_sweep(tuned, tmp_path).waiting == 1
    make(jobs[-1], score=math.nan)
    (job,) = [job for job in plan_sweep(tuned, tmp_path).jobs if not job.tuning]
    assert job.requested["rate"] == 1.0


def test_a_metric_that_there_is_not_is_named(sweep, tmp_path):
    tuned = sweep(tune=TUNE | {"metric": "acuracy"})
    for job in plan_sweep(tuned, tmp_path).jobs:
        make(job)
    with pytest.raises(ParameterError, match="did you mean 'accuracy'"):
        plan_sweep(tuned, tmp_path)


def test_a_seed_that_chooses_does_not_judge(sweep, tmp_path):
    with pytest.raises(ParameterError, match=r"seeds \[8\] are evaluated as well"):
        plan_sweep(sweep(seeds=[8, 9], tune=TUNE), tmp_path)


# --- what is shown -------------------------------------------------------------------------------------------------


def test_time_is_estimated_from_the_nearest_records(sweep, tmp_path):
    grid = sweep(methods=["LP", "FT"], seeds=[0, 1, 2])
    plan = plan_sweep(grid, tmp_path)
    assert estimated_seconds(plan.to_make, past_seconds(tmp_path, "toy")) is None
    for job, seconds in zip(plan.jobs, (10.0, 100.0, 20.0, 200.0), strict=False):
        make(job, seconds=seconds)
    plan = plan_sweep(grid, tmp_path)
    assert estimated_seconds(plan.to_make, past_seconds(tmp_path, "toy")) == 15.0 + 150.0


def test_the_table_shows_what_differs(sweep, tmp_path):
    table = job_table(plan_sweep(sweep(value=[1, 2], rate=3.0), tmp_path))
    assert list(table.columns) == ["value", "steps", "state", "run"]
    assert table["value"].tolist() == ["1", "2"]
