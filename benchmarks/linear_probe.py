"""The linear probe against scikit-learn's LogisticRegressionCV, same features, grid and folds, in one run.

    python benchmarks/linear_probe.py --data DIR --model minilm

DIR holds rte/ (or set LPFT_DATA). Without it, random features of the same shape are used, and the record says so.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from measuring import interleaved
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from lpft_nb.store.cache import write_atomically
from lpft_nb.linear_probe import cross_validate, fit_logistic, fit_probe, probe_path

SHAPE, FOLDS, SEED = (2241, 384), 5, 0


def load_features(data: str | None, model_name: str) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Features of RTE's training split (paper protocol) where the data is at hand, else random ones."""
    if data is None or not (Path(data) / "rte").is_dir():
        generator = torch.Generator().manual_seed(SEED)
        features = torch.randn(*SHAPE, generator=generator)
        return (
            features,
            torch.arange(SHAPE[0]) % 2,
            f"random features of shape {SHAPE}, not RTE: well conditioned, so the ratio does not carry over",
        )
    from lpft_nb.classifier import Classifier, features_of
    from lpft_nb.tasks import load_task

    task = load_task(str(Path(data) / "rte"), protocol="paper")
    model = Classifier.from_pretrained(model_name, num_labels=task.num_labels)
    features = features_of(model, task.train)
    return (
        features,
        torch.tensor(task.train["label"]),
        f"RTE features of {model_name}, shape {tuple(features.shape)}",
    )


def scikit_learn(features: np.ndarray, labels: np.ndarray) -> LogisticRegressionCV:
    """Its defaults, with our folds; the arguments of the last line only keep its warnings away."""
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    probe = LogisticRegressionCV(
        Cs=10,
        cv=folds,
        solver="lbfgs",
        tol=1e-4,
        max_iter=100,
        scoring="accuracy",
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # its default of 100 iterations is not enough here
        return probe.fit(features, labels)


def objective_gap(features: torch.Tensor, labels: torch.Tensor, penalty: float) -> float:
    """Our objective relative to scikit-learn's at tolerance 1e-10, minus one."""
    array = features.double().numpy()
    oracle = LogisticRegression(C=penalty, tol=1e-10, max_iter=100_000).fit(array, labels.numpy())
    loss = -oracle.predict_log_proba(array)[np.arange(len(array)), labels.numpy()].sum()
    theirs = penalty * loss + 0.5 * np.square(oracle.coef_).sum()
    return fit_logistic(features, labels, penalty).objective / theirs - 1


def measure(features, labels, epochs: int, repeats: int) -> list[dict]:
    """One row a quantity: ours, scikit-learn's, their ratio."""
    array, targets = features.double().numpy(), labels.numpy()
    seconds = interleaved(
        repeats,
        ours=lambda: fit_probe(features, labels, folds=FOLDS, seed=SEED),
        theirs=lambda: scikit_learn(array, targets),
        path=lambda: probe_path(features, labels, epochs, learning_rate=0.01),
    )
    ours, theirs, path = (statistics.median(seconds[name]) for name in ("ours", "theirs", "path"))
    validation, oracle = cross_validate(features, labels, seed=SEED), scikit_learn(array, targets)
    rows = [
        {
            "what": "cross-validated probe, seconds",
            "lpft_nb": round(ours, 4),
            "scikit-learn": round(theirs, 4),
            "ratio": round(theirs / ours, 2),
        },
        {"what": "full-batch gradient epochs a second", "lpft_nb": round(epochs / path, 1)},
        {
            "what": "chosen penalty",
            "lpft_nb": validation.best_penalty,
            "scikit-learn": float(np.squeeze(oracle.C_)),
        },
        {
            "what": "largest difference of a mean held-out accuracy",
            "lpft_nb": float(
                np.abs(
                    validation.accuracy.mean(1).numpy() - np.squeeze(oracle.scores_).mean(0)
                ).max()
            ),
        },
    ]
    for penalty in (1e-4, validation.best_penalty, 1e4):
        rows.append(
            {
                "what": f"objective at penalty {penalty:.3g}, relative to tolerance 1e-10, minus 1",
                "lpft_nb": objective_gap(features, labels, penalty),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        default=os.environ.get("LPFT_DATA"),
        help="folder that holds rte/ (default: LPFT_DATA)",
    )
    parser.add_argument("--model", default="minilm", help="what Classifier.from_pretrained takes")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch and of scikit-learn's BLAS (default 1)",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="measured rounds; medians are reported"
    )
    parser.add_argument("--epochs", type=int, default=500, help="epochs of the gradient path")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/linear_probe.json"))
    options = parser.parse_args()
    features, labels, description = load_features(options.data, options.model)
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        rows = measure(features, labels, options.epochs, options.repeats)
    record = {
        "benchmark": "linear_probe",
        "command": f"python benchmarks/linear_probe.py --data DIR --model {options.model} --threads {options.threads} --repeats {options.repeats}",
        "features": description,
        "machine": f"{platform.machine()}, {os.cpu_count()} logical cores",
        "threads": options.threads,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "scikit-learn", "numpy")},
        "rows": rows,
    }
    print(description)
    for row in rows:
        numbers = ", ".join(
            f"{key} {value:.4g}"
            for key, value in row.items()
            if key != "what" and math.isfinite(value)
        )
        print(f"  {row['what']}: {numbers}")
    write_atomically(options.output, (json.dumps(record, indent=1) + "\n").encode())
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
