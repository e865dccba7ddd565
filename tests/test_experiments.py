"""The face of the experiments: what a notebook gets from its guard, and that old names are still there."""

import pytest

from lpft_nb import experiments
from lpft_nb.experiments import Lab, RunFailed, check_metrics, find_experiment, load_runs
from lpft_nb.records import load_results


@pytest.fixture
def lab(finished_run) -> Lab:
    "The lab of a finished call."
    experiment = find_experiment("lp_ft")
    parameters = experiment.check(finished_run[0])
    runs, task = experiment.plan(parameters)
    return Lab("lp_ft", parameters, task, runs, experiment.metrics)


def test_a_lab_shows_its_own_runs_and_no_others(lab, finished_run):
    everything = load_results(finished_run[0]["output"])
    assert set(lab.metrics["run_id"]) == {run.name for run in lab.runs}
    assert len(lab.metrics) == len(everything[everything["run_id"].isin(lab.metrics["run_id"])])
    one, _ = load_runs(lab.runs[:1])
    assert set(one["run_id"]) == {lab.runs[0].name}
    assert set(lab.history["method"]) <= {"LP", "FT"} and (lab.history["metric"] == "loss").any()
    assert lab.table()["state"].tolist() == ["finished", "finished"]


def test_a_lab_is_frozen(lab):
    with pytest.raises(AttributeError):
        lab.runs = []


def test_a_lab_reports_what_it_used(lab, tmp_path, monkeypatch, capsys):
    import json

    monkeypatch.setenv("LPFT_REPORT", str(tmp_path / "report.json"))
    lab.make()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] == lab.parameters.model_dump()
    assert report["records"] == [str(run.path) for run in lab.runs]


def test_promised_metrics_are_looked_for_in_every_record(lab):
    check_metrics(lab.runs, ("accuracy", "head_norm"))
    with pytest.raises(RunFailed, match="no rows of charm"):
        check_metrics(lab.runs, ("accuracy", "charm"))


def test_the_face_has_what_it_had():
    names = (
        "ParameterError RunFailed Parameter Experiment Run parse_parameters check_parameters "
        "read_parameters load_experiment find_experiment settings_of requested_runs stages_of "
        "load_model load_data describe_task training_steps plan_table execute make_each load_runs "
        "own_kernel notebook_folder plan_runs plan_experiment run_all launch_name run_experiment check_used parameters_like differences surroundings"
    ).split()
    assert [name for name in names if not hasattr(experiments, name)] == []
