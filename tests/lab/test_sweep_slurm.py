"""Sweeps by a real Slurm: what a run asks for arrives there, what ends badly is named, and the next call makes it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from repository import ROOT
from slurm_fixture import ACCOUNT, slurm  # noqa: F401
from toy_experiment import begun, surroundings, use_toy

from lpft_nb.command_line import main
from lpft_nb.lab import cluster
from lpft_nb.lab.parameters import ParameterError
from lpft_nb.records import read_record

pytestmark = pytest.mark.xdist_group("slurm")
PROFILE = ROOT / "sweeps" / "profiles" / "slurm" / "config.yaml"
TAKES = {"cpu": 1, "gpu": 1, "memory": "300MiB", "minutes": 6.2}


def write_profile(folder: Path, partition: str, **said) -> Path:
    "The profile of this repository with this cluster's names, which does not wait as long as a real one."
    profile = yaml.safe_load(PROFILE.read_text())
    profile["default-resources"] |= {"slurm_partition": partition, "slurm_account": ACCOUNT}
    profile |= {"latency-wait": 2, "slurm-init-seconds-before-status-checks": 10} | said
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def start(place: Path, profile: str) -> subprocess.Popen:
    "A sweep in a process of its own."
    command = [sys.executable, "-m", "lpft_nb", "sweep", "a.yaml", "--jobs", "2"]
    command += ["--executor", "slurm", "--profile", profile]
    return subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def until(condition, seconds=120.0):
    "Wait for something to be so."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)
    return found


def jobs() -> dict[str, str]:
    "What Slurm says of every job that it remembers, by the job's id."
    said = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True)
    return {
        line.split()[0].removeprefix("JobId="): line for line in said.stdout.splitlines() if line
    }


@pytest.fixture(scope="module")
def world(slurm, tmp_path_factory):  # noqa: F811
    """Three calls of one sweep of three values.

    In the first, 2 fails and the job of 3, which would wait without an end, is cancelled. In the second, an array,
    2 fails again. Before the third, sweep and scheduler are killed while the last run is at work.
    """
    place = tmp_path_factory.mktemp("a cluster")  # blanks in a path are to be no trouble
    toys = place / "toys"
    with pytest.MonkeyPatch.context() as patch:
        use_toy(toys, patch)
        patch.chdir(place)
        write_profile(place / "plain", "long")
        write_profile(place / "array", "short", **{"slurm-array-jobs": "all"})
        said = {"experiment": "toy", "value": [1, 2, 3], "resources": TAKES}
        (place / "a.yaml").write_text(yaml.safe_dump(said))
        yield SimpleNamespace(place=place, toys=toys)


@pytest.fixture(scope="module")
def first(world):
    (world.toys / "fails.txt").write_text("2")
    (world.toys / "waits.txt").write_text("3")
    sweep = start(world.place, "plain")
    until(lambda: len(begun(world.toys)) == 3)
    until(lambda: len(list((world.place / "runs/.sweep/failed").glob("*.json"))) == 1)
    (waiting,) = until(lambda: [one for one, line in jobs().items() if "JobState=RUNNING" in line])
    line = jobs()[waiting]
    subprocess.run(["scancel", waiting], check=True)
    out, _ = sweep.communicate(timeout=120)
    (world.toys / "waits.txt").write_text("")
    return SimpleNamespace(code=sweep.returncode, out=out, job=waiting, line=line, jobs=jobs())


@pytest.fixture(scope="module")
def second(world, first):
    out, _ = (sweep := start(world.place, "array")).communicate(timeout=150)
    new = {one: line for one, line in jobs().items() if one not in first.jobs}
    return SimpleNamespace(code=sweep.returncode, out=out, jobs=new)


def test_a_run_that_fails_and_a_job_that_is_cancelled_stop_no_other(first):
    assert first.code == 1 and "1 made, 0 there before, 2 failed" in first.out, first.out
    assert "RunFailed: RuntimeError: the toy is to fail" in first.out
    assert f"Slurm ended job {first.job}: CANCELLED" in first.out


def test_every_run_is_a_job_and_slurm_gives_it_its_card(world, first):
    seen = surroundings(world.toys)
    assert len({one["SLURM_JOB_ID"] for one in seen}) == 3 and None not in seen
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} <= {"0", "1"}
    assert {one["OMP_NUM_THREADS"] for one in seen} == {"1"}


def test_what_file_and_profile_ask_for_arrives(world, first):
    for words in (
        "Partition=long",
        f"Account={ACCOUNT}",
        "TimeLimit=00:07:00",
        "MinMemoryNode=300M",
        "CPUs/Task=1",
        "TresPerJob=gres:gpu:1",
        f"WorkDir={world.place}/runs/.sweep",
    ):
        assert words in first.line, f"{words} is not in {first.line}"


def test_an_array_makes_what_is_missing_and_a_failure_in_it_takes_nothing_else_along(world, second):
    assert second.code == 1 and "1 made, 1 there before, 1 failed" in second.out, second.out
    arrays = {re.search(r"ArrayJobId=(\d+)", line)[1] for line in second.jobs.values()}
    assert len(second.jobs) == 2 and len(arrays) == 1
    assert all("Partition=short" in line for line in second.jobs.values())
    records = sorted((world.place / "runs" / "toy").glob("*.json"))
    made = [path for path in records if read_record(path)["status"] == "finished"]
    assert len(made) == 2 and len(begun(world.toys)) == 5


def test_jobs_that_a_killed_scheduler_has_left_are_named_and_the_rest_is_made(world, second, capfd):
    (world.toys / "fails.txt").write_text("")
    (world.toys / "waits.txt").write_text("2")
    sweep = start(world.place, "plain")
    until(lambda: len(begun(world.toys)) == 6)
    os.killpg(sweep.pid, signal.SIGKILL)  # the scheduler too
    sweep.communicate()
    (left,) = cluster.left_behind(world.place / "runs" / ".sweep")
    options = ["--executor", "slurm", "--profile", "plain"]
    assert main(["sweep", "a.yaml", *options]) == 2
    assert f"scancel {left}" in capfd.readouterr().err
    subprocess.run(["scancel", left], check=True)
    (world.toys / "waits.txt").write_text("")
    until(lambda: not cluster.left_behind(world.place / "runs" / ".sweep"))
    assert main(["sweep", "a.yaml", *options]) == 0
    assert "1 made, 2 there before, 0 failed" in capfd.readouterr().out
    submitted = len(jobs())
    assert main(["sweep", "a.yaml", *options]) == 0
    assert "0 made, 3 there before, 0 failed" in capfd.readouterr().out
    assert len(jobs()) == submitted


def test_a_partition_that_is_not_there_is_said(world, capfd):
    write_profile(world.place / "wrong", "nowhere")
    (world.place / "b.yaml").write_text("experiment: toy\nvalue: [9]\n")
    options = ["--executor", "slurm", "--profile", "wrong", "--output", "others"]
    assert main(["sweep", "b.yaml", *options]) == 1
    said = capfd.readouterr().out
    assert "SLURM sbatch failed" in said and "invalid partition" in said


# --- without a cluster


def test_a_machine_without_slurm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ParameterError, match="no scontrol here. Call from a login node"):
        cluster.slurm_settings()


def test_a_profile_for_another_executor_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="add --executor slurm"):
        cluster.check_profile(str(PROFILE.parent), "local")
    cluster.check_profile(str(PROFILE.parent), "slurm")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ParameterError, match=r"cannot read config\.yaml"):
        cluster.check_profile(str(tmp_path), "slurm")


@pytest.mark.parametrize("kept", ["180 sec", "0", ""])
def test_a_slurm_that_forgets_too_soon_is_refused(kept):
    settings = {"AccountingStorageType": "accounting_storage/none", "MinJobAge": kept}
    with pytest.raises(ParameterError, match="MinJobAge"):
        cluster.status_options(settings)
    assert cluster.status_options(settings | {"MinJobAge": "300 sec"})[-1] == "squeue"
    assert cluster.status_options({"AccountingStorageType": "accounting_storage/slurmdbd"}) == []
