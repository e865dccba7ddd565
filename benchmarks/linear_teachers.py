"""Exact risks of many random worlds of linear teachers: seconds and peak memory of one call.

    python benchmarks/linear_teachers.py --draws 1000 --dimension 1000 --examples 100

The aim: 1,000 draws in 1,000 dimensions with 100 examples in under 20 s on two cores, within 2 GiB.
"""

import argparse
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch

from lpft_nb.intervals import confidence_interval
from lpft_nb.linear_teachers import Design, isotropic_mean_risk, sample_risks
from lpft_nb.store.cache import write_atomically


def main() -> None:
    """Measure once, check the mean against the law, and print a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument(
        "--output", type=Path, default=Path("results/benchmarks/linear_teachers.json")
    )
    given = parser.parse_args()
    design = Design(given.dimension, given.examples, alpha=2.0)
    start = time.perf_counter()
    frame = sample_risks(design, given.draws)
    seconds = time.perf_counter() - start
    tuned = frame[frame["predictor"] == "fine-tuned"]["value"].to_numpy()
    interval = confidence_interval(tuned, level=0.9999)
    law = isotropic_mean_risk(given.examples, given.dimension, 1.0)
    record = {
        "benchmark": "linear_teachers",
        "command": f"python benchmarks/linear_teachers.py --draws {given.draws} "
        f"--dimension {given.dimension} --examples {given.examples}",
        "seconds": round(seconds, 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "mean_risk": interval.mean,
        "law": law,
        "law_in_interval": interval.low <= law <= interval.high,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": version("torch"),
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    write_atomically(given.output, text.encode())


if __name__ == "__main__":
    main()
