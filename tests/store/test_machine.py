"""This machine: device, threads, peak memory, progress, and the division of work."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.store import machine
from lpft_nb.store.machine import MachineError, Progress, World, resolve, threads


def test_resolve_on_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto", "auto") == ("cpu", torch.float32)
    assert resolve("cpu", "bfloat16") == ("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="finds no GPU"):
        resolve("cuda", "auto")


@pytest.mark.parametrize("supported", [True, False])
def test_resolve_with_a_graphics_card(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    expected = torch.bfloat16 if supported else torch.float32
    assert resolve("auto", "auto") == ("cuda", expected)
    assert resolve("cpu", "auto") == ("cpu", torch.float32)
    assert resolve("cuda", "float32") == ("cuda", torch.float32)


@pytest.mark.parametrize("wrong", [("gpu", "auto"), ("cpu", "float16"), (None, "auto")])
def test_resolve_refuses(wrong):
    with pytest.raises(ValueError, match="unknown"):
        resolve(*wrong)


def test_a_card_is_chosen_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve("cuda:1", "auto") == ("cuda:1", torch.bfloat16)
    assert resolve(torch.device("cuda", 0), "float32") == ("cuda", torch.float32)
    assert resolve(torch.device("cpu"), "auto") == resolve("cpu:0", "auto")
    for wrong, message in (
        ("cuda:2", "numbers 0 to 1"),
        ("cuda:x", "numbers 0 to 1"),
        ("cpu:1", "numbers 0 to 0"),
        ("auto:1", "finds no auto"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(wrong, "auto")


def test_mps_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no mps; use device='cpu'"):
        resolve("mps", "auto")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve("mps", "auto") == ("mps", torch.float32)
    assert machine.peak_memory_bytes("mps") > 0


def test_threads_divide_the_cores(monkeypatch):
    monkeypatch.delenv("LPFT_THREADS", raising=False)
    monkeypatch.setattr(
        machine.os, "sched_getaffinity", lambda process: set(range(8)), raising=False
    )
    assert [threads(jobs) for jobs in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("LPFT_THREADS", "3")
    assert threads() == threads(100) == 3
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    monkeypatch.setenv("LPFT_THREADS", "")
    assert threads() == 1


@pytest.mark.parametrize("told", ["0", "-1", "two", "1.5"])
def test_threads_refuse(told, monkeypatch):
    monkeypatch.setenv("LPFT_THREADS", told)
    with pytest.raises(ValueError, match="LPFT_THREADS"):
        threads()
    monkeypatch.delenv("LPFT_THREADS")
    with pytest.raises(ValueError, match="at least one"):
        threads(0)


def test_progress_writes_lines_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter([0.0, 4.0, 11.0, 12.0, 30.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    progress = Progress(6, "a kernel", done=2)
    for _ in range(4):
        progress.step()
    progress.say("done")
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "a kernel: 4 of 6 parts, about 11 s left",
        "a kernel: 6 of 6 parts, about 0 s left",
        "a kernel: done",
    ]


def test_quiet_progress_counts_and_says_nothing(capsys):
    progress = Progress(2, "x", quiet=True, seconds=0)
    progress.step()
    progress.say("y")
    assert progress.done == 1 and capsys.readouterr() == ("", "")


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(2, "a kernel")
    progress.step()
    progress.say("nearly")
    progress.step()
    written = capsys.readouterr()
    assert written.out == "" and "a kernel" in written.err and "2/2" in written.err
    assert progress.bar.disable or progress.bar.n == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 9))
def test_a_division_is_whole_and_even(costs, size):
    shares = [World(rank, size).share(list(range(len(costs))), costs) for rank in range(size)]
    assert sorted(sum(shares, [])) == list(range(len(costs)))
    loads = [sum(costs[part] for part in share) for share in shares]
    # longest job first: nobody has more than an even share and the largest part together
    assert max(loads) <= sum(costs) / size + max(costs, default=0) + 1e-6


def test_one_process_is_a_world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.current("cpu")
    assert (world.rank, world.size) == (0, 1)
    world.wait()
    table = torch.ones(2)
    world.sum([table], "key")
    assert table.tolist() == [1, 1]
    with pytest.raises(ZeroDivisionError):
        world.sum([table], "key", ZeroDivisionError("mine"))


@pytest.mark.parametrize(
    ("others", "message"),
    [(("key", "ValueError: no"), "process 1 stopped.*whole kernel.*ValueError: no"), (("else", None), "different models")],
)  # fmt: skip
def test_processes_that_do_not_agree(others, message, monkeypatch):
    def gather(told, mine):
        told[:] = [mine, others]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(MachineError, match=message):
        World(0, 2).sum([], "key", what="kernel")
    with pytest.raises(KeyError, match=message):
        World(0, 2).sum([], "key", what="kernel", error=KeyError)
