"""How long it takes to plan a sweep of 500 runs, and what a run of a sweep costs over `lpft-nb run`.

.venv/bin/python benchmarks/sweep.py

Everything is measured in processes of their own, as a user starts them. The runs are linear probes on a few embedded
texts, so that what is around them is most of the time. Writes `results/benchmarks/sweep.json`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
GRID = {
    "experiment": "lp_ft",
    "task": "docstring-topic",
    "max_train": 16,
    "methods": ["LP"],
    "device": "cpu",
}
METHODS = ["LP", "FT", "LP-FT", "LoRA", "LP-LoRA"]


def seconds(folder: Path, *arguments: str) -> float:
    """Wall seconds of one call of the command line."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "lpft_nb", *arguments]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and write."""
    from lpft_nb.store.cache import write_atomically
    from lpft_nb.store.surroundings import environment

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = GRID | {"methods": METHODS, "seeds": list(range(25))}
        plan["axes"] = {"max_train": [plan.pop("max_train"), 32, 48, 64]}
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
        (folder / "six.yaml").write_text(yaml.safe_dump(GRID | {"seeds": list(range(6))}))
        (folder / "one.yaml").write_text(yaml.safe_dump(GRID | {"seeds": [0]}))
        seconds(folder, "run", "lp_ft", "-f", "one.yaml", "--output", "first")  # fills the cache
        plans = [seconds(folder, "sweep", "plan.yaml", "--dry-run") for _ in range(3)]
        alone = [
            seconds(folder, "run", "lp_ft", "-f", "one.yaml", "--output", f"run{number}")
            for number in range(3)
        ]
        one = seconds(folder, "sweep", "one.yaml", "--output", "sweep1")
        six = seconds(folder, "sweep", "six.yaml", "--output", "sweep6")
        parallel = seconds(folder, "sweep", "six.yaml", "--output", "sweep62", "--jobs", "2")
    found = {
        "plan_runs": 4 * 25 * len(METHODS),
        "plan_seconds": statistics.median(plans),
        "run_seconds": statistics.median(alone),
        "sweep_of_one_seconds": one,
        "sweep_of_six_seconds": six,
        "seconds_a_further_run": (six - one) / 5,
        "two_at_a_time_seconds": parallel,
        "surroundings": environment(),
    }
    text = json.dumps(found, indent=1)
    print(text)
    write_atomically(ROOT / "results" / "benchmarks" / "sweep.json", text.encode())


if __name__ == "__main__":
    main()
