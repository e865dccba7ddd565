"""Bootstrap intervals: resamples made by hand, known intervals of means, coverage, and requests that must be refused."""

import math

import numpy as np
import pytest
from test_calibration import nature

import lpft_nb.bootstrap as bootstrap
from lpft_nb.bootstrap import (
    METRIC_NAMES,
    PUSHED_UP,
    bootstrap_intervals,
    interval,
    resample_counts,
    resampled_metrics,
)
from lpft_nb.calibration import Examples, calibration_metrics, per_example

COLUMNS = ["metric", "value", "low", "high", "n", "resamples"]


@pytest.mark.parametrize(("classes", "bins", "factor"), [(2, 15, 3.0), (4, 7, 1.0), (3, 50, 40.0)])
def test_every_metric_of_every_resample_against_repeated_rows(classes, bins, factor, monkeypatch):
    """Oracle: really repeat the rows as drawn and call the metrics; factor 40 makes many equal confidences of 1."""
    logits, labels = nature(60, 1, classes, factor)
    gathered = {}
    original = bootstrap.interval
    monkeypatch.setattr(
        bootstrap,
        "interval",
        lambda name, value, resampled, level: (
            gathered.update({name: resampled}) or original(name, value, resampled, level)
        ),
    )
    bootstrap_intervals(logits, labels, resamples=25, seed=3, bins=bins)
    order = per_example(logits, labels).confidence.argsort(kind="stable")
    counts = np.concatenate(list(resample_counts(60, 25, 3)))
    for row in range(25):
        drawn = np.repeat(order, counts[row])
        oracle = calibration_metrics(logits[drawn], labels[drawn], bins)
        assert {name: values[row] for name, values in gathered.items()} == pytest.approx(
            oracle, abs=1e-9, nan_ok=True
        )


def test_resamples_do_not_depend_on_memory(monkeypatch):
    logits, labels = nature(90, 2)
    whole = bootstrap_intervals(logits, labels, resamples=120)
    monkeypatch.setattr(bootstrap, "RESAMPLE_ENTRIES", 700)
    pieces = bootstrap_intervals(logits, labels, resamples=120)
    np.testing.assert_allclose(pieces[["low", "high"]], whole[["low", "high"]], atol=1e-12)
    assert all(len(block) <= 7 for block in resample_counts(90, 120, 0))
    assert sum(map(len, resample_counts(90, 120, 0))) == 120


def test_frame_has_fixed_columns_and_values_inside():
    logits, labels = nature(80, 3, factor=2.0)
    frame = bootstrap_intervals(logits, labels, resamples=100)
    assert list(frame.columns) == COLUMNS and tuple(frame["metric"]) == METRIC_NAMES
    assert dict(zip(frame["metric"], frame["value"])) == calibration_metrics(logits, labels)
    assert (frame["low"] <= frame["value"]).all() and (frame["value"] <= frame["high"]).all()
    assert (
        (frame["low"] < frame["high"]).all()
        and (frame["n"] == 80).all()
        and (frame["resamples"] == 100).all()
    )
    chosen = bootstrap_intervals(logits, labels, ["nll", "ece"], resamples=100)
    assert list(chosen["metric"]) == ["nll", "ece"]
    assert chosen.iloc[0]["low"] == frame.set_index("metric").loc["nll", "low"]
    again = bootstrap_intervals(logits, labels, resamples=100, seed=1)
    assert not np.allclose(again["low"], frame["low"])


def test_interval_of_a_mean_is_that_of_the_normal_approximation():
    logits, labels = nature(2000, 4)
    examples = per_example(logits, labels)
    row = bootstrap_intervals(logits, labels, ["nll"], resamples=2000).iloc[0]
    half = 1.96 * examples.nll.std() / math.sqrt(2000)
    assert row["low"] == pytest.approx(row["value"] - half, abs=0.12 * half)
    assert row["high"] == pytest.approx(row["value"] + half, abs=0.12 * half)
    narrow = bootstrap_intervals(logits, labels, ["nll"], resamples=2000, level=0.5).iloc[0]
    assert narrow["high"] - narrow["low"] == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.12)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    exact = calibration_metrics(*nature(300_000, 5, factor=3.0))
    held = {"overconfidence": 0, "ece": 0, "brier": 0}
    for run in range(60):
        frame = bootstrap_intervals(
            *nature(250, 900 + run, factor=3.0), list(held), resamples=200
        ).set_index("metric")
        for name in held:
            held[name] += frame.loc[name, "low"] <= exact[name] <= frame.loc[name, "high"]
    assert all(50 <= count <= 60 for count in held.values()), held


def test_basic_interval_for_errors_that_noise_pushes_up():
    resampled = np.linspace(0.1, 0.3, 1001)
    assert interval("ece", 0.15, resampled, 0.9) == pytest.approx((0.01, 0.19))
    assert interval("nll", 0.15, resampled, 0.9) == pytest.approx((0.11, 0.29))
    assert interval("ece", 0.05, resampled, 0.9)[0] == 0.0  # cut at 0 …
    assert interval("ece", 0.05, resampled, 0.9)[1] == 0.05  # … and widened to hold the value
    assert {"ece", "adaptive_ece", "classwise_ece", "mce", "smooth_ece"} == PUSHED_UP


def test_nan_stays_nan():
    logits, _ = nature(40, 6)
    frame = bootstrap_intervals(logits, logits.argmax(1), resamples=20).set_index("metric")
    assert frame.loc["confidence_auroc", ["value", "low", "high"]].isna().all()
    assert frame.drop(index="confidence_auroc")[["low", "high"]].notna().all().all()


def test_resampled_metrics_computes_what_is_asked():
    examples = per_example(*nature(30, 7))
    order = examples.confidence.argsort()
    ordered = Examples(*(column[order] for column in examples))
    found = resampled_metrics(ordered, np.ones((2, 30), dtype=np.int64), 15, {"ece"})
    assert set(found) == {"ece"} and found["ece"].shape == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["ecee"]}, "did you mean 'ece'"),
        ({"metrics": "nlll"}, "did you mean 'nll'"),
        ({"resamples": 0}, "resamples"),
        ({"resamples": 2.5}, "resamples"),
        ({"level": 95}, "level"),
        ({"bins": 0}, "bins"),
    ],
)
def test_wrong_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(*nature(30, 8), **options)


def test_wrong_data_and_too_large_tables_are_refused(monkeypatch):
    logits, labels = nature(30, 9)
    with pytest.raises(ValueError, match="probabilities"):
        bootstrap_intervals(logits.softmax(1), labels)
    monkeypatch.setattr(bootstrap, "LARGEST_CLASSWISE", 80)
    with pytest.raises(ValueError, match="leave it out"):
        bootstrap_intervals(logits, labels, resamples=5)
    assert len(bootstrap_intervals(logits, labels, ["ece", "smooth_ece"], resamples=5)) == 2
