"""What the benchmarks share: work timed in turn, and the memory that a block of work takes."""

import contextlib
import ctypes
import gc
import threading
import time

import psutil
import torch


def interleaved(repeats: int, **work) -> dict[str, list[float]]:
    """Seconds of each piece of work, `repeats` times in turn, after one unmeasured round.

    In its turn each runs twice and the faster call counts: the first one finds the threads and caches as another left them.
    """
    seconds = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, run in work.items():
            calls = []
            for _ in range(2):
                start = time.perf_counter()
                run()
                calls.append(time.perf_counter() - start)
            if turn > 0:
                seconds[name].append(min(calls))
    return seconds


def give_back() -> None:
    """Return freed memory to the system where the C library can: what it keeps would hide what the next work takes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """Highest resident set (on a GPU: allocated memory) over that at the start of a block, in `bytes` after it."""

    def __init__(self, device: str = "cpu"):
        self.device = device

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        give_back()
        self.process, self.over = psutil.Process(), threading.Event()
        self.start = self.highest = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.005):
            self.highest = max(self.highest, self.process.memory_info().rss)

    def __exit__(self, *_):
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.over.set()
        self.thread.join()
        self.bytes = max(self.highest, self.process.memory_info().rss) - self.start
