"""Experiment notebooks: what makes one, what is refused, the guard, and a new one dropped into a folder."""

import functools
import json
import os
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml

import warm_python
from conftest import ROOT
from lpft_nb import command_line, experiments
from lpft_nb.lab.notebooks import (
    find_experiment,
    list_experiments,
    load_experiment,
    read_parameters,
    read_script,
)
from lpft_nb.lab.parameters import ParameterError
from lpft_nb.records import load_results, read_record

pytestmark = pytest.mark.usefixtures("warm_kernels")

NOTEBOOK = ROOT / "nbs" / "experiments" / "lp_ft.ipynb"


def copied(target: Path, change=lambda cells: None) -> Path:
    "A copy of the experiment lp_ft with its code cells changed."
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    change(notebook.cells)
    nbformat.write(notebook, target)
    return target


def code_of(cells: list) -> list:
    return [cell for cell in cells if cell.cell_type == "code"]


# what makes an experiment


def test_unknown_experiment_names_the_known_ones():
    with pytest.raises(ParameterError, match="did you mean 'lp_ft'"):
        find_experiment("lpft")


def replaced(old: str, new: str):
    "A change of the cell `experiment`."

    def change(cells):
        cell = code_of(cells)[1]
        assert old in cell.source
        cell.source = cell.source.replace(old, new)

    return change


def untagged(place: int):
    return lambda cells: code_of(cells)[place].metadata.update(tags=[])


BROKEN = {
    "no tag parameters": (untagged(0), "one cell with the tag `parameters`"),
    "code before": (
        lambda cells: cells.insert(0, nbformat.v4.new_code_cell("epochs = 3")),
        "one cell with the tag `parameters`",
    ),
    "no tag experiment": (untagged(1), "one cell with the tag `experiment`"),
    "code between": (
        lambda cells: cells.insert(2, nbformat.v4.new_code_cell("epochs = 3")),
        "one cell with the tag `experiment`",
    ),
    "foreign name": (replaced('NAME = "lp_ft"', 'NAME = "other"'), "expected NAME = 'copy'"),
    "no metrics": (replaced("METRICS = ", "METRIC = "), "expected METRICS"),
    "metrics are a text": (
        replaced("METRICS = (", 'METRICS = "accuracy"; X = ('),
        "expected METRICS",
    ),
    "no claims": (replaced("CLAIMS = ", "CLAIM = "), "expected CLAIMS"),
    "a value that is computed": (replaced("CLAIMS = (", "CLAIMS = tuple("), "expected a literal"),
    "no Python": (
        replaced("CLAIMS = (", "CLAIMS = = ("),
        "cell `experiment`, line .*invalid syntax",
    ),
    "a statement that works": (
        replaced("\n\n\ndef plan", "\nprint(1)\n\n\ndef plan"),
        "functions only",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_notebook_that_lacks_something_is_refused(case, tmp_path):
    change, message = BROKEN[case]

    def named(cells):
        if case != "foreign name":
            cell = code_of(cells)[1]
            cell.source = cell.source.replace('NAME = "lp_ft"', 'NAME = "copy"')
        change(cells)

    with pytest.raises(ParameterError, match=message):
        load_experiment(copied(tmp_path / "copy.ipynb", named))


def test_listing_runs_nothing(tmp_path):
    mark = tmp_path / "ran"
    script = (
        f"from nowhere import Thing\nNAME = 'x'\ndef plan(p, t):\n    open({str(mark)!r}, 'w')\n"
    )
    literals, imports = read_script(script, "x.ipynb")
    assert literals == {"NAME": "x"} and imports == {"Thing": "nowhere:Thing"}
    assert not mark.exists()


def test_claims_are_those_of_the_book():
    known = {one["number"] for one in yaml.safe_load((ROOT / "nbs" / "claims.yml").read_text())}
    for experiment in list_experiments():
        assert set(experiment.claims) <= known and experiment.metrics


# the guard


def first_code_only(target: Path) -> Path:
    "A copy of the experiment that stops after its guard and then leaves a mark: fast, and shows whether anything ran."
    mark = f"open({str(target.with_suffix('.ran'))!r}, 'w').write(repr(parameters.model_dump()))"
    guard = (
        "from lpft_nb.lab.notebooks import read_parameters\nparameters = read_parameters(globals())"
    )

    def cut(cells):
        kept = code_of(cells)[:2]
        cells[:] = [*kept, *map(nbformat.v4.new_code_cell, (guard, mark))]

    return copied(target, cut)


@pytest.fixture
def run_papermill(warm_server, tmp_path, monkeypatch):
    "`papermill` as a process, its kernel one that starts at once."
    server, python = warm_server
    place = tmp_path / "jupyter" / "kernels" / "python3"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(warm_python.kernel(server, python)))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return functools.partial(papermill, python)


def papermill(
    python: list[str], notebook: Path, target: Path, *arguments: str
) -> subprocess.CompletedProcess:
    command = [*python, "-m", "papermill", str(notebook), str(target), "-k", "python3"]
    return subprocess.run(
        [*command, "--no-progress-bar", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=target.parent,
    )


def test_plain_papermill_runs_with_what_it_was_given(tmp_path, run_papermill):
    notebook = first_code_only(tmp_path / "guard.ipynb")
    given = {"seeds": "0,3", "learning_rate": "{FT: 5e-5}", "max_train": "None"}
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    answer = run_papermill(notebook, tmp_path / "out.ipynb", *words)
    assert answer.returncode == 0, answer.stderr
    assert "unknown parameter" not in answer.stderr
    used = eval(notebook.with_suffix(".ran").read_text())
    assert (used["seeds"], used["learning_rate"], used["max_train"]) == ([0, 3], {"FT": 5e-5}, None)


@pytest.mark.parametrize("wrong", [("sed", "3"), ("epochs", "-1")], ids=lambda pair: pair[0])
def test_plain_papermill_stops_at_the_guard(tmp_path, run_papermill, wrong):
    notebook = first_code_only(tmp_path / "guard.ipynb")
    answer = run_papermill(notebook, tmp_path / "out.ipynb", "-p", *wrong)
    assert answer.returncode != 0
    assert "ParameterError" in answer.stderr and wrong[0] in answer.stderr
    assert not notebook.with_suffix(".ran").exists()


def test_guard_notices_a_lost_tag(tmp_path, run_papermill):
    path = first_code_only(tmp_path / "guard.ipynb")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].metadata.tags = []
    nbformat.write(notebook, path)
    answer = run_papermill(path, tmp_path / "out.ipynb", "-p", "seeds", "3")
    assert answer.returncode != 0 and "lost its tag" in answer.stderr
    assert not path.with_suffix(".ran").exists()


def test_guard_reads_a_namespace_in_use():
    cell = 'epochs: "Positive" = 1  # help\ntask: "Name" = "a"  # help\n'
    history = [
        "",
        cell,
        "# Parameters\nepochs = 2\n",
        "read",
        "frame = 3",
        "x = 1",
        cell,
        "epochs = 4",
        "%matplotlib inline",
        "y = 2",
        "guard",
    ]
    namespace = {"In": history, "epochs": 4, "task": "a", "frame": 3, "x": 1, "y": 2}
    assert read_parameters(namespace).model_dump() == {"epochs": 4.0, "task": "a"}


def test_guard_without_its_cells():
    with pytest.raises(ParameterError, match="run the parameters cell first"):
        read_parameters({"In": ["", "x = 1", "guard"]})
    with pytest.raises(ParameterError, match="run the cell `experiment` first"):
        experiments.experiment({"In": ["", 'x: "Count" = 1', "guard"]})


# a new experiment is a new file and nothing else

PARAMETERS = """
task: "Name" = "docstring-topic"  # a name
model: "Name" = "minilm"  # a name
max_length: "Count" = 16  # tokens
methods: "Each[Method]" = ["FT"]  # which
seeds: "Each[Seed]" = [0]  # which
flavours: "Each[Flavour]" = ["plain"]  # of training, one run for each
epochs: "OfTraining[ByMethod[Positive]]" = 1  # of training
weight_decay: "OfTraining[Share]" = 0.1  # of AdamW
note: "Free[Text]" = "none"  # changes nothing
device: "Device" = "cpu"  # where
output: "Free[Folder]" = "runs"  # folder for records
"""
SCRIPT = """
from lpft_nb.experiments import Run, requested_runs, stages_of

NAME = "novelty"
METRICS = ("accuracy",)
CLAIMS = ("A12",)
Flavour = ("plain", "spicy")


def plan(parameters, task):
    for method, seed, settings in requested_runs(parameters):
        yield Run(method, seed, settings, stages_of(method, settings))
"""
DRAWING = """
import matplotlib.pyplot as plt

from lpft_nb.plot import use_style

use_style()
lab.make()
rows = lab.metrics.query("final and metric == 'accuracy' and split == 'test'")
plt.bar(rows["run_id"], rows["value"])
plt.show()
"""


def drop(folder: Path, script: str = SCRIPT) -> Path:
    "A new experiment notebook in a folder."
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    new = nbformat.v4.new_code_cell
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Something new\n\n> Nothing in the package knows it."),
        new(PARAMETERS, metadata={"tags": ["parameters"]}),
        new(script, metadata={"tags": ["experiment"]}),
        new("from lpft_nb.experiments import experiment\nlab = experiment(globals())"),
        new(DRAWING),
    ]
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "novelty.ipynb")
    return folder


def test_a_notebook_in_a_folder_is_listed_checked_run_recorded_and_drawn(
    small_request, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("LPFT_EXPERIMENTS", str(drop(tmp_path / "mine")))
    assert command_line.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "novelty: Nothing in the package knows it." in shown and "Each[Flavour]" in shown
    words = ["run", "novelty", "--output", str(tmp_path / "runs"), "-p", "flavours", "plain,spicy"]
    for name in ("task", "model"):
        words += ["-p", name, small_request[name]]
    assert command_line.main([*words, "-p", "weight_decay", "2"]) == 2
    assert "weight_decay='2': expected a number between 0 and 1" in capsys.readouterr().err
    assert command_line.main([*words, "-p", "flavour", "x"]) == 2
    assert "did you mean 'flavours'" in capsys.readouterr().err
    assert command_line.main([*words, "--dry-run"]) == 0
    assert "2 of 2 runs to make" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert command_line.main(words) == 0
    records = [read_record(path) for path in sorted((tmp_path / "runs" / "novelty").glob("*.json"))]
    assert {record["parameters"]["flavours"] for record in records} == {"plain", "spicy"}
    assert all(record["parameters"]["weight_decay"] == 0.1 for record in records)
    assert all("note" not in record["parameters"] for record in records)
    assert set(load_results(tmp_path / "runs")["experiment"]) == {"novelty"}
    (executed,) = (tmp_path / "runs" / "novelty").glob("*.ipynb")
    outputs = [
        output
        for cell in json.loads(executed.read_text())["cells"]
        for output in cell.get("outputs", [])
    ]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    capsys.readouterr()
    assert command_line.main([*words, "-p", "note", "again"]) == 0
    assert capsys.readouterr().out.count("already there") == 2


def test_a_promised_metric_that_no_record_holds_fails_the_run(
    small_request, tmp_path, monkeypatch, capsys
):
    script = SCRIPT.replace('("accuracy",)', '("accuracy", "charm")')
    monkeypatch.setenv("LPFT_EXPERIMENTS", str(drop(tmp_path / "mine", script)))
    request = {name: small_request[name] for name in ("task", "model")}
    with pytest.raises(experiments.RunFailed, match="no rows of charm"):
        experiments.run_experiment("novelty", request | {"output": str(tmp_path / "runs")})


def test_a_name_in_two_folders_and_a_folder_that_is_none_are_refused(tmp_path, monkeypatch):
    folders = [drop(tmp_path / name) for name in ("one", "two")]
    monkeypatch.setenv("LPFT_EXPERIMENTS", os.pathsep.join(map(str, folders)))
    with pytest.raises(ParameterError, match="in two folders"):
        list_experiments()
    monkeypatch.setenv("LPFT_EXPERIMENTS", str(tmp_path / "nowhere"))
    with pytest.raises(ParameterError, match="expected a folder"):
        list_experiments()
