"""How long it takes to plan 500 runs, and to read 2,000 records from their JSON files and from the gathered table.

.venv/bin/python benchmarks/planning.py [repeats]

Nothing is trained. The plan is that of `lp_ft` on the embedded task with the embedded model: checked parameters, texts,
model file and the name of every run. The first call is what somebody waits for who asks for a dry run. The records are made up and lie in a
temporary folder; each has as many rows as the median published one.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RUNS, RECORDS, METRICS, HISTORY = 500, 2000, 195, 402
METHODS = ("LP", "FT", "LP-FT", "LoRA", "LP-LoRA")
SURROUNDINGS = {"versions": {"torch": "0"}, "python": "3", "git_commit": None, "hardware": {}}


def plan() -> int:
    """Plan the runs and return how many they are."""
    from lpft_nb.experiments import find_experiment

    experiment = find_experiment("lp_ft")
    seeds = list(range(RUNS // len(METHODS)))
    asked = {"methods": list(METHODS), "seeds": seeds, "device": "cpu", "output": "nowhere"}
    return len(experiment.plan(experiment.check(asked))[0])


def write_made_up_records(folder: Path) -> None:
    """One record after the other, of five methods and as many seeds as it takes."""
    from lpft_nb.records import make_record, write_record

    for number in range(RECORDS):
        method = METHODS[number % len(METHODS)]
        rows = [
            {"stage": method, "split": "test", "metric": f"metric_{row}", "value": row / METRICS}
            for row in range(METRICS)
        ]
        curve = [
            {"stage": method, "step": step, "epoch": step / 10, "metric": "loss", "value": 1.0}
            for step in range(HISTORY)
        ]
        record = make_record(
            experiment="lp_ft",
            method=method,
            seed=number // len(METHODS),
            parameters={"task": "made-up", "model": "made-up", "epochs": 1.0},
            task={"name": "made-up", "fingerprint": "0" * 16, "sizes": {"train": 100}},
            model={"id": "made-up", "revision": None, "sha256": None},
            stages=[{"name": method, "seconds": 1.0}],
            metrics=rows,
            history=curve,
            surroundings=SURROUNDINGS,
        )
        write_record(record, None, folder / "lp_ft")


def seconds(action: Callable[[], int], expected: int, repeats: int) -> float:
    """The median time of a call that must return an expected number."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = action()
        taken.append(time.perf_counter() - start)
        if found != expected:
            raise SystemExit(f"expected {expected}, got {found}")
    return round(statistics.median(taken), 2)


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    measured = {f"plan {RUNS} runs, first call with all imports": seconds(plan, RUNS, 1)}
    measured[f"plan {RUNS} runs"] = seconds(plan, RUNS, repeats)

    from lpft_nb.records import gather, load_results

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_made_up_records(folder)

        def load() -> int:
            return load_results(folder)["run_id"].nunique()

        measured[f"load {RECORDS} records, JSON"] = seconds(load, RECORDS, repeats)
        gather(folder)
        measured[f"load {RECORDS} records, gathered"] = seconds(load, RECORDS, repeats)
    print(json.dumps({"unit": "seconds", **measured}, indent=1))
