"""How far a run by two processes is from the same run by one: `lp_ft` with and without dropout, and `tangent_kernel`.

.venv/bin/python benchmarks/several_processes.py

Both are started as a user starts them, the two by torchrun, on the processor. Nothing is timed. Writes
`results/benchmarks/several_processes.json`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TRAINING = {"methods": ["FT", "LP-FT"], "max_train": 32, "max_length": 32}
KERNEL = {"methods": ["FT", "LP-FT"], "max_train": 32, "max_kernel_train": 8, "max_test": 8}
CASES = {  # experiment, whether the model has dropout, parameters
    "training": ("lp_ft", False, TRAINING),
    "training with dropout": ("lp_ft", True, TRAINING),
    "kernel": ("tangent_kernel", False, KERNEL),
}


def models(folder: Path) -> dict[bool, Path]:
    """The embedded model, saved with dropout as it comes and without any."""
    from lpft_nb.classifier import Classifier
    from lpft_nb.tasks import load_task

    classes = load_task("docstring-topic").num_labels
    for name, rate in (("dropout", None), ("none", 0.0)):
        model = Classifier.from_pretrained("minilm", num_labels=classes, head_dropout=rate)
        model.save_pretrained(folder / name)
    path = folder / "none" / "config.json"
    text = path.read_text()
    for part in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        text = text.replace(f'"{part}": 0.1', f'"{part}": 0.0')
    path.write_text(text)
    return {True: folder / "dropout", False: folder / "none"}


def made(launcher: list[str], experiment: str, request: dict) -> list[Path]:
    """The records of an experiment that was started from the command line."""
    output = Path(request["output"])
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(request))
    command = [sys.executable, *launcher, "-m", "lpft_nb", "run", experiment, "-f", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sorted((output / experiment).glob("*.json"))


def furthest(one: list[Path], two: list[Path]) -> float:
    """Largest distance between arrays of the two, relative to their norm; places are left out."""
    from lpft_nb.records import load_arrays, read_record

    found = []
    for paths in zip(one, two, strict=True):
        arrays = [load_arrays(read_record(path), path.parents[1]) for path in paths]
        for name, first in arrays[0].items():
            if name.startswith(("logits", "spectrum", "heat/P", "heat/F")):
                difference = (arrays[1][name] - first).double()
                found.append(float(torch.linalg.norm(difference) / first.double().norm()))
    return max(found)


def main() -> None:
    """Measure, print and write."""
    from lpft_nb.store.cache import write_atomically
    from lpft_nb.store.surroundings import environment

    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        saved = models(folder)
        for case, (experiment, dropout, parameters) in CASES.items():
            request = parameters | {"model": str(saved[dropout]), "device": "cpu"}
            sides = [
                made(launcher, experiment, request | {"output": str(folder / f"{case} {who}")})
                for who, launcher in (("one", []), ("two", TORCHRUN))
            ]
            found[case] = furthest(*sides)
    found["surroundings"] = environment()
    text = json.dumps(found, indent=1)
    print(text)
    path = ROOT / "results" / "benchmarks" / "several_processes.json"
    write_atomically(path, text.encode())


if __name__ == "__main__":
    main()
