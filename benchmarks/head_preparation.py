"""A sweep over the length of the probe beside one full probe: seconds that probing adds to the fine-tunings.

    python benchmarks/head_preparation.py

One full probe: a run that only probes, to the longest length, from an empty cache: it encodes the texts, computes the
frozen features, walks the head and measures the end. Each further length adds its stage LP, which finds its head in
the cache and measures the end; the rest of such a run, reading the model and finding tokens and features, is what a
fine-tuning alone would do too. Wanted: at most 1.25 full probes for twelve lengths. The share depends on how many
texts there are to encode for the features: --task, --examples and --model make another case.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from lpft_nb.classifier import Classifier
from lpft_nb.stages import LinearProbe, run_stages
from lpft_nb.store.cache import write_atomically
from lpft_nb.tasks import Task, load_task, take

LENGTHS = (0, 1, 2, 4, 8, 16, 32, 50, 75, 100, 150, 199)
LIMIT = 1.25  # full probes


def probed(task: Task, model: str) -> tuple[float, list[float]]:
    """Seconds of one full probe from an empty cache, and of the stage LP of each further length."""
    stages, whole = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LPFT_CACHE"] = folder
        for epochs in reversed(LENGTHS):
            fresh = Classifier.from_pretrained(
                model, task.num_labels, label_names=list(task.label_names), seed=0
            )
            step = LinearProbe(epochs=epochs, learning_rate=0.3, keep=LENGTHS)
            start = time.perf_counter()
            result = run_stages(fresh, task, [step], device="cpu")
            whole = whole or time.perf_counter() - start
            stages.append(result.stages[0]["seconds"])
    return whole, stages[1:]


def main() -> int:
    """Measure both in turn, compare, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="docstring-topic", help="a name or a folder")
    parser.add_argument("--model", default="minilm", help="a name or a folder")
    parser.add_argument("--examples", type=int, help="training examples (default all)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns")
    parser.add_argument(
        "--output", type=Path, default=Path("results/benchmarks/head_preparation.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = take(load_task(options.task), options.examples)
    turns = [probed(task, options.model) for _ in range(options.repeats)]
    one = statistics.median(whole for whole, _ in turns)
    twelve = statistics.median(whole + sum(further) for whole, further in turns)
    later = [seconds for _, further in turns for seconds in further]
    record = {
        "task": task.name,
        "sizes": task.sizes,
        "model": options.model,
        "lengths": list(LENGTHS),
        "repeats": options.repeats,
        "one full probe (s)": round(one, 2),
        "twelve lengths (s)": round(twelve, 2),
        "a further length (s)": round(statistics.median(later), 2),
        "twelve over one": round(twelve / one, 3),
        "wanted at most": LIMIT,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps(record, indent=1))
    write_atomically(options.output, json.dumps(record, indent=1).encode() + b"\n")
    return 0 if twelve <= LIMIT * one else 1


if __name__ == "__main__":
    sys.exit(main())
