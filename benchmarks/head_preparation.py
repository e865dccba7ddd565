"""A sweep over the length of the probe beside one full probe: seconds of everything but fine-tuning.

    python benchmarks/head_preparation.py

A full probe is what a run does that only probes: read a model, encode its texts, compute the frozen features, walk the
head to the longest length, measure the end. The sweep does so for twelve lengths, and what the first run has computed
is found in the cache by the others. Wanted: at most 1.25 full probes for the twelve, and the fine-tunings beside them.
--examples, --model and --task make another case.
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


def probed(task: Task, model: str, lengths: tuple[int, ...]) -> dict[int, float]:
    """Seconds of the runs of some lengths, one after the other, from an empty cache."""
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LPFT_CACHE"] = folder
        for epochs in lengths:
            start = time.perf_counter()
            fresh = Classifier.from_pretrained(
                model, task.num_labels, label_names=list(task.label_names), seed=0
            )
            step = LinearProbe(epochs=epochs, learning_rate=0.3, keep=lengths)
            run_stages(fresh, task, [step], device="cpu")
            seconds[epochs] = time.perf_counter() - start
    return seconds


def main() -> int:
    """Measure both in turn, compare, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="docstring-topic", help="a name or a folder")
    parser.add_argument("--model", default="minilm", help="a name or a folder")
    parser.add_argument("--examples", type=int, default=256, help="training examples")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns")
    parser.add_argument(
        "--output", type=Path, default=Path("results/benchmarks/head_preparation.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = take(load_task(options.task), options.examples)
    turns = [
        {
            "one": sum(probed(task, options.model, LENGTHS[-1:]).values()),
            "twelve": probed(task, options.model, LENGTHS),
        }
        for _ in range(options.repeats)
    ]
    one = statistics.median(turn["one"] for turn in turns)
    twelve = statistics.median(sum(turn["twelve"].values()) for turn in turns)
    later = [seconds for turn in turns for seconds in list(turn["twelve"].values())[1:]]
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
