"""An experiment that takes no time: its runs do what the environment and their parameters say."""

import json
import os
from pathlib import Path

MAKE = """
import json
import os
import time
from pathlib import Path

from lpft_nb.records import make_record, write_record

SEEN = ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def make(run):
    settings, folder = run.settings, Path(os.environ["TOY_FOLDER"])
    told = {name: os.environ.get(name) for name in SEEN}
    with (folder / "began.txt").open("a") as file:
        file.write(f"{os.getpid()} {run.name} {json.dumps(told)}\\n")
    value = str(settings["value"])
    while (folder / "wait").exists() or value in (folder / "waits.txt").read_text().split():
        time.sleep(0.05)
    if value in (folder / "fails.txt").read_text().split():
        raise RuntimeError("the toy is to fail\\non two lines")
    score = 1 / (1 + abs(settings["rate"] - 2)) + run.seed * 1e-3
    rows = [
        {"stage": "LP", "split": split, "metric": "accuracy", "value": score}
        for split in ("validation", "test")
    ]
    record = make_record(**run.identity, stages=[{"name": "LP"}], metrics=rows, wall_seconds=2.0)
    return write_record(record, None, run.path.parent)
"""

PARAMETERS = """value: "Each[Count]" = [1]  # of which a run has one
methods: "Each[Method]" = ["LP"]  # one run for each
seeds: "Each[Seed]" = [0]  # one run for each
rate: "OfTraining[Positive]" = 1.0  # best at two; a probe does not look at it
output: "Free[Folder]" = "runs"  # folder for records"""

SCRIPT = """import toy_make

from lpft_nb.experiments import Run, requested_runs

NAME = "toy"
METRICS = ("accuracy",)
CLAIMS = ()


def plan(parameters):
    "Runs without a task or a model."
    task = {"name": "toys", "fingerprint": "f" * 64, "sizes": {"train": 4}}
    task |= {"class_counts": {}, "source": {}, "label_names": ["a", "b"], "text_columns": ["text"]}
    model = {"id": "toy", "revision": None, "sha256": "0" * 64, "pooling": "cls", "max_length": 8}
    for method, seed, settings in requested_runs(parameters):
        settings = {"rate": parameters.rate} | settings
        yield Run(method, seed, settings, make=toy_make.make, task=task, model=model)"""

GUARD = "from lpft_nb.experiments import experiment\n\nlab = experiment(globals())"


def code(number: int, source: str, tag: str | None = None) -> dict:
    tags = [] if tag is None else [tag]
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": f"cell{number}",
        "metadata": {"tags": tags},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def write_toy(folder: Path, *, prose: str = "A toy.", script: str = SCRIPT) -> Path:
    "Write the notebook and its module."
    text = ["# Toy\n", "\n", f"> {prose}"]
    cells = [{"cell_type": "markdown", "id": "prose", "metadata": {}, "source": text}]
    cells += [code(1, PARAMETERS, "parameters"), code(2, script, "experiment")]
    cells += [code(3, GUARD), code(4, "lab.make()")]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "toy_make.py").write_text(MAKE)
    for name in ("fails.txt", "waits.txt"):  # values of which a run fails, or waits
        (folder / name).touch()
    path = folder / "toy.ipynb"
    path.write_text(json.dumps(book))
    return path


def use_toy(folder: Path, monkeypatch) -> None:
    "Make the experiment known to this process and to those that it starts."
    folder.mkdir(exist_ok=True)
    write_toy(folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("LPFT_EXPERIMENTS", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("TOY_FOLDER", str(folder))
    monkeypatch.syspath_prepend(folder)


def begun(folder: Path) -> list[str]:
    "Names of the runs that were begun, in their order."
    path = folder / "began.txt"
    return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []


def surroundings(folder: Path) -> list[dict[str, str | None]]:
    "What the runs that were begun have seen of their environment."
    lines = (folder / "began.txt").read_text().splitlines()
    return [json.loads(line.split(maxsplit=2)[2]) for line in lines]
