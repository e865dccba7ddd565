"""Several launchers on one folder: each run is made once, a killed one's work is taken over, nothing is mixed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lpft_nb.lab.runs import Run, claim, make_each
from lpft_nb.records import is_finished, make_record, read_record, write_record
from toy_records import SURROUNDINGS

FORKED = multiprocessing.get_context("fork")  # the libraries are loaded already


def record_of(number: int) -> dict:
    return make_record(
        experiment="claims",
        method="FT",
        seed=number,
        parameters={},
        task={"name": "toy", "fingerprint": "f0", "sizes": {"train": 1}},
        model={"id": "toy", "revision": None, "sha256": None},
        stages=[{"name": "FT"}],
        metrics=[{"stage": "FT", "split": "test", "metric": "seed", "value": float(number)}],
        surroundings=SURROUNDINGS,
    )


def toy_run(folder: Path, number: int, seconds: float = 0.15) -> Run:
    """A run that takes its time, and writes down when it began and ended, and in which process."""

    def make(run: Run) -> Path:
        with open(folder / "log", "a") as log:
            log.write(f"begin {run.seed} {os.getpid()}\n")
        time.sleep(seconds)
        path = write_record(record_of(run.seed), None, run.path.parent)
        with open(folder / "log", "a") as log:
            log.write(f"end {run.seed} {os.getpid()}\n")
        return path

    name = record_of(number)["run_id"]
    return Run("FT", number, {}, make=make, name=name, path=folder / "claims" / f"{name}.json")


def launch(folder: Path, numbers: list[int]) -> multiprocessing.Process:
    runs = [toy_run(folder, number) for number in numbers]
    process = FORKED.Process(target=make_each, args=(runs,), kwargs={"seconds_between_looks": 0.02})
    process.start()
    return process


def events(folder: Path) -> list[tuple[str, int, int]]:
    lines = (folder / "log").read_text().splitlines()
    return [(what, int(seed), int(process)) for what, seed, process in map(str.split, lines)]


GRIDS = {"same": lambda at: range(6), "overlapping": lambda at: range(at, at + 4)}


@pytest.mark.parametrize("launchers", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_launchers_share_the_work_and_each_run_is_made_once(launchers, grid, tmp_path):
    grids = [list(GRIDS[grid](at)) for at in range(launchers)]
    processes = [launch(tmp_path, numbers) for numbers in grids]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    wanted = sorted(set().union(*grids))
    ended = [seed for what, seed, _ in events(tmp_path) if what == "end"]
    assert sorted(ended) == wanted  # once each
    assert len({process for _, _, process in events(tmp_path)}) > 1
    records = [read_record(path) for path in (tmp_path / "claims").glob("*.json")]
    assert sorted(record["seed"] for record in records) == wanted


@pytest.mark.parametrize("launchers", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_a_killed_launcher_held_is_taken_over(launchers, grid, tmp_path):
    grids = [list(GRIDS[grid](at)) for at in range(launchers)]
    processes = [launch(tmp_path, numbers) for numbers in grids]
    for process in processes[:-1]:  # in turn, each in the middle of a run
        time.sleep(0.1)
        process.kill()
        process.join(10)
    ends = [process.exitcode for process in processes[:-1]]
    assert -signal.SIGKILL in ends and set(ends) <= {-signal.SIGKILL, 0}  # 0: it was done before
    rest = launch(tmp_path, sorted(set().union(*grids)))  # whoever calls again goes on
    for process in (processes[-1], rest):
        process.join(60)
        assert process.exitcode == 0
    wanted = sorted(set().union(*grids))
    paths = list((tmp_path / "claims").glob("*.json"))
    assert sorted(read_record(path)["seed"] for path in paths) == wanted
    assert all(map(is_finished, paths))
    ended = [seed for what, seed, _ in events(tmp_path) if what == "end"]
    assert sorted(ended) == wanted  # what was cut short is not counted, and no run is made twice


def test_one_process_at_a_time_holds_a_claim(tmp_path, capsys):
    run = toy_run(tmp_path, 0)
    with claim(run) as ours:
        other = launch(tmp_path, [0])
        time.sleep(0.2)
        assert ours and other.is_alive() and not (tmp_path / "log").exists()
    other.join(20)
    assert other.exitcode == 0 and is_finished(run.path)
    with claim(run) as ours:
        assert ours


def test_run_ids_of_these_toys_differ():
    assert len({record_of(number)["run_id"] for number in range(4)}) == 4
