"""All collapse metrics of one large set of features, beside the library neural-collapse on the same arrays; and what following collapse costs an epoch.

    python benchmarks/collapse.py

LPFT_NEURAL_COLLAPSE names a checkout of github.com/rhubarbwu/neural-collapse; without it ours is timed alone. --rows, --size and
--classes make another case. Wanted for 50,000 x 768 with 100 classes: under 5 s on two cores; for an epoch: under 5 %.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from measuring import Peak, interleaved
from threadpoolctl import threadpool_limits

from lpft_nb.classifier import Classifier
from lpft_nb.collapse import collapse_statistics, head_statistics, nearest_mean_agreement
from lpft_nb.features import feature_sums
from lpft_nb.store.cache import write_atomically
from lpft_nb.tasks import load_task
from lpft_nb.training.collapse_rows import MOST, FollowCollapse
from lpft_nb.training.loop import train
from lpft_nb.training.measuring import encode_split
from lpft_nb.training.stage import FineTune

SEED, BATCH, CHECKOUT = 0, 512, "LPFT_NEURAL_COLLAPSE"


def draw(rows: int, size: int, classes: int) -> tuple[torch.Tensor, ...]:
    """Float32 features about class means, labels, and a head that points at the means: (N, h), (N,), (K, h)."""
    generator = torch.Generator().manual_seed(SEED)
    means = torch.randn(classes, size, generator=generator)
    labels = torch.arange(rows) % classes
    features = torch.randn(rows, size, generator=generator).add_(means[labels])
    return features, labels, means + 0.5 * torch.randn(classes, size, generator=generator)


def ours(features: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> dict[str, float]:
    """Every metric of `lpft_nb.collapse`."""
    sums = feature_sums(features, labels=labels)
    logits = features @ head.T
    return {
        **collapse_statistics(sums),
        **head_statistics(sums, head, torch.zeros(len(head))),
        "nearest_mean_agreement": nearest_mean_agreement(features, logits, sums),
    }


def named(module, *names: str):
    """A function of the library under one of the names that it has had."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise SystemExit(f"{CHECKOUT}: {module.__name__} has none of {', '.join(names)}")


def library(checkout: str):
    """The same metrics by the library, as its README computes them: three passes over batches."""
    sys.path.insert(0, checkout)
    accumulate = importlib.import_module("neural_collapse.accumulate")
    measure = importlib.import_module("neural_collapse.measure")
    variances = named(accumulate, "VarNormAccumulator", "VarAccumulator")
    pinv = named(measure, "variability_pinv", "covariance_pinv")
    ratio = named(measure, "variability_ratio", "covariance_ratio")

    def run(features: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> dict[str, float]:
        size = dict(n_classes=len(head), d_vectors=features.shape[1])
        batches = list(zip(features.split(BATCH), labels.split(BATCH), strict=True))
        mean, norms = accumulate.MeanAccumulator(**size), variances(**size)
        spread, decisions = (
            accumulate.CovarAccumulator(**size),
            accumulate.DecAccumulator(**size),
        )
        for rows, classes in batches:
            mean.accumulate(rows, classes)
        means, middle = mean.compute()
        for rows, classes in batches:
            norms.accumulate(rows, classes, means)
            spread.accumulate(rows, classes, means)
        for rows, classes in batches:
            decisions.accumulate(rows, classes, means, head)
        inside = spread.compute()
        return {
            # Σ_B is divided by h there and by K here
            "nc1": float(pinv(M=means, V_intra=inside, m_G=middle)) * len(head) / features.shape[1],
            "nc1_quotient": float(ratio(M=means, V_intra=inside, m_G=middle))
            * len(head)
            / features.shape[1],
            "class_distance_variance": float(
                measure.variability_cdnv(V=norms.compute()[0], M=means)
            ),
            "nc2": float(measure.simplex_etf_error(means, middle)),
            "nc3": float(measure.self_duality_error(W=head, M=means, m_G=middle)),
            "nearest_mean_agreement": float(decisions.totals.sum() / len(features)),
        }

    return run


def compare(options: argparse.Namespace) -> list[dict]:
    """Seconds and memory of all metrics, and how far the library's numbers are from ours."""
    given = draw(options.rows, options.size, options.classes)
    work = {"lpft_nb": lambda: ours(*given)}
    checkout = os.environ.get(CHECKOUT)
    if checkout:
        theirs = library(checkout)
        work["neural-collapse"] = lambda: theirs(*given)
    seconds = {
        name: statistics.median(times)
        for name, times in interleaved(options.repeats, **work).items()
    }
    with Peak() as peak:
        values = {"lpft_nb": ours(*given)}
    case = f"{options.rows:,} x {options.size}, {options.classes} classes"
    rows = [
        {"what": f"all metrics of {case}, seconds (wanted: under 5)"}
        | {name: round(value, 3) for name, value in seconds.items()},
        {"what": "memory above the input, MiB", "lpft_nb": round(peak.bytes / 2**20, 1)},
        {"what": "the values"} | {name: float(one) for name, one in values["lpft_nb"].items()},
    ]
    if checkout:
        found, mine = theirs(*given), values["lpft_nb"]
        rows.append(
            {"what": "relative difference of the library's numbers"}
            | {name: abs(value / mine[name] - 1) for name, value in found.items()}
        )
        ratio = seconds["neural-collapse"] / seconds["lpft_nb"]
        rows.append({"what": "its time over ours", "ratio": round(ratio, 2)})
    else:
        rows.append({"what": f"the library was not compared: {CHECKOUT} names no checkout"})
    return rows


def timed_looks() -> list[float]:
    """Have every look of the callback note its seconds in the list that is returned."""
    found, look = [], FollowCollapse.look

    def timed(self, *given):
        start = time.perf_counter()
        look(self, *given)
        found.append(time.perf_counter() - start)

    FollowCollapse.look = timed
    return found


def follow(options: argparse.Namespace) -> dict:
    """One epoch of fine-tuning with collapse followed: seconds of the look at its end over those of its steps."""
    task = load_task(options.task)
    model = Classifier.from_pretrained(options.model, num_labels=task.num_labels, seed=SEED)
    data = encode_split(model, task.train, 128)
    looks, seconds = timed_looks(), []
    stage = FineTune(epochs=options.epochs, batch_size=16, collapse_share=MOST)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train(
            model,
            data,
            encode_split(model, task.validation.select(range(8)), 128),
            stage,
            seed=SEED,
            folder=Path(folder),
            minutes_between_checkpoints=math.inf,
        )
        seconds.append((time.perf_counter() - start - sum(looks)) / options.epochs)
    look = statistics.median(looks[1:])
    return {
        "what": f"following {MOST:.0%} of {len(data):,} examples of {options.task}, {options.model} (wanted: share under 0.05)",
        "seconds of an epoch": round(seconds[0], 3),
        "seconds of a look": round(look, 3),
        "share": round(look / seconds[0], 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000, help="examples (default 50,000)")
    parser.add_argument("--size", type=int, default=768, help="size of a feature (default 768)")
    parser.add_argument("--classes", type=int, default=100, help="classes (default 100)")
    parser.add_argument("--task", default="docstring-topic", help="of the followed epochs")
    parser.add_argument("--model", default="minilm", help="of the followed epochs")
    parser.add_argument("--epochs", type=int, default=3, help="followed epochs (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch and of BLAS")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/collapse.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        rows = [*compare(options), follow(options)]
    record = {
        "benchmark": "collapse",
        "command": f"python benchmarks/collapse.py --rows {options.rows} --size {options.size} "
        f"--classes {options.classes} --threads {options.threads} --repeats {options.repeats} "
        f"--task {options.task} --model {options.model} --epochs {options.epochs}",
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores",
        "threads": options.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "transformers")},
        "rows": rows,
    }
    for row in rows:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "what")
        print(f"  {row['what']}" + (f": {numbers}" if numbers else ""))
    write_atomically(options.output, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
