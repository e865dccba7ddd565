"""The command line as a user calls it: a process, its output, its exit code."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from lpft_nb import __version__, command_line
from lpft_nb.records import read_record


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A working folder with a toy task and a tiny random model; the cache lies there too."
    import torch
    from transformers import AutoModel

    from conftest import WORDS, build_backbone_config, build_tokenizer

    folder = tmp_path_factory.mktemp("command")
    torch.manual_seed(0)
    AutoModel.from_config(build_backbone_config("bert")).save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    (folder / "toy").mkdir()
    rows = [
        {"text": f"{word} {other}", "label": number % 2}
        for number, (word, other) in enumerate(zip(WORDS[:24], WORDS[24:48], strict=True))
    ]
    for split, part in {"train": rows[:12], "validation": rows[12:18], "test": rows[18:]}.items():
        (folder / "toy" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def environment(place: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LPFT_CACHE": str(place / "cache"),
        "LPFT_RESULTS": "",
    }


def call(place: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lpft_nb", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(place), cwd=place
    )


def request(**changes: str) -> list[str]:
    values = {
        "task": "toy",
        "model": "./tiny",
        "methods": "FT",
        "seeds": "0",
        "max_train": "None",
        "max_length": "16",
        "device": "cpu",
    } | changes
    return [word for name, value in values.items() for word in ("-p", name, value)]


@pytest.fixture(scope="module")
def record(place) -> Path:
    "The record of one run made by `lpft-nb run`."
    answer = call(place, "run", "lp_ft", *request())
    assert answer.returncode == 0, answer.stderr
    assert "FT: epoch 1/1" in answer.stdout and "1 records in runs/lp_ft" in answer.stdout
    (path,) = (place / "runs" / "lp_ft").glob("*.json")
    assert len(list((place / "runs" / "lp_ft").glob("*.ipynb"))) == 1
    return path


def test_help_and_version(place):
    answer = call(place, "--help")
    assert (
        answer.returncode == 0
        and "lpft-nb run lp_ft" in answer.stdout
        and "exit codes" in answer.stdout
    )
    with pytest.raises(SystemExit) as ended:
        command_line.main(["--version"])
    assert ended.value.code == 0 and __version__


@pytest.mark.parametrize("command", ["list", "run", "results", "cache"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([command, "--help"])
    assert ended.value.code == 0
    assert f"lpft-nb {command}" in capsys.readouterr().out


def test_list_names_experiments_parameters_tasks_and_models(capsys):
    assert command_line.main(["list"]) == 0
    text = capsys.readouterr().out
    for word in ("lp_ft", "learning_rate", "docstring-topic", "docstring-kind", "minilm"):
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
        command_line.main(words)
    assert ended.value.code == 2
    assert "usage: lpft-nb" in capsys.readouterr().err


WRONG = {
    "no experiment": (["run"], "name an experiment"),
    "unknown experiment": (["run", "lp_tf"], "lp_ft"),
    "misspelt": (["run", "lp_ft", "-p", "sed", "3"], "did you mean seeds"),
    "ill-typed": (["run", "lp_ft", "-p", "seeds", "x"], "expected list[int]"),
    "out of range": (["run", "lp_ft", "-p", "epochs", "-1"], "a positive number"),
    "unknown method": (["run", "lp_ft", "-p", "methods", "LPFT"], "did you mean LP-FT"),
    "twice": (["run", "lp_ft", "-p", "seeds", "1", "-p", "seeds", "2"], "given twice: seeds"),
    "output twice": (["run", "lp_ft", "-p", "output", "a", "--output", "b"], "given twice: output"),
    "no such record": (["run", "--like", "nothing.json"], "--like nothing.json"),
    "no such folder": (["results", "nothing"], "nothing"),
    "unknown task": (
        ["run", "lp_ft", "--dry-run", "-p", "task", "docstring-topics"],
        "docstring-topic",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_parameters_exit_2_with_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = WRONG[case]
    assert command_line.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("lpft-nb: ") and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_wrong_parameters_as_a_process(place):
    answer = call(place, "run", "lp_ft", "-p", "sed", "3")
    assert (
        (answer.returncode, answer.stdout) == (2, "")
        and "did you mean seeds" in answer.stderr
        and "Traceback" not in answer.stderr
    )


def test_task_found_missing_by_the_notebook_exits_2(place):
    answer = call(place, "run", "lp_ft", *request(task="no-such-task"), "--output", "elsewhere")
    assert (
        answer.returncode == 2
        and "no-such-task" in answer.stderr
        and "Traceback" not in answer.stderr
    )
    assert not list((place / "elsewhere").rglob("*.json"))


def test_failing_run_exits_1(place):
    answer = call(
        place, "run", "lp_ft", *request(learning_rate="1e30", epochs="30"), "--output", "failing"
    )
    assert (
        answer.returncode == 1
        and "diverg" in answer.stderr.lower()
        and "Traceback" not in answer.stderr
    )
    (path,) = (place / "failing" / "lp_ft").glob("*.json")
    assert (
        read_record(path)["status"] == "failed" and "diverg" in read_record(path)["error"].lower()
    )


def test_dry_run_plans_and_writes_nothing(place, record):
    before = sorted(place.rglob("*.ipynb"))
    answer = call(
        place, "run", "lp_ft", *request(methods="LP,FT", seeds="0,1", epochs="1"), "--dry-run"
    )
    assert answer.returncode == 0, answer.stderr
    assert "3 of 4 runs to make, 1 training steps" in answer.stdout
    assert record.stem in answer.stdout and answer.stdout.count("finished") == 1
    assert sorted(place.rglob("*.ipynb")) == before


def test_second_run_makes_nothing_again(place, record):
    before = record.stat().st_mtime_ns
    answer = call(place, "run", "lp_ft", *request())
    assert answer.returncode == 0 and "already there" in answer.stdout
    assert record.stat().st_mtime_ns == before


def test_like_repeats_without_differences(place, record):
    paths = ["-p", "task", "toy", "-p", "model", "./tiny"]
    answer = call(place, "run", "--like", str(record), *paths)
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert " 0 differ" in answer.stdout and "largest difference is 0" in answer.stdout
    answer = call(place, "run", "--like", str(record), *paths, "-p", "learning_rate", "1e-3")
    assert answer.returncode == 1 and " 0 differ" not in answer.stdout
    answer = call(place, "run", "--like", str(record), *paths, "--output", "runs")
    assert answer.returncode == 2 and "holds this run already" in answer.stderr


def test_results(place, record, capsys, monkeypatch):
    (record.parent / "broken.json").write_text("{")
    answer = call(place, "results", "runs", "--csv")
    assert answer.returncode == 0 and "broken.json" in answer.stderr
    rows = list(csv.DictReader(io.StringIO(answer.stdout)))
    assert {row["run_id"] for row in rows} == {record.stem}
    accuracy = [
        float(row["value"])
        for row in rows
        if (row["stage"], row["split"], row["metric"]) == ("FT", "test", "accuracy")
    ]
    (recorded,) = [
        row["value"]
        for row in read_record(record)["metrics"]
        if (row["stage"], row["split"], row["metric"]) == ("FT", "test", "accuracy")
    ]
    assert accuracy == [recorded]
    (record.parent / "broken.json").unlink()
    monkeypatch.chdir(place)
    assert command_line.main(["results", "runs"]) == 0
    assert "FT" in capsys.readouterr().out
    assert command_line.main(["results", "--publish"]) == 0
    assert (place / "results" / "lp_ft" / record.name).exists()
    assert command_line.main(["results"]) == 0


def test_cache_shows_and_clears(place, record, monkeypatch, capsys):
    monkeypatch.setenv("LPFT_CACHE", str(place / "cache"))
    assert command_line.main(["cache"]) == 0
    assert "features" in capsys.readouterr().out
    assert command_line.main(["cache", "--clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert not list((place / "cache").rglob("*.safetensors"))


def test_interrupted_run_exits_130_and_goes_on(place):
    command = [
        sys.executable,
        "-m",
        "lpft_nb",
        "run",
        "lp_ft",
        *request(methods="LP,FT", epochs="3000"),
        "--output",
        "stopped",
    ]
    heard = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a test run in the background would pass on that it ignores the signal
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(place),
        cwd=place,
        preexec_fn=heard,
    ) as process:
        for line in process.stdout:
            if line.startswith("FT: epoch 1/"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in error, error
    (finished,) = (place / "stopped" / "lp_ft").glob("*.json")
    assert read_record(finished)["method"] == "LP"


def test_parameters_from_a_file(place, record):
    (place / "small.yaml").write_text(
        "task: toy\nmodel: ./tiny\nmethods: [LP]\nseeds: [0]\nmax_length: 16\nmax_train: null\n"
    )
    answer = call(
        place,
        "run",
        "lp_ft",
        "-f",
        "small.yaml",
        "-p",
        "methods",
        "FT",
        "-p",
        "device",
        "cpu",
        "--dry-run",
    )
    assert (
        answer.returncode == 0
        and record.stem in answer.stdout
        and "0 of 1 runs to make" in answer.stdout
    ), answer.stdout + answer.stderr
    for text, message in (("sed: 3", "sed"), ("- a list", "name: value"), (None, "cannot read")):
        path = place / "wrong.yaml"
        path.unlink(missing_ok=True)
        if text:
            path.write_text(text)
        answer = call(place, "run", "lp_ft", "-f", "wrong.yaml")
        assert (
            answer.returncode == 2 and message in answer.stderr and "Traceback" not in answer.stderr
        )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_sweep_files_name_known_parameters(path):
    from lpft_nb.experiments import check_parameters, find_experiment

    name = next(
        (name for name in ("head_scale", "tangent_kernel") if path.stem.startswith(name)), "lp_ft"
    )
    parameters = check_parameters(
        find_experiment(name).parameters, command_line.parameters_of_file(str(path))
    )
    assert len(parameters["methods"]) == {"lp_ft": 5, "head_scale": 2, "tangent_kernel": 4}[name]
    assert name == "tangent_kernel" or len(parameters["seeds"]) == 5
    assert len(parameters.get("head_scale", [])) == (8 if name == "head_scale" else 0)
