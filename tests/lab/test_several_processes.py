"""One run made by several processes, from the command line: one record, the numbers of one process, and an end for all."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from process_fixtures import worlds_of
from toy_experiment import SCRIPT as TOY
from toy_experiment import use_toy, write_toy

import warm_python
from conftest import build_tiny_model
from lpft_nb.experiments import run_experiment
from lpft_nb.lab.claims import leave_record
from lpft_nb.lab.runs import Run
from lpft_nb.records import load_arrays, read_record
from lpft_nb.store.machine import World

COSTS = ("seconds", "peak_memory_bytes", "kernel_seconds")
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
REQUESTS = {
    "lp_ft": {"methods": ["FT", "LP-FT"], "seeds": [0], "epochs": 2, "batch_size": 4},
    "tangent_kernel": {"methods": ["FT", "LP-FT"], "max_kernel_train": 8, "max_test": 4},
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory, toy_task) -> dict:
    "What all requests share: a tiny classifier without any dropout, saved."
    folder = tmp_path_factory.mktemp("dry") / "model"
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build_tiny_model(
        num_labels=2, dtype=torch.float32, head_dropout=0.0, backbone=none, pooling="cls"
    )
    model.save_pretrained(folder)
    shared = {"task": str(toy_task), "model": str(folder), "max_length": 16}
    return shared | {"max_train": None, "device": "cpu"}


def run_together(warm_server, experiment: str, request: dict) -> list[str]:
    "What each of two processes prints that make an experiment together."
    file = Path(request["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(request))
    command = [*warm_server[1], str(Path(__file__).with_name("processes_script.py"))]
    kernel = json.dumps(warm_python.kernel(*warm_server))
    processes = [
        subprocess.Popen(
            [*command, "run", experiment, "-f", str(file)],
            env=os.environ | ALONE | world | {"WARM_KERNEL": kernel},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for world in worlds_of(2)
    ]
    answers = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    return [printed for printed, _ in answers]


@pytest.fixture(scope="module", params=list(REQUESTS))
def made(request, dry, warm_server, launching_warm, tmp_path_factory) -> dict:
    "An experiment made by one process and by two."
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    asked = {who: dry | REQUESTS[name] | {"output": str(folder / who)} for who in ("one", "two")}
    with launching_warm():
        _, records = run_experiment(name, asked["one"])
    printed = run_together(warm_server, name, asked["two"])
    return {"name": name, "records": records, "printed": printed, "asked": asked["two"]}


def numbers_of(record: dict) -> dict:
    "Metrics and learning curves, without what a run costs; NaN where a measure has no value."
    rows = [row for row in record["metrics"] if row["metric"] not in COSTS]
    return {
        (row["stage"], row.get("split"), row.get("step"), row["metric"]): (
            math.nan if row["value"] is None else row["value"]
        )
        for row in rows + record["history"]
    }


def test_two_processes_agree_with_one(made):
    for path in made["records"]:
        one = read_record(path)
        two = read_record(Path(made["asked"]["output"]) / made["name"] / path.name)
        assert two["stages"][-1]["processes"] == 2 and one["stages"][-1]["processes"] == 1
        assert numbers_of(two) == pytest.approx(numbers_of(one), rel=1e-5, abs=1e-8, nan_ok=True)
        arrays = load_arrays(one, path.parents[1]), load_arrays(two, made["asked"]["output"])
        assert arrays[0] and set(arrays[0]) == set(arrays[1])
        for name, first in arrays[0].items():
            torch.testing.assert_close(arrays[1][name], first, rtol=1e-5, atol=1e-7, msg=name)


def test_one_record_a_run_one_notebook_and_one_voice(made):
    folder = Path(made["asked"]["output"]) / made["name"]
    left = sorted(path for path in folder.iterdir() if path.is_file())
    names = sorted(path.name for path in made["records"])
    assert [path.name for path in left if path.suffix == ".json"] == names
    assert [path.suffix for path in left].count(".ipynb") == 1
    assert "2 records in" in made["printed"][0] and made["printed"][1] == ""


def test_a_second_call_makes_nothing(made, warm_server):
    folder = Path(made["asked"]["output"]) / made["name"]
    before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    printed, _ = run_together(warm_server, made["name"], made["asked"])
    assert printed.count("already there") == 2
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == before


def test_only_the_first_process_writes_a_record(tmp_path, monkeypatch):
    run = Run("FT", 0, {}, shared=True, name="a", path=tmp_path / "a.json")
    monkeypatch.setattr(World, "current", lambda device: World(1, 2))
    assert leave_record(run, {}) == run.path and list(tmp_path.iterdir()) == []


# --- a process that fails ------------------------------------------------------------------------------------------

STUMBLING = """
import os
import signal

from lpft_nb.lab.claims import leave_record
from lpft_nb.records import make_record


def make(run):
    how = os.environ.get("TOY_STUMBLES") if run.world.rank == run.seed == 1 else None
    if how == "raises":
        raise MemoryError("no memory left on this card")
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    run.world.wait()
    size = float(run.world.size)
    rows = [{"stage": "LP", "split": "test", "metric": "accuracy", "value": size}]
    record = make_record(**run.identity, stages=[{"name": "LP"}], metrics=rows)
    return leave_record(run, record)
"""


def torchrun(*words: str, **environment: str) -> subprocess.CompletedProcess:
    "The command line, started twice by torchrun."
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "lpft_nb", *words],
        env=os.environ | ALONE | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def processes_with(text: str) -> list[str]:
    "Processes, but this one, with a text in their environment."
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_failing_process_ends_all_and_a_new_call_goes_on(tmp_path, monkeypatch):
    use_toy(tmp_path / "toys", monkeypatch)
    write_toy(tmp_path / "toys", script=TOY.replace("toy_make.make", "toy_make.make, shared=True"))
    (tmp_path / "toys" / "toy_make.py").write_text(STUMBLING)
    folder = tmp_path / "runs" / "toy"
    words = ["run", "toy", "-p", "seeds", "0,1", "--output", str(tmp_path / "runs")]
    messages = {"dies": "the notebook's Python died", "raises": "MemoryError: no memory left"}
    for how, message in messages.items():
        failed = torchrun(*words, TOY_STUMBLES=how)
        assert failed.returncode != 0, failed.stdout
        assert f"lpft-nb, process 1: {message}" in failed.stderr, failed.stderr
        assert len(list(folder.glob("*.json"))) == 1  # of the run before
        assert len(list(folder.glob("[!.]*.process-1.ipynb"))) == 1
        limit = time.monotonic() + 30
        while left := processes_with(str(tmp_path / "toys")):
            assert time.monotonic() < limit, f"still there: {left}"
            time.sleep(0.1)
    done = torchrun(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [read_record(path) for path in folder.glob("*.json")]
    assert [record["metrics"][0]["value"] for record in records] == [2.0, 2.0]
    assert done.stdout.count("already there") == done.stdout.count("starts") == 1
    assert "2 records in" in done.stdout and not list(folder.glob("[!.]*.process-1.ipynb"))
