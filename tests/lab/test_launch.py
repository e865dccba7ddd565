"""The launcher: nothing starts with wrong parameters, what ran is what was asked for, records are compared."""

import json
import os
import sys
from pathlib import Path

import papermill
import pytest
from test_parameters import WRONG

from lpft_nb.lab import launch
from lpft_nb.lab.launch import RunFailed, check_used, differences, run_experiment, surroundings
from lpft_nb.lab.notebooks import find_experiment
from lpft_nb.lab.parameters import ParameterError
from lpft_nb.records import load_arrays, read_record

pytestmark = pytest.mark.usefixtures("warm_kernels")


@pytest.mark.parametrize(("requested", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_launcher_refuses_before_a_kernel_starts(requested, message, monkeypatch):
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *a, **k: pytest.fail("papermill was started")
    )
    with pytest.raises(ParameterError, match=message):
        run_experiment("lp_ft", requested)


def test_kernel_is_this_python_with_its_share_of_the_threads(tmp_path, monkeypatch):
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LPFT_THREADS", "3")
    from jupyter_client.kernelspec import KernelSpecManager

    with launch.own_kernel(tmp_path / "own", tmp_path / "report"):
        own = KernelSpecManager().get_kernel_spec("python3")
        assert own.argv[0] == sys.executable and own.env["OMP_NUM_THREADS"] == "3"
        assert own.env["LPFT_REPORT"] == str(tmp_path / "report")
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == "/bin/false"
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "foreign")


# the whole notebook


def test_run_leaves_valid_records(finished_run):
    request, executed, records = finished_run
    assert executed.exists() and executed.parent == Path(request["output"]) / "lp_ft"
    read = [read_record(path) for path in records]
    assert [(record["method"], record["seed"], record["status"]) for record in read] == [
        ("LP", 0, "finished"),
        ("FT", 0, "finished"),
    ]
    for record in read:
        assert {"test", "validation"} <= {row["split"] for row in record["metrics"]}
        arrays = load_arrays(record, request["output"])
        assert arrays[f"logits/{record['stages'][-1]['name']}/test"].shape == (6, 2)
        assert not any("train" in name for name in arrays)
        text = json.dumps(record)
        assert request["task"] not in text and request["model"] not in text
    assert "epochs" not in read[0]["parameters"] and read[1]["parameters"]["epochs"] == 1
    assert not (Path(request["output"]) / "checkpoints" / records[0].stem).exists()


def test_executed_notebook_has_figures_and_no_error(finished_run):
    cells = [
        cell
        for cell in json.loads(finished_run[1].read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    figures = [
        cell
        for cell in cells
        if any("image/svg+xml" in output.get("data", {}) for output in cell["outputs"])
    ]
    assert len(figures) == 4
    for cell in figures:
        shown = cell["metadata"]["mystnb"]
        assert shown["figure"]["caption"] and shown["image"]["alt"]


# afterwards


def test_what_ran_is_compared_with_the_request(finished_run):
    request, _, records = finished_run
    experiment, paths = find_experiment("lp_ft"), [str(path) for path in records]
    wanted = experiment.check(request)
    other = experiment.check(request | {"epochs": 2})
    check_used(wanted, wanted.model_dump(), paths)
    for asked, used, files, message in (
        (wanted, other, paths, "epochs: asked for 1.0, used 2.0"),
        (wanted, wanted, paths[:1], "FT, seed 0"),
        (other, other, paths, "FT, seed 0"),
    ):
        with pytest.raises(RunFailed, match=message):
            check_used(asked, used.model_dump(), files)
    with pytest.raises(RunFailed, match="novelty: asked for None, used 3"):
        check_used(wanted, wanted.model_dump() | {"novelty": 3}, paths)


def test_nothing_is_planned_or_loaded_to_compare(finished_run, monkeypatch):
    from lpft_nb import tasks
    from lpft_nb.classifier import Classifier
    from lpft_nb.lab import notebooks

    request, _, records = finished_run
    for where, name in (
        (tasks, "load_task"),
        (Classifier, "from_pretrained"),
        (notebooks, "planned"),
    ):
        monkeypatch.setattr(where, name, lambda *a, **k: pytest.fail("loaded a second time"))
    wanted = find_experiment("lp_ft").check(request)
    check_used(wanted, wanted.model_dump(), [str(path) for path in records])


def test_differences_are_found(finished_run):
    record = read_record(finished_run[2][1])
    for change in (
        lambda rows: rows[0].update(value=rows[0]["value"] + 1),
        lambda rows: rows.pop(0),
        lambda rows: rows.append({**rows[0], "stage": "new"}),
    ):
        other = json.loads(json.dumps(record))
        change(other["metrics"])
        assert (~differences(record, other)["equal"]).sum() == 1
    assert surroundings(record, record) == []
    other = {**record, "versions": {**record["versions"], "torch": "0.1"}}
    assert surroundings(record, other) == [f"torch: {record['versions']['torch']} then, 0.1 now"]


def test_a_metric_newer_than_the_record_is_no_difference_and_a_lost_one_is(finished_run):
    record = read_record(finished_run[2][1])
    older = json.loads(json.dumps(record))
    older["metrics"] = [row for row in older["metrics"] if row["metric"] != "nll"]
    table = differences(older, record, tolerance=0)
    assert table["equal"].all() and "nll" not in set(table["metric"]) and len(table) > 20
    lost = differences(record, older)
    assert set(lost[~lost["equal"]]["metric"]) == {"nll"}
