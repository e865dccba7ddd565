"""Calibration errors against netcal and torchmetrics, each timed from the same logits to the number, and a case that is large.

    python benchmarks/calibration.py

--large 0 leaves the large case out; --large 100000 makes it smaller. It needs 4 kB of memory for each of its rows.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from measuring import Peak, interleaved
from netcal.metrics import ECE
from scipy.special import softmax
from threadpoolctl import threadpool_limits
from torchmetrics.functional.classification import multiclass_calibration_error

from lpft_nb.bootstrap import METRIC_NAMES, bootstrap_intervals
from lpft_nb.store.cache import write_atomically
from lpft_nb.calibration import (
    calibration_metrics,
    classwise_calibration_error,
    expected_calibration_error,
)

BINS, SEED, LARGE_CLASSES = 15, 0, 1000


def draw(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Over-confident float32 logits, and labels that agree with the prediction about every second time."""
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.empty(rows, classes).normal_(0, 3, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    for start in range(0, rows, 10_000):
        part = slice(start, start + 10_000)
        agree = torch.rand(len(labels[part]), generator=generator) < 0.5
        labels[part] = torch.where(agree, logits[part].argmax(dim=1), labels[part])
    return logits, labels


def compare(rows: int, classes: int, repeats: int) -> list[dict]:
    """ECE with 15 bins by each, from float32 logits to a number."""
    logits, labels = draw(rows, classes)
    work = {
        "lpft_nb": lambda: expected_calibration_error(logits, labels, BINS),
        "torchmetrics": lambda: multiclass_calibration_error(
            logits, labels, classes, BINS, "l1"
        ).item(),
        "netcal": lambda: float(ECE(BINS).measure(logits.softmax(dim=1).numpy(), labels.numpy())),
        "netcal, softmax by scipy": lambda: float(
            ECE(BINS).measure(softmax(logits.numpy(), axis=1), labels.numpy())
        ),
    }
    seconds = {
        name: statistics.median(times) for name, times in interleaved(repeats, **work).items()
    }
    values = {name: run() for name, run in work.items()}
    return [
        {"what": f"ECE of {rows:,} x {classes} float32 logits, seconds"}
        | {name: round(value, 4) for name, value in seconds.items()},
        {"what": "time of netcal over ours (wanted: at least 5)"}
        | {
            f"softmax by {name}": round(seconds[key] / seconds["lpft_nb"], 2)
            for name, key in (("torch", "netcal"), ("scipy", "netcal, softmax by scipy"))
        },
        {
            "what": "our time over torchmetrics' (wanted: at most 1.1)",
            "ratio": round(seconds["lpft_nb"] / seconds["torchmetrics"], 3),
        },
        {"what": "the value"} | {name: round(value, 7) for name, value in values.items()},
    ]


def large(rows: int) -> list[dict]:
    """Time and memory above the input of many rows with 1,000 classes."""
    logits, labels = draw(rows, LARGE_CLASSES)
    size = f"{rows:,} x {LARGE_CLASSES:,} float32 logits ({logits.numel() * 4 / 2**20:.0f} MiB)"
    intervals = [name for name in METRIC_NAMES if name != "classwise_ece"]
    work = {
        "expected_calibration_error": lambda: expected_calibration_error(logits, labels),
        "classwise_calibration_error": lambda: classwise_calibration_error(logits, labels),
        f"calibration_metrics, all {len(METRIC_NAMES)}": lambda: calibration_metrics(
            logits, labels
        ),
        f"bootstrap_intervals, {len(intervals)} metrics, 20 resamples": lambda: bootstrap_intervals(
            logits, labels, intervals, resamples=20
        ),
    }
    found = []
    for name, run in work.items():
        with Peak() as peak:
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
        found.append(
            {
                "what": f"{name}: {size}",
                "seconds": round(seconds, 2),
                "MiB above the input": round(peak.bytes / 2**20, 1),
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=200_000, help="rows of the comparison (default 200,000)"
    )
    parser.add_argument(
        "--classes", type=int, default=100, help="classes of the comparison (default 100)"
    )
    parser.add_argument(
        "--large",
        type=int,
        default=1_000_000,
        help="rows of the large case with 1,000 classes; 0 leaves it out",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="threads of torch and of BLAS (default: all cores)",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="measured rounds; medians are reported"
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/calibration.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        rows = compare(options.rows, options.classes, options.repeats)
        if options.large:
            rows += large(options.large)
    record = {
        "benchmark": "calibration",
        "command": f"python benchmarks/calibration.py --rows {options.rows} --classes {options.classes} --large {options.large} "
        f"--threads {options.threads} --repeats {options.repeats}",
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores",
        "threads": options.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "scipy", "torchmetrics", "netcal")},
        "rows": rows,
    }
    for row in rows:
        print(
            f"  {row['what']}: "
            + ", ".join(f"{key} {value:.5g}" for key, value in row.items() if key != "what")
        )
    write_atomically(options.output, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
