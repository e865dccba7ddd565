"""The command line: what each command prints, changes and returns; as a process only where the process is the point."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from conftest import ROOT
from lpft_nb import __version__
from lpft_nb.command_line import main, request_of_file
from lpft_nb.experiments import (
    ParameterError,
    find_experiment,
    list_experiments,
    requested_runs,
)
from lpft_nb.records import make_record, read_record, write_record
from lpft_nb.store.cache import cached

pytestmark = pytest.mark.usefixtures("warm_kernels")


def words(request: dict, **changes) -> list[str]:
    "A request as the words of a command line."
    values = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in (request | changes).items()
        if name != "output"
    }
    return [word for name, value in values.items() for word in ("-p", name, value)]


@pytest.fixture
def runs(finished_run, tmp_path) -> Path:
    "A copy of the folder that a finished call has left."
    return Path(shutil.copytree(finished_run[0]["output"], tmp_path / "runs"))


@pytest.fixture
def record(finished_run, runs) -> Path:
    "The record of FT in that copy."
    (path,) = (path for path in finished_run[2] if read_record(path)["method"] == "FT")
    return runs / "lp_ft" / path.name


# words


@pytest.mark.parametrize("command", ["list", "run", "results", "cache"])
def test_every_command_has_help(command, capsys):
    if command == "run":  # which adds the parameters of an experiment
        assert main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
    assert f"lpft-nb {command}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"lpft-nb {__version__}\n"


def test_list_names_experiments_parameters_tasks_and_models(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for experiment in list_experiments():
        assert f"{experiment.name}: {experiment.summary}" in text
    for word in ("learning_rate", "docstring-topic", "docstring-kind", "minilm"):
        assert word in text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["runn"],
        ["run", "lp_ft", "-p", "seeds"],
        ["cache", "--clearing"],
        ["run", "lp_ft", "--tolerance", "x"],
    ],
)
def test_wrong_usage_exits_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: lpft-nb" in capsys.readouterr().err


WRONG = {
    "no experiment": (["run"], "name an experiment"),
    "unknown experiment": (["run", "lp_tf"], "did you mean 'lp_ft'"),
    "misspelt": (["run", "lp_ft", "-p", "sed", "3"], "did you mean 'seeds'"),
    "ill-typed": (["run", "lp_ft", "-p", "seeds", "x"], "expected list[int]"),
    "out of range": (["run", "lp_ft", "-p", "epochs", "-1"], "a positive number"),
    "unknown method": (["run", "lp_ft", "-p", "methods", "LPFT"], "did you mean 'LP-FT'"),
    "twice": (["run", "lp_ft", "-p", "seeds", "1", "-p", "seeds", "2"], "given twice: seeds"),
    "output twice": (["run", "lp_ft", "-p", "output", "a", "--output", "b"], "given twice: output"),
    "no such record": (["run", "--like", "nothing.json"], "--like nothing.json"),
    "a file beside a record": (
        ["run", "--like", "nothing.json", "-f", "a.yaml"],
        "not those of -f",
    ),
    "a negative tolerance": (["run", "--like", "nothing.json", "--tolerance", "-1"], "at least 0"),
    "no tolerance": (["run", "--like", "nothing.json", "--tolerance", "nan"], "at least 0"),
    "no such file": (["run", "lp_ft", "-f", "nothing.yaml"], "cannot read"),
    "no such folder": (["results", "nothing"], "nothing"),
    "unknown task": (
        ["run", "lp_ft", "--dry-run", "-p", "task", "docstring-topics"],
        "docstring-topic",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parameters_exit_2_with_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, message = WRONG[case]
    assert main(given) == 2
    answer = capsys.readouterr()
    assert message in answer.err and answer.err.startswith("lpft-nb: ") and answer.out == ""
    assert "Traceback" not in answer.err and list(tmp_path.iterdir()) == []


# plans


def test_dry_run_plans_and_writes_nothing(small_request, runs, record, capsys):
    before = sorted(runs.rglob("*"))
    asked = words(small_request, methods=["LP", "FT"], seeds=[0, 1])
    assert main(["run", "lp_ft", *asked, "--output", str(runs), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 4 runs to make, 1 training steps" in shown
    assert record.stem in shown and shown.count("finished") == 2
    assert sorted(runs.rglob("*")) == before


def test_parameters_from_a_file(small_request, runs, record, tmp_path, capsys):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(small_request | {"methods": ["LP"], "output": str(runs)}))
    assert main(["run", "lp_ft", "-f", str(file), "-p", "methods", "FT", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert record.stem in shown and "0 of 1 runs to make" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [("sed: 3", "did you mean 'seeds'"), ("- a list", "name: value"), ("a: [", "cannot read")],
)
def test_a_file_that_is_none_exits_2(text, message, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert main(["run", "lp_ft", "-f", str(file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_sweep_file_holds_a_right_request(path):
    name = next(
        (name for name in ("head_scale", "tangent_kernel", "feature_choice") if name in path.stem),
        "lp_ft",
    )
    if "tune" in yaml.safe_load(path.read_text()):
        with pytest.raises(ParameterError, match="lpft-nb sweep"):
            request_of_file(str(path), None)
        return
    named, request = request_of_file(str(path), None)
    assert named == name
    parameters = find_experiment(name).check(request)
    each = {"lp_ft": 5 * 5, "head_scale": 2 * 5 * 8, "tangent_kernel": 4, "feature_choice": 5}
    assert len(requested_runs(parameters)) == each[name]


# runs


def test_second_call_makes_nothing_again(small_request, runs, record, capsys):
    before = record.stat().st_mtime_ns
    assert main(["run", "lp_ft", *words(small_request), "--output", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("already there") == 2 and f"2 records in {runs / 'lp_ft'}" in shown
    assert record.stat().st_mtime_ns == before


def test_like_repeats_without_differences(small_request, record, capsys):
    like = ["run", "--like", str(record)]
    like += words({name: small_request[name] for name in ("task", "model")})
    assert main(like) == 0
    shown = capsys.readouterr().out
    assert "FT: epoch 1/1" in shown
    assert " 0 differ" in shown and "largest difference is 0" in shown
    assert main([*like, "-p", "learning_rate", "1e-3"]) == 1
    assert " 0 differ" not in capsys.readouterr().out


def test_like_refuses_a_folder_with_the_run_and_another_experiment(record, runs, capsys):
    assert main(["run", "--like", str(record), "--output", str(runs)]) == 2
    assert "holds this run already" in capsys.readouterr().err
    assert main(["run", "head_scale", "--like", str(record)]) == 2
    assert "is a record of lp_ft, not of head_scale" in capsys.readouterr().err


def test_failing_run_exits_1_and_leaves_its_reason(small_request, tmp_path, capsys):
    asked = words(small_request, methods="FT", learning_rate="1e30", epochs=30)
    assert main(["run", "lp_ft", *asked, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "diverg" in error.lower() and "Traceback" not in error.splitlines()[-1]
    (path,) = (tmp_path / "lp_ft").glob("*.json")
    failed = read_record(path)
    assert failed["status"] == "failed" and "diverg" in failed["error"].lower()


def test_task_found_missing_by_the_notebook_exits_2(small_request, tmp_path, capsys):
    asked = words(small_request, task="no-such-task")
    assert main(["run", "lp_ft", *asked, "--output", str(tmp_path)]) == 2
    assert "no-such-task" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.json"))


# results


def test_results_as_csv_are_cells_of_plain_numbers(runs, record, capsys, caplog):
    (record.parent / "broken.json").write_text("{")
    good = read_record(record)
    facts = {name: good[name] for name in ("experiment", "method", "task", "model", "parameters", "stages")}  # fmt: skip
    shifted = [row | {"value": row["value"] + 0.5} for row in good["metrics"]]
    write_record(make_record(**facts, seed=77, metrics=shifted), None, record.parent)
    assert main(["results", str(runs), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert "broken.json" in caplog.text
    names = ("method", "stage", "split", "metric")
    shown = {tuple(row[name] for name in names): row for row in rows}
    assert len(shown) == len(rows)
    for row in good["metrics"]:
        cell = shown[(good["method"], *(row[name] for name in names[1:]))]
        mean, low, high = (float(cell[name]) for name in ("mean", "low", "high"))
        assert mean == pytest.approx(row["value"] + 0.25) and cell["n"] == "2"
        assert high - mean == pytest.approx(mean - low) == pytest.approx(12.706204736432095 * 0.25)


def test_results_gather_every_value_of_every_run(runs, record, capsys):
    assert main(["results", str(runs)]) == 0
    index = runs / "index.parquet"
    assert f"every value of every run: {index}" in capsys.readouterr().out
    gathered = pd.read_parquet(index)
    of_one = gathered[gathered["run_id"] == record.stem]
    assert of_one["value"].tolist() == [row["value"] for row in read_record(record)["metrics"]]


@pytest.mark.parametrize("asked", [[], ["--csv"]])
def test_a_folder_that_cannot_be_written_is_shown_all_the_same(asked, runs, record, capsys, caplog):
    (runs / "index.parquet").mkdir()  # in the way, also of a user who may write everywhere
    assert main(["results", str(runs), *asked]) == 0
    assert "accuracy" in capsys.readouterr().out
    said = [entry.message for entry in caplog.records if "index.parquet" in entry.message]
    assert said == [f"no index.parquet was written: {runs}: Is a directory"]
    assert not list(runs.glob(".*.tmp"))


def test_results_are_published_and_shown(runs, record, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LPFT_RESULTS", raising=False)
    assert main(["results", "--publish"]) == 0
    assert (tmp_path / "results" / "lp_ft" / record.name).exists()
    assert main(["results"]) == 0
    assert "FT" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["results", "empty"]) == 0
    assert "no finished runs" in capsys.readouterr().out


def test_publishing_exits_1_where_one_record_is_refused(runs, record, tmp_path, capsys):
    target = ["--publish", "--target", str(tmp_path / "published")]
    good = read_record(record)
    facts = {name: good[name] for name in ("experiment", "method", "task", "model", "parameters")}
    failed = make_record(**facts, seed=7, status="failed", error="made to fail")
    path = write_record(failed, None, record.parent)
    assert main(["results", str(runs), *target]) == 1
    shown = capsys.readouterr().out
    assert shown.count("refused") == 1 and "the run failed" in shown
    published = {path.name for path in (tmp_path / "published").rglob("*.json")}
    assert record.name in published and path.name not in published
    path.unlink()
    assert main(["results", str(runs), *target]) == 0
    assert "refused" not in capsys.readouterr().out


def test_runs_with_different_settings_are_not_averaged(runs, record, capsys):
    """One line a configuration, with what differs as a column; failures are listed."""
    good = read_record(record)
    facts = {name: good[name] for name in ("experiment", "method", "task", "model", "metrics")}
    longer = good["parameters"] | {"epochs": 7.0}
    for seed in (0, 1):
        other = make_record(**facts, seed=seed, parameters=longer, stages=good["stages"])
        write_record(other, None, record.parent)
    failed = make_record(
        **facts | {"metrics": []}, seed=9, parameters=longer, status="failed", error="no disk left"
    )
    write_record(failed, None, record.parent)
    assert main(["results", str(runs)]) == 0
    shown = capsys.readouterr().out
    tests = [line.split() for line in shown.splitlines() if " FT " in line and " test " in line]
    assert "epochs" in shown.splitlines()[1] and sorted(line[-1] for line in tests) == ["1", "2"]
    assert ["(n = 1)" in " ".join(line) for line in sorted(tests, key=lambda line: line[-1])] == [True, False]  # fmt: skip
    assert f"failed: {failed['run_id']}: no disk left" in shown


def test_results_looks_where_the_runs_are(runs, record, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["results"]) == 0
    assert capsys.readouterr().out.startswith("runs\n")


# cache


def test_cache_shows_and_clears(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))
    cached("features", {"of": "this test"}, lambda: {"x": torch.zeros(3)})
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "cache") in shown and "features" in shown and "1 entries" in shown
    assert main(["cache", "--clear"]) == 0
    assert "removed 1 entries" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# processes


def call(python: list[str], folder: Path, *given: str) -> subprocess.CompletedProcess:
    "`python -m lpft_nb …` of this tree."
    return subprocess.run(
        [*python, "-m", "lpft_nb", *given],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
    )


def test_help_as_a_process(tmp_path):
    answer = call([sys.executable], tmp_path, "--help")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "lpft-nb run lp_ft" in answer.stdout and "exit codes" in answer.stdout


@pytest.mark.parametrize("given", [["--help"], ["-h", "--dry-run"]])
def test_help_of_an_experiment_lists_its_parameters(given, capsys):
    assert main(["run", "lp_ft", *given]) == 0
    shown = capsys.readouterr().out
    assert "usage: lpft-nb run" in shown and "exit codes" in shown
    for name, parameter in find_experiment("lp_ft").parameters.items():
        assert f"    {name} " in shown and parameter.help in shown


# failures that can be expected: one line, and the way to see more

EXPECTED = {
    "a wrong data root": ({"LPFT_DATA": "/no/such"}, ["list"], "LPFT_DATA names"),
    "a wrong limit": ({"LPFT_CACHE_LIMIT": "plenty"}, ["cache"], "LPFT_CACHE_LIMIT='plenty'"),
    "an empty model": ({}, ["run", "lp_ft", "--dry-run", "-p", "model", "taken"], "model="),
    "a file for a folder": ({}, ["run", "lp_ft", "--output", "file"], "no folder can be made"),
    "a file in the way": ({}, ["results", "--publish", "--target", "file/x"], "Not a directory"),
    "no such column": (
        {},
        ["run", "lp_ft", "-p", "label_column", "x", "-p", "task", "own.csv"],
        "label_column=",
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_an_expected_failure_is_one_line_and_debug_shows_more(
    case, runs, record, capsys, tmp_path, monkeypatch
):
    variables, given, message = EXPECTED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "own.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "taken").mkdir()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(given) == 2
    answer = capsys.readouterr()
    assert message in answer.err and answer.err.count("\n") == 1
    with pytest.raises((ValueError, OSError)):
        main([*given, "--debug"])


def test_a_reader_that_stops_early_is_no_error(runs, record, python):
    command = [*python, "-m", "lpft_nb", "results", str(runs), "--csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""


def test_wrong_parameters_as_a_process(tmp_path, python):
    answer = call(python, tmp_path, "run", "lp_ft", "-p", "sed", "3")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "did you mean 'seeds'" in answer.stderr and "Traceback" not in answer.stderr


def test_interrupted_run_exits_130_and_leaves_what_was_finished(small_request, tmp_path):
    def heard():  # a test run in the background would pass on that it ignores the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    asked = words(small_request, epochs=3000)
    with subprocess.Popen(
        [sys.executable, "-m", "lpft_nb", "run", "lp_ft", *asked, "--output", "stopped"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        preexec_fn=heard,
    ) as process:
        for line in process.stdout:
            if line.startswith("FT: epoch 1/"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in error, error
    (finished,) = (tmp_path / "stopped" / "lp_ft").glob("*.json")
    assert read_record(finished)["method"] == "LP"
