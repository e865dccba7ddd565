"""Feature statistics of two snapshots: seconds and memory above the input, as one array and as a stream of batches.

    python benchmarks/features.py

--rows and --size make another case. Wanted for 10,000 x 768: under 2 s on two cores, under 200 MiB.
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
from measuring import Peak
from threadpoolctl import threadpool_limits

from lpft_nb.features import describe, feature_sums, merged
from lpft_nb.store.cache import write_atomically

SEED, CLASSES, BATCH = 0, 3, 32


def draw(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 features in a narrow cone, the same moved, and labels."""
    generator = torch.Generator().manual_seed(SEED)
    reference = torch.empty(rows, size).normal_(0.5, 0.1, generator=generator)
    features = torch.empty(rows, size).normal_(0, 0.1, generator=generator).add_(reference)
    return features, reference, torch.arange(rows) % CLASSES


def measured(work, repeats: int) -> tuple[dict, object]:
    """Median seconds and the highest memory above the input, over some calls, and what the last one gave."""
    seconds, peaks, value = [], [], None
    for _ in range(repeats):
        value = None
        with Peak() as peak:
            start = time.perf_counter()
            value = work()
            seconds.append(time.perf_counter() - start)
        peaks.append(peak.bytes)
    found = {
        "seconds": round(statistics.median(seconds), 3),
        "MiB above the input": round(max(peaks) / 2**20, 1),
    }
    return found, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="examples (default 10,000)")
    parser.add_argument("--size", type=int, default=768, help="size of a feature (default 768)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of BLAS")
    parser.add_argument("--repeats", type=int, default=7, help="measured calls, after one")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/features.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    features, reference, labels = draw(options.rows, options.size)
    sides = features.split(BATCH), reference.split(BATCH), labels.split(BATCH)
    work = {
        "all statistics of one array": lambda: describe(feature_sums(features, reference, labels)),
        "sums alone": lambda: feature_sums(features, reference, labels),
        f"sums of a stream of batches of {BATCH}": lambda: merged(
            feature_sums(*batch) for batch in zip(*sides, strict=True)
        ),
    }
    rows, given = [], {}
    with threadpool_limits(options.threads):
        for name, run in work.items():
            measured(run, 1)  # threads and caches
            found, given[name] = measured(run, options.repeats)
            rows.append({"what": f"{name}, {options.rows:,} x {options.size}, twice"} | found)
    values = describe(given[f"sums of a stream of batches of {BATCH}"]).values
    whole = given["all statistics of one array"].values
    apart = max(abs(values[name] - value) / max(abs(value), 1e-6) for name, value in whole.items())
    rows.append({"what": "largest relative difference between array and stream", "value": apart})
    record = {
        "benchmark": "features",
        "command": f"python benchmarks/features.py --rows {options.rows} --size {options.size} "
        f"--threads {options.threads} --repeats {options.repeats}",
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores",
        "threads": options.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy")},
        "rows": rows,
    }
    for row in rows:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "what")
        print(f"  {row['what']}: {numbers}")
    write_atomically(options.output, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
