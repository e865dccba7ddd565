"""Learning curves of real features: fits by another library, what is drawn, what a record holds, what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge

from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.lab.sample_size import (
    curve_rows,
    curves_of,
    fitted_accuracy,
    measured_curve,
    sample_of,
    sample_sizes,
)
from lpft_nb.records import load_results, read_record

SETTINGS = {"labelled": 20, "sizes": [6, 12, 40], "repeats": 4, "penalty": 0.02, "level": 0.95}


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    points = torch.randn(count, 8, generator=generator) + 1.5 * torch.eye(3, 8)[labels]
    return points, labels


def test_a_fit_is_scikit_learns_ridge():
    train, test = blobs(15, 0), blobs(60, 1)
    accuracy, error = fitted_accuracy(train, test, classes=3, penalty=0.3)
    marks = np.eye(3)[train[1].numpy()]
    priors = marks.mean(axis=0)
    ridge = Ridge(alpha=0.3 * 15, fit_intercept=False).fit(
        train[0].double().numpy(), marks - priors
    )
    scores = ridge.predict(test[0].double().numpy())
    assert accuracy == ((scores + priors).argmax(1) == test[1].numpy()).mean()
    truth = np.eye(3)[test[1].numpy()] - priors
    assert error == pytest.approx(((scores - truth) ** 2).sum() / (truth**2).sum())


def test_a_curve_is_a_mean_over_training_sets_that_the_seed_draws():
    train, test = blobs(90, 0), blobs(60, 1)
    ask = dict(sizes=[5, 90], repeats=3, classes=3, penalty=0.1)
    first, again, other = (measured_curve(train, test, **ask, seed=seed) for seed in (1, 1, 2))
    assert first == again and first[5] != other[5]
    whole = fitted_accuracy(train, test, classes=3, penalty=0.1)
    assert first[90] == pytest.approx(whole)  # all examples: every draw is the same set


def test_a_sample_has_two_classes():
    labels = torch.zeros(50, dtype=torch.long)
    labels[7] = 1
    assert 7 in sample_of(labels, 2, seed=0).tolist()
    assert sorted(sample_of(labels, 50, seed=0).tolist()) == list(range(50))
    for wrong in (labels[:7], labels[:3]):
        with pytest.raises(ParameterError, match="labelled=5"):
            sample_of(wrong, 5, seed=0)


def rows_of(seeds=2):
    rows = []
    for seed in range(seeds):
        found = curve_rows(blobs(90, 0), blobs(60, 1), settings=SETTINGS, classes=3, seed=seed)
        rows += [row | {"seed": seed} for row in found]
    return pd.DataFrame(rows)


def test_rows_hold_both_curves_and_the_level_is_read_off_them():
    metrics = rows_of()
    curves = curves_of(metrics)
    assert list(curves["examples"]) == [6, 12, 40] * 2
    assert curves["foreseen_accuracy"].between(0, 1).all()
    assert (curves["foreseen_error_low"] < curves["foreseen_error_high"]).all()
    assert set(metrics[metrics["metric"] == "constant_accuracy"]["value"]) == {20 / 60}
    level, size, found = sample_sizes(metrics, 0.5)
    means = curves.groupby("examples")["accuracy"].mean()
    assert level == pytest.approx((1 / 3 + means[40]) / 2)
    assert 6 <= size < 40 and np.interp(np.log(size), np.log(means.index), means) >= level - 1e-9
    assert len(found) == 2 and (found["earliest"] <= found["latest"]).all()


def test_a_size_beyond_the_training_set_is_refused():
    with pytest.raises(ParameterError, match=r"at most the 90 training examples, got \[91\]"):
        curve_rows(
            blobs(90, 0), blobs(60, 1), settings=SETTINGS | {"sizes": [91]}, classes=3, seed=0
        )


def test_a_sample_that_leaves_no_pool_is_refused():
    with pytest.raises(ParameterError, match="whose others make the pool"):
        everything = SETTINGS | {"labelled": 90}
        curve_rows(blobs(90, 0), blobs(60, 1), settings=everything, classes=3, seed=0)


def test_a_run_leaves_the_record_that_was_planned(toy_task, tiny_checkpoint, tmp_path):
    experiment = find_experiment("sample_size")
    request = dict(task=str(toy_task), model=str(tiny_checkpoint), output=str(tmp_path))
    request |= dict(labelled=6, sizes=[3, 4], repeats=2, seeds=[0], device="cpu", max_length=32)
    (run,), _ = experiment.plan(experiment.check(request))
    path = run.make(run)
    assert path == run.path and run.state == "finished"
    assert {row["metric"] for row in read_record(path)["metrics"]} >= set(experiment.metrics)
    assert set(curves_of(load_results([path]))["examples"]) == {3, 4}
    with pytest.raises(ParameterError, match="expected LP"):
        experiment.plan(experiment.check(request | {"methods": ["FT"]}))
