"""Sweeps by Snakemake: failures, kills, damage and two at once end with one good record a run, and nothing is made twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from repository import ROOT
from toy_experiment import SCRIPT, begun, use_toy, write_toy

from lpft_nb.command_line import main
from lpft_nb.lab.parameters import ParameterError
from lpft_nb.lab.sweep import Scheduling, check_scheduling, only_sweep, scheduler_command
from lpft_nb.records import read_record

pytestmark = pytest.mark.xdist_group("sweep")  # each takes both cores


@pytest.fixture
def toys(tmp_path, monkeypatch):
    use_toy(tmp_path / "toys", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toys"


def write(tmp_path, **said):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"experiment": "toy"} | said))
    return path


def start(tmp_path, *options):
    "A sweep in a process of its own."
    command = [sys.executable, "-m", "lpft_nb", "sweep", "a.yaml", "--jobs", "2", *options]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # who runs the tests in the background of a script has Ctrl-C ignored, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def until(condition, seconds=90.0):
    "Wait for something to be so."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def records(tmp_path):
    return sorted((tmp_path / "runs" / "toy").glob("*.json"))


FAULTS = yaml.safe_load((ROOT / "nbs" / "sweep_faults.yml").read_text())


def all_there(tmp_path, what, *, hit):
    "Every run of the sweep has one good record in the end; the page tells the same numbers."
    (told,) = [one for one in FAULTS if one["what"] == what]
    statuses = [read_record(path)["status"] for path in records(tmp_path)]
    assert statuses == ["finished"] * told["runs"] and hit == told["hit"]


def children_of(process):
    "Processes that a process has started, and theirs."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found += [int(path.parent.name), *children_of(int(path.parent.name))]
    return found


def command_of(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def has_ended(process):
    "Whether a process has let go of its files: it is gone, or waits to be collected and its threads are gone."
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    state, threads = fields[0], int(fields[17])
    return state == "Z" and threads == 1


# --- one process ---------------------------------------------------------------------------------------------------


def test_one_failing_run_stops_no_other_and_only_it_is_made_again(toys, tmp_path, capsys):
    write(tmp_path, value=[1, 2])
    (toys / "fails.txt").write_text("2")
    assert main(["sweep", "a.yaml", "--jobs", "2"]) == 1
    shown = capsys.readouterr().out
    assert "1 made, 0 there before, 1 failed" in shown and len(records(tmp_path)) == 1
    assert "RuntimeError: the toy is to fail" in shown
    notebook = next(line.split()[-1] for line in shown.splitlines() if "notebook:" in line)
    assert "the toy is to fail" in Path(notebook).read_text()
    (toys / "fails.txt").write_text("")
    assert main(["sweep", "a.yaml"]) == 0
    assert "1 made, 1 there before, 0 failed" in capsys.readouterr().out
    assert len(begun(toys)) == 3
    all_there(tmp_path, "one run fails", hit=1)
    assert main(["sweep", "a.yaml"]) == 0
    assert "0 made, 2 there before, 0 failed" in capsys.readouterr().out
    assert len(begun(toys)) == 3
    check_triggers(toys, tmp_path, capsys)


def check_triggers(toys, tmp_path, capsys):
    "Prose makes nothing again; code does; a failure of the new code leaves the old records; damage is made good."
    before = {path.name: path.read_bytes() for path in records(tmp_path)}
    write_toy(toys, prose="Other words.")
    assert main(["sweep", "a.yaml", "--dry-run"]) == 0
    assert "2 done, 0 to make" in capsys.readouterr().out
    write_toy(toys, script=SCRIPT + "\n\n\nNEW = 1")
    (toys / "fails.txt").write_text("1 2")
    assert main(["sweep", "a.yaml", "--jobs", "2"]) == 1
    assert "0 made, 0 there before, 2 failed" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in records(tmp_path)} == before
    (toys / "fails.txt").write_text("")
    path = records(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-40])
    assert main(["sweep", "a.yaml", "--missing-only"]) == 0
    assert "1 made, 1 there before, 0 failed" in capsys.readouterr().out
    all_there(tmp_path, "a record is cut or changed", hit=1)


def test_tries_come_first_and_the_best_is_evaluated(toys, tmp_path, capsys):
    tune = {"values": {"rate": [1.0, 2.0]}, "seeds": [7]}
    write(tmp_path, methods=["FT"], seeds=[0], tune=tune)
    assert main(["sweep", "a.yaml", "--jobs", "2"]) == 0
    assert "3 made" in capsys.readouterr().out
    (record,) = map(read_record, records(tmp_path))
    assert record["parameters"]["rate"] == 2.0 and record["seed"] == 0
    tries = map(read_record, (tmp_path / "runs" / "tries" / "toy").glob("*.json"))
    assert sorted(one["parameters"]["rate"] for one in tries) == [1.0, 2.0]
    assert main(["results", "runs"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("toys") == 2 and shown.err == ""


# --- several processes ---------------------------------------------------------------------------------------------


def test_a_second_sweep_is_refused_as_long_as_the_first_or_its_scheduler_lives(
    toys, tmp_path, capsys
):
    write(tmp_path, value=[1, 2])
    (toys / "wait").touch()
    first = start(tmp_path)
    until(lambda: len(begun(toys)) == 2)
    assert main(["sweep", "a.yaml"]) == 2
    assert f"process {first.pid} on" in capsys.readouterr().err
    first.kill()
    first.wait()
    assert main(["sweep", "a.yaml"]) == 2
    said = capsys.readouterr().err
    scheduler = int(said.partition("process ")[2].split()[0])
    assert scheduler != first.pid and "snakemake" in command_of(scheduler)
    (toys / "wait").unlink()
    until(lambda: len(records(tmp_path)) == 2 and has_ended(scheduler))
    assert main(["sweep", "a.yaml"]) == 0
    assert "0 made, 2 there before" in capsys.readouterr().out and len(begun(toys)) == 2
    all_there(tmp_path, "the sweep itself is killed", hit=2)


def test_a_killed_run_and_a_killed_scheduler_cost_what_was_at_work(toys, tmp_path, capsys):
    write(tmp_path, value=[1, 2])
    (toys / "wait").touch()
    first = start(tmp_path)
    until(lambda: len(begun(toys)) == 2)
    workers = [
        one for one in children_of(first.pid) if "-m lpft_nb.lab.sweep_worker" in command_of(one)
    ]
    victim = next(one for one in workers if "python" in Path(command_of(one).split()[0]).name)
    os.kill(victim, signal.SIGKILL)
    (toys / "wait").unlink()
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 1 and "1 made, 0 there before, 1 failed" in out
    assert main(["sweep", "a.yaml"]) == 0
    all_there(tmp_path, "a run is killed", hit=1)
    (toys / "wait").touch()
    write(tmp_path, value=[1, 2, 3, 4])
    second, had = start(tmp_path), len(begun(toys))
    until(lambda: len(begun(toys)) == had + 2)
    scheduler = next(one for one in children_of(second.pid) if "snakemake" in command_of(one))
    os.kill(scheduler, signal.SIGKILL)
    (toys / "wait").unlink()
    second.communicate(timeout=120)
    assert second.returncode == 1
    assert main(["sweep", "a.yaml", "--jobs", "2"]) == 0
    all_there(tmp_path, "the scheduler is killed", hit=2)


def test_interrupted_leaves_nothing_running_and_goes_on(toys, tmp_path, capsys):
    write(tmp_path, value=[1, 2])
    (toys / "wait").touch()
    first = start(tmp_path)
    until(lambda: len(begun(toys)) == 2)
    started = children_of(first.pid)
    os.killpg(first.pid, signal.SIGINT)
    _, error = first.communicate(timeout=300)
    assert first.returncode == 130 and "the same command goes on from here" in error
    until(lambda: not any("lpft_nb" in command_of(one) for one in started))
    (toys / "wait").unlink()
    assert main(["sweep", "a.yaml", "--jobs", "2"]) == 0
    all_there(tmp_path, "Ctrl-C", hit=2)


def test_a_file_edited_meanwhile_is_said_and_the_next_call_makes_what_it_adds(
    toys, tmp_path, capsys
):
    path = write(tmp_path, value=[1])
    (toys / "wait").touch()
    first = start(tmp_path)
    until(lambda: len(begun(toys)) == 1)
    write(tmp_path, value=[1, 2])
    (toys / "wait").unlink()
    shown, _ = first.communicate(timeout=300)
    assert first.returncode == 0 and len(records(tmp_path)) == 1
    assert f"{path.name} has been edited meanwhile" in shown
    assert main(["sweep", "a.yaml"]) == 0
    assert "1 made, 1 there before, 0 failed" in capsys.readouterr().out
    all_there(tmp_path, "the file is edited meanwhile", hit=1)


def test_a_full_disk_loses_nothing(toys, tmp_path, capsys):
    small = tmp_path / "runs"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=False
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        write(tmp_path, value=[1])
        assert main(["sweep", "a.yaml"]) == 0
        had = [path.read_bytes() for path in records(tmp_path)]
        (small / "ballast").write_bytes(b"x" * (os.statvfs(small).f_bavail * 4096))
        write(tmp_path, value=[1, 2])
        assert main(["sweep", "a.yaml"]) in (1, 2)
        assert [path.read_bytes() for path in records(tmp_path)] == had
        (small / "ballast").unlink()
        assert main(["sweep", "a.yaml"]) == 0
        all_there(tmp_path, "the disk is full", hit=1)
    finally:
        subprocess.run(["umount", small], check=True)


# --- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.yaml"], "cannot read the parameter file"),
        (["a.yaml", "--jobs", "0"], "--jobs 0: expected at least one"),
        (["a.yaml", "--executor", "slurmm"], "--executor slurmm is not installed"),
        (["a.yaml", "--profile", "nowhere"], "expected a folder with a config.yaml"),
        (["a.yaml", "--output", "a.yaml"], "no folder can be made there"),
        ([], "name a sweep file"),
        (["--schema", "toyy"], "did you mean 'toy'"),
    ],
)
def test_wrong_calls_exit_2_with_one_line(options, message, toys, tmp_path, capsys):
    write(tmp_path)
    assert main(["sweep", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_record_of_another_schema_is_made_again_and_said(toys, tmp_path, capsys):
    write(tmp_path)
    main(["sweep", "a.yaml", "--dry-run"])
    (name,) = re.findall(r"toy-toys-\S+", capsys.readouterr().out)
    path = tmp_path / "runs" / "toy" / f"{name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema_version": 99}))
    assert main(["sweep", "a.yaml", "--dry-run"]) == 0
    assert "damaged record" in capsys.readouterr().out


def test_the_schema_is_printed_for_editors(toys, capsys):
    assert main(["sweep", "--schema", "toy"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "a sweep of toy"


def test_the_scheduler_gets_cores_memory_and_cards():
    plan = {"cpu": 2, "gpu": 0, "mem_mb": 100, "minutes": 5, "options": ["--slurm-qos", "long"]}
    local = scheduler_command(plan, Scheduling(jobs=3))
    assert local[local.index("--cores") + 1] == "6" and "--keep-going" in local
    slurm = scheduler_command(plan, Scheduling(jobs=3, executor="slurm"))
    assert "--cores" not in slurm and slurm[slurm.index("--executor") + 1] == "slurm"
    assert slurm[-2:] == ["--slurm-qos", "long"] and "--slurm-qos" not in local
    with pytest.raises(ParameterError, match="at least one run"):
        check_scheduling(Scheduling(jobs=0))


def test_a_lock_of_a_dead_process_holds_nobody(tmp_path):
    code = f"import os; from lpft_nb.lab.sweep import only_sweep\nwith only_sweep({str(tmp_path)!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with only_sweep(tmp_path):
        pass
