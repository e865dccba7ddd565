"""What an accuracy must beat on every task of paper A's grid: the largest class, and a bag of words.

LPFT_DATA=… .venv/bin/python benchmarks/floors.py

The bag is fitted on the same training texts as the runs of `sweeps/paper_a`. Chapters read the floors from
`results/benchmarks/floors.json`, because not every machine has the texts. Tasks that are not at hand are left out.
"""

import json
from pathlib import Path

import yaml

from lpft_nb.lab.first_results import bag_of_words_accuracy, majority_share
from lpft_nb.store.cache import write_atomically
from lpft_nb.tasks import TaskError, load_task, take

ROOT = Path(__file__).parents[1]


def floors_of(sweep: dict) -> dict:
    """Task, fingerprint of the texts, and both floors of every split that judges."""
    whole = load_task(sweep["task"], protocol=sweep.get("protocol", "default"))
    task = take(whole, sweep["max_train"])
    splits = ["test", *(f"ood/{name}" for name in task.ood)]
    words = bag_of_words_accuracy(task, splits)
    return {
        "task": task.name,
        "fingerprint": task.fingerprint,
        "train": len(task.train),
        "largest_class": {name: majority_share(task.class_counts[name]) for name in splits},
        "bag_of_words": words,
    }


def main() -> None:
    """Compute, print and write."""
    found = []
    for path in sorted((ROOT / "sweeps" / "paper_a").glob("*.yaml")):
        sweep = yaml.safe_load(path.read_text())
        if sweep["experiment"] != "lp_ft" or "model" in sweep:
            continue
        try:
            found.append(floors_of(sweep))
        except TaskError as error:
            print(f"{path.stem}: left out: {error}")
            continue
        print(json.dumps(found[-1]))
    target = ROOT / "results" / "benchmarks" / "floors.json"
    write_atomically(target, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
