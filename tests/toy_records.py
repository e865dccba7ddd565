"""Toy records with made-up numbers, for the tests of whatever reads records."""

from lpft_nb import records

SURROUNDINGS = {"versions": {"torch": "0"}, "python": "3", "git_commit": None, "hardware": {}}


def make(
    method="LP-FT",
    seed=0,
    accuracy=0.8,
    task="toy",
    stages=None,
    status="finished",
    model="tiny",
    fingerprint="f0",
    pooling="mean",
    **parameters,
):
    stages = stages or {"LP": ["LP"], "FT": ["FT"], "LP-FT": ["LP", "FT"]}[method]
    metrics = [
        {
            "stage": stage,
            "split": split,
            "metric": metric,
            "value": accuracy - 0.1 * (len(stages) - 1 - place) - shift,
        }
        for place, stage in enumerate(stages)
        for split, shift in (("test", 0.0), ("ood/other", 0.3))
        for metric in ("accuracy",)
    ]
    return records.make_record(
        experiment="lp_ft", method=method, seed=seed, parameters={"max_train": 100, "epochs": 3, "learning_rate": 1e-5} | parameters,
        task={"name": task, "fingerprint": fingerprint, "sizes": {"train": 90}, "label_names": ["/a", "output"], "class_counts": {"output": 3}},
        model={"id": model, "revision": None, "sha256": "ab" * 32, "pooling": pooling, "max_length": 128},
        stages=[{"name": stage, "seconds": 1.5} for stage in stages], metrics=metrics,
        history=[{"stage": stages[-1], "step": step, "epoch": step / 3, "metric": "loss", "value": 1 / (1 + step)} for step in range(4)],
        wall_seconds=2.0, peak_memory_bytes=10, status=status, surroundings=SURROUNDINGS,
    )  # fmt: skip


def write_all(folder, values, **changes):
    for method, of_method in values.items():
        for seed, value in of_method.items():
            records.write_record(make(method, seed, value, **changes), None, folder)
    return records.load_results(folder)
