"""One run of a sweep: its card, the record that it replaces, and the note that it leaves."""

import itertools
import multiprocessing
import tempfile
import time
from pathlib import Path

import pytest

from lpft_nb.lab import sweep_worker
from lpft_nb.lab.launch import RunFailed
from lpft_nb.lab.sweep_worker import cards, own_card, set_aside


@pytest.fixture
def two_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def hold(queue, seconds):
    import os

    with own_card(True, seconds_between_looks=0.02):
        queue.put((os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic()))
        time.sleep(seconds)


def test_no_two_runs_hold_one_card(two_cards):
    """Six processes on two cards: at most one holds each at any time."""
    context = multiprocessing.get_context("fork")
    queue, seconds = context.Queue(), 0.3
    processes = [context.Process(target=hold, args=(queue, seconds)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    found = [queue.get(timeout=5) for _ in processes]
    for number in ("0", "1"):
        times = sorted(began for card, began in found if card == number)
        assert all(later - earlier >= seconds for earlier, later in itertools.pairwise(times))
    assert {card for card, _ in found} == {"0", "1"}


def test_a_run_that_takes_what_a_cluster_has_chosen_holds_no_card(two_cards, tmp_path):
    with own_card(False):
        assert cards() == ["0", "1"]
    assert not list(tmp_path.iterdir())


def test_cards_are_numbered_within_a_job_of_a_cluster(two_cards, monkeypatch):
    """Two jobs on one machine may both call their card 0: neither keeps the other waiting."""
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        held = own_card(True)
        held.__enter__()
        assert cards() == ["0"]
        locks = sorted(Path(tempfile.gettempdir()).glob("lpft-nb-cards-*"))
        assert locks[-1].name.endswith(f"-{job}")


def test_a_machine_without_a_card_says_so(two_cards, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RunFailed, match="gpu: 0"), own_card(True):
        pass
    with own_card(False):
        assert cards() == []


@pytest.mark.parametrize("error", [RunFailed, KeyboardInterrupt])
def test_a_failure_never_replaces_a_finished_record(error, tmp_path):
    record = tmp_path / "runs" / "a.json"
    record.parent.mkdir()
    for path in (record, record.with_suffix(".safetensors")):
        path.write_text("old")
    (record.parent / "a-longer-name.json").write_text("another")
    with pytest.raises(error), set_aside(record, tmp_path / "replaced", True):
        assert not record.exists()
        record.write_text("failed")
        raise error("stopped")
    assert record.read_text() == record.with_suffix(".safetensors").read_text() == "old"
    with set_aside(record, tmp_path / "replaced", True):
        record.write_text("new")
    assert record.read_text() == "new"
    assert (tmp_path / "replaced" / "a.json").read_text() == "old"
    assert (record.parent / "a-longer-name.json").read_text() == "another"


def test_what_stops_a_run_is_noted(tmp_path, monkeypatch):
    def fails(name, requested):
        raise RunFailed("the notebook stopped\nhere")

    monkeypatch.setattr(sweep_worker, "launch", fails)
    job = {"requested": {}, "output": str(tmp_path), "again": False, "gpu": False}
    plan = {"experiment": "toy", "output": str(tmp_path), "jobs": {"a": job}}
    with pytest.raises(RunFailed):
        sweep_worker.make_job(plan, "a")
    note = sweep_worker.note_path(tmp_path, "failed", "a")
    assert "the notebook stopped" in note.read_text()
