"""Calibration metrics: closed forms, plain loops in float64, torchmetrics and netcal, properties, and input that must be refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import lpft_nb.calibration as calibration
from lpft_nb.calibration import (
    BLOCK_ENTRIES,
    adaptive_calibration_error,
    brier,
    calibration_metrics,
    classwise_calibration_error,
    confidence_auroc,
    debiased_calibration_error,
    debiased_squared_calibration_error,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    negative_log_likelihood,
    overconfidence,
    per_example,
    risk_coverage,
    smooth_calibration_error,
    top_label,
    top_label_brier,
)

SINGLE = {
    "ece": expected_calibration_error,
    "adaptive_ece": adaptive_calibration_error,
    "classwise_ece": classwise_calibration_error,
    "debiased_ece": debiased_calibration_error,
    "mce": maximum_calibration_error,
    "smooth_ece": smooth_calibration_error,
    "brier": brier,
    "top_label_brier": top_label_brier,
    "nll": negative_log_likelihood,
    "overconfidence": overconfidence,
    "confidence_auroc": confidence_auroc,
    "area_under_risk_coverage": lambda logits, labels: risk_coverage(logits, labels).area,
    "mean_confidence": lambda logits, labels: float(top_label(logits, labels)[0].mean()),
}


def nature(
    rows: int, seed: int, classes: int = 3, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right for factor 1, and labels drawn from the right probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return factor * logits, logits.softmax(1).multinomial(1, generator=generator).flatten()


def plain_error(probability: np.ndarray, truth: np.ndarray, bins: int) -> tuple[float, float]:
    """ECE and MCE by their definition, bin by bin, (lo, hi]."""
    expected, largest = 0.0, 0.0
    for index in range(bins):
        inside = (probability > index / bins) & (probability <= (index + 1) / bins)
        if inside.any():
            gap = abs(probability[inside].mean() - truth[inside].mean())
            expected, largest = expected + inside.mean() * gap, max(largest, gap)
    return expected, largest


# --- oracles


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(("classes", "bins"), [(2, 15), (3, 10), (7, 4)])
def test_every_metric_against_a_plain_loop(classes, bins, factor):
    logits, labels = nature(400, 1, classes, factor)
    p = logits.softmax(1).numpy()
    one_hot = np.eye(classes)[labels]
    confidence, correct = p.max(1), (p.argmax(1) == labels.numpy()).astype(float)
    expected, largest = plain_error(confidence, correct, bins)
    found = calibration_metrics(logits, labels, bins)
    assert set(found) == set(SINGLE)
    order = np.argsort(confidence)
    parts = np.split((confidence - correct)[order], np.arange(1, bins) * 400 // bins)
    errors = 1 - correct[order][::-1]
    square = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if inside.sum() > 1:
            accuracy, n = correct[inside].mean(), inside.sum()
            square += (
                n
                / 400
                * (
                    (confidence[inside].mean() - accuracy) ** 2
                    - accuracy * (1 - accuracy) / (n - 1)
                )
            )
    right, wrong = confidence[correct == 1], confidence[correct == 0]
    oracle = {
        "ece": expected,
        "mce": largest,
        "adaptive_ece": sum(abs(part.sum()) for part in parts) / 400,
        "classwise_ece": np.mean(
            [plain_error(p[:, k], one_hot[:, k], bins)[0] for k in range(classes)]
        ),
        "debiased_ece": math.sqrt(max(0, square)),
        "brier": ((p - one_hot) ** 2).sum(1).mean(),
        "top_label_brier": ((confidence - correct) ** 2).mean(),
        "nll": -np.log(p[np.arange(400), labels]).mean(),
        "overconfidence": confidence.mean() - correct.mean(),
        "mean_confidence": confidence.mean(),
        "confidence_auroc": (right[:, None] > wrong).mean(),
        "area_under_risk_coverage": (errors.cumsum() / np.arange(1, 401)).mean(),
    }
    for name, value in oracle.items():
        assert found[name] == pytest.approx(value, abs=1e-10), name
    assert debiased_squared_calibration_error(logits, labels, bins) == pytest.approx(
        square, abs=1e-12
    )


def test_smooth_error_is_the_fixed_point_of_the_reflected_gaussian():
    """Oracle: the integral of the mirrored kernel sum, by a fine grid, without any transform."""
    for seed, factor in ((0, 1.0), (1, 3.0), (2, 0.3)):
        logits, labels = nature(150, seed, factor=factor)
        confidence, correct = top_label(logits, labels)
        found = smooth_calibration_error(logits, labels)
        points = (np.arange(3000) + 0.5) / 3000
        kernel = sum(
            np.exp(-((points[:, None] - 2 * k - side * confidence) ** 2) / (2 * found**2))
            for k in (-1, 0, 1)
            for side in (-1, 1)
        )
        smoothed = np.abs(kernel @ (confidence - correct)).mean() / (
            150 * found * math.sqrt(2 * math.pi)
        )
        assert smoothed == pytest.approx(found, abs=5e-4)


def test_values_by_hand():
    logits = torch.tensor(
        [[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]], dtype=torch.float64
    ).log()
    labels = torch.tensor(
        [0, 0, 1, 0]
    )  # in (0.7, 0.8]: 0.8 against 1; in (0.5, 0.6]: 0.6 against 1/2
    found = calibration_metrics(logits + 1e-9, labels, bins=4)
    assert found["ece"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)
    assert found["mce"] == pytest.approx(0.2)
    assert found["overconfidence"] == pytest.approx(0.7 - 0.75)
    assert found["brier"] == pytest.approx((2 * 0.04 * 2 + 2 * 0.16 + 2 * 0.36) / 4)
    assert found["top_label_brier"] == pytest.approx((2 * 0.04 + 0.16 + 0.36) / 4)
    assert found["nll"] == pytest.approx(-(2 * math.log(0.8) + math.log(0.6) + math.log(0.4)) / 4)
    assert found["confidence_auroc"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["area_under_risk_coverage"] == pytest.approx((0 + 0 + (1 / 3 + 0) / 2 + 1 / 4) / 4)
    assert found["debiased_ece"] == pytest.approx(
        math.sqrt(0.5 * 0.04 + 0.5 * (0.01 - 0.25)) if 0.02 - 0.12 > 0 else 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_class_number(dtype):
    logits = torch.tensor(
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 1.0, 1.0]], dtype=dtype
    )
    labels = torch.tensor([0, 1, 2, 0])
    assert (
        top_label(logits, labels)[1].tolist()
        == per_example(logits, labels).correct.tolist()
        == [1, 0, 0, 1]
    )


def test_ece_against_torchmetrics():
    functional = pytest.importorskip(
        "torchmetrics.functional.classification",
        reason="torchmetrics (extra `dev`) is not installed",
    )
    for classes, factor in ((2, 1.0), (5, 3.0)):
        logits, labels = nature(500, 3, classes, factor)
        for bins in (10, 15):
            for ours, norm in (
                (expected_calibration_error, "l1"),
                (maximum_calibration_error, "max"),
            ):
                theirs = functional.multiclass_calibration_error(
                    logits, labels, classes, bins, norm
                ).item()
                assert ours(logits, labels, bins) == pytest.approx(theirs, abs=1e-6)


def test_binned_errors_against_netcal():
    metrics = pytest.importorskip("netcal.metrics", reason="netcal is not installed")
    for classes, factor in ((2, 1.0), (5, 3.0)):
        logits, labels = nature(600, 4, classes, factor)
        p = logits.softmax(1).numpy() if classes > 2 else logits.softmax(1)[:, 1].numpy()
        if classes > 2:
            assert expected_calibration_error(logits, labels, 15) == pytest.approx(
                metrics.ECE(15).measure(p, labels.numpy()), abs=1e-9
            )
            assert maximum_calibration_error(logits, labels, 15) == pytest.approx(
                metrics.MCE(15).measure(p, labels.numpy()), abs=1e-9
            )
        else:  # netcal bins the probability of class 1; so does one class of ours
            assert classwise_calibration_error(logits, labels, 16) == pytest.approx(
                metrics.ECE(16).measure(p, labels.numpy()), abs=1e-9
            )


def test_scores_against_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    logits, labels = nature(300, 5, classes=2)
    p = logits.softmax(1).numpy()
    confidence, correct = top_label(logits, labels)
    assert negative_log_likelihood(logits, labels) == pytest.approx(log_loss(labels, p))
    assert brier(logits, labels) == pytest.approx(2 * brier_score_loss(labels, p[:, 1]))
    assert confidence_auroc(logits, labels) == pytest.approx(roc_auc_score(correct, confidence))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_any_type_gives_the_value_of_its_own_numbers(dtype):
    logits, labels = nature(300, 6)
    logits = (3 * logits).to(dtype)
    found, expected = (
        calibration_metrics(logits, labels),
        calibration_metrics(logits.double(), labels),
    )
    assert found == expected
    assert calibration_metrics(logits.double().numpy(), labels.numpy()) == expected


def test_blocks_change_nothing(monkeypatch):
    logits, labels = nature(157, 7)
    whole = calibration_metrics(logits, labels)
    monkeypatch.setattr(calibration, "BLOCK_ENTRIES", 12)
    in_blocks = calibration_metrics(logits, labels)
    assert in_blocks == pytest.approx(whole, abs=1e-13)
    monkeypatch.setattr(calibration, "BLOCK_ENTRIES", 1)
    assert calibration_metrics(logits, labels) == pytest.approx(whole, abs=1e-13)


def test_no_float64_copy_of_all_logits_is_made(monkeypatch):
    largest = []
    for name in ("to", "double", "exp", "max", "softmax"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, original=original, **k: (
                largest.append(self.numel()),
                original(self, *a, **k),
            )[1],
        )
    monkeypatch.setattr(calibration, "BLOCK_ENTRIES", 2**14)
    logits, labels = nature(3000, 8, classes=40)
    largest.clear()
    calibration_metrics(logits.float().numpy(), labels)
    assert len(largest) > 8 and max(largest) <= calibration.BLOCK_ENTRIES


# --- the rates of a perfect model


def test_perfect_model_has_a_debiased_square_of_zero_and_a_plain_error_that_falls_slowly():
    squares, plain = {}, {}
    for n in (100, 1600):
        runs = [nature(n, 1000 + run) for run in range(150)]
        squares[n] = np.array([debiased_squared_calibration_error(*run) for run in runs])
        plain[n] = np.mean([expected_calibration_error(*run) for run in runs])
        assert abs(squares[n].mean()) < 4 * squares[n].std() / math.sqrt(150)
    assert 3 < plain[100] / plain[1600] < 5  # 1 / √N: a factor of 4
    assert 8 < squares[100].std() / squares[1600].std() < 32  # 1 / N: a factor of 16
    assert plain[1600] > 10 * abs(squares[1600].mean())


def test_miscalibration_is_found_without_bias():
    big = nature(400_000, 9, factor=3.0)
    true = debiased_squared_calibration_error(*big)
    runs = np.array(
        [
            debiased_squared_calibration_error(*nature(300, 2000 + run, factor=3.0))
            for run in range(150)
        ]
    )
    assert abs(runs.mean() - true) < 4 * runs.std() / math.sqrt(150)


# --- properties

CASES = st.integers(2, 5).flatmap(
    lambda classes: st.integers(2, 40).flatmap(
        lambda rows: st.tuples(
            arrays(
                np.float64,
                (rows, classes),
                elements=st.floats(-20, 20).map(lambda value: round(value, 3) + 0.0007),
            ),
            arrays(np.int64, (rows,), elements=st.integers(0, classes - 1)),
        )
    )
)


@settings(deadline=None, max_examples=60)
@given(CASES, st.sampled_from([1, 4, 15]))
def test_binned_errors_against_a_search_among_the_edges_and_what_follows_from_them(case, bins):
    found = calibration_metrics(*case, bins)
    confidence, correct = top_label(*case)
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    gaps, counts = np.zeros(bins), np.zeros(bins)
    for place, gap in zip(np.searchsorted(inner, confidence), confidence - correct, strict=True):
        gaps[place] += gap
        counts[place] += 1
    assert found["ece"] == pytest.approx(np.abs(gaps).sum() / len(confidence), abs=1e-12)
    assert found["mce"] == pytest.approx((np.abs(gaps) / counts.clip(1)).max(), abs=1e-12)
    # one bin leaves the signed difference of means; more bins can only raise the error
    signed = abs(found["overconfidence"])
    assert expected_calibration_error(*case, bins=1) == pytest.approx(signed, abs=1e-12)
    assert signed <= min(found["ece"], found["adaptive_ece"]) + 1e-12
    assert found["ece"] <= found["mce"] + 1e-12
    assert found["top_label_brier"] <= found["brier"] + 1e-12


@settings(deadline=None, max_examples=60)
@given(CASES)
def test_errors_of_answers_that_are_all_right_or_all_wrong(case):
    """Every bin errs to the same side, so every kind of bins gives the mean distance from 1 or 0."""
    logits, _ = case
    answers, classes = logits.argmax(1), logits.shape[1]
    for labels, expected in (
        (answers, 1 - top_label(logits, answers)[0].mean()),
        ((answers + 1) % classes, top_label(logits, answers)[0].mean()),
    ):
        found = calibration_metrics(logits, labels)
        assert found["ece"] == pytest.approx(expected, abs=1e-12)
        assert found["adaptive_ece"] == pytest.approx(expected, abs=1e-12)
        assert math.isnan(found["confidence_auroc"])
        assert found["area_under_risk_coverage"] == pytest.approx(float(labels is not answers))


@settings(deadline=None, max_examples=60)
@given(CASES, st.floats(-50, 50), st.randoms(use_true_random=False))
def test_constants_and_the_names_of_classes_do_not_matter(case, constant, random):
    logits, labels = case
    # keep away from bin edges and ties, where rounding decides
    p = torch.from_numpy(logits).softmax(1).numpy()
    p_sorted = np.sort(p, axis=1)
    if (
        np.abs(p * 15 - np.round(p * 15)).min() < 1e-6
        or (p_sorted[:, -1] - p_sorted[:, -2]).min() < 1e-9
    ):
        return
    if np.diff(np.sort(p.max(1))).min(initial=1) < 1e-9:
        return
    whole = calibration_metrics(logits, labels)
    shifts = constant * np.arange(len(labels))[:, None] / len(labels)
    assert calibration_metrics(logits + shifts, labels) == pytest.approx(
        whole, abs=1e-8, nan_ok=True
    )
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    renamed = np.argsort(order)[labels]
    assert calibration_metrics(logits[:, order], renamed) == pytest.approx(
        whole, abs=1e-8, nan_ok=True
    )


@settings(deadline=None, max_examples=40)
@given(CASES, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter_even_with_equal_confidences(case, random):
    logits, labels = (
        np.concatenate([case[0], case[0]]),
        np.concatenate([case[1], (case[1] + 1) % case[0].shape[1]]),
    )
    order = list(range(len(labels)))
    random.shuffle(order)
    whole = calibration_metrics(logits, labels)
    assert calibration_metrics(logits[order], labels[order]) == pytest.approx(
        whole, abs=1e-9, nan_ok=True
    )


def test_confidence_measures_ignore_a_temperature_for_two_classes():
    logits, labels = nature(200, 10, classes=2)
    one, other = calibration_metrics(logits, labels), calibration_metrics(logits / 2.5, labels)
    for name in ("confidence_auroc", "area_under_risk_coverage"):
        assert one[name] == pytest.approx(other[name], abs=1e-12)


# --- faults


@pytest.mark.parametrize("metric", SINGLE)
def test_input_that_allows_no_number_is_refused(metric):
    logits, labels = nature(20, 11)
    function = SINGLE[metric]
    hole, pit = logits.clone(), logits.clone()
    hole[17, 1], pit[3, 0] = torch.nan, -torch.inf
    faults = [
        (logits.softmax(1), labels, "probabilities"),
        (torch.eye(3)[labels], labels, "probabilities"),
        (hole, labels, "NaN or infinity, first in row 17"),
        (pit, labels, "NaN or infinity, first in row 3"),
        (logits[:, :1], labels, "two classes"),
        (logits[:0], labels[:0], "empty"),
        (logits[0], labels[:1], r"\(N, C\)"),
        (logits, labels + 1, r"0\.\.2"),
        (logits, labels - 1, r"0\.\.2"),
        (logits, labels[:5], "shape"),
        (logits, labels.double(), "integers"),
    ]
    for wrong_logits, wrong_labels, message in faults:
        with pytest.raises(ValueError, match=message):
            function(wrong_logits, wrong_labels)


@pytest.mark.parametrize("bins", [0, -3, 2.5, True, "15"])
def test_bins_must_be_a_positive_integer(bins):
    logits, labels = nature(20, 12)
    for function in (
        expected_calibration_error,
        maximum_calibration_error,
        adaptive_calibration_error,
        classwise_calibration_error,
        debiased_calibration_error,
        calibration_metrics,
    ):
        with pytest.raises(ValueError, match="bins must be a positive integer"):
            function(logits, labels, bins)


def test_one_row_of_logits_that_sums_to_one_is_no_probability():
    logits, labels = nature(20, 13)
    logits[4] = torch.tensor([0.2, 0.3, 0.5])
    assert 0 <= expected_calibration_error(logits, labels) <= 1


def test_all_right_or_all_wrong_has_no_auroc():
    logits, _ = nature(20, 14)
    assert math.isnan(confidence_auroc(logits, logits.argmax(1)))
    assert math.isnan(calibration_metrics(logits, logits.argmin(1))["confidence_auroc"])
    assert risk_coverage(logits, logits.argmax(1)).area == 0
    assert risk_coverage(logits, logits.argmin(1)).area == pytest.approx(1)


def test_huge_logits_stay_finite():
    logits, labels = nature(50, 15)
    found = calibration_metrics(1e30 * logits, labels)
    assert all(math.isfinite(value) for name, value in found.items() if name != "confidence_auroc")
    assert found["mean_confidence"] == 1
    assert per_example(1e30 * logits, labels).nll.max() > 1e29


def test_temperature_is_reachable_from_calibration():
    from lpft_nb.temperature import fit_temperature as the_same

    assert fit_temperature is the_same


@pytest.mark.parametrize(
    "index", [range(100, 130), [f"u{n}" for n in range(30)], [7 * n % 30 for n in range(30)]]
)
def test_series_and_frames_are_taken_by_position(index):
    import pandas

    from lpft_nb.calibration import expected_calibration_error

    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    labels = [number % 3 for number in range(30)]
    right = expected_calibration_error(logits, labels)
    series, frame = (
        pandas.Series(labels, index=index),
        pandas.DataFrame(logits.numpy(), index=index),
    )
    assert expected_calibration_error(logits, series) == right
    assert expected_calibration_error(frame, series) == right
    with pytest.raises(ValueError, match="labels must be numbers, got"):
        expected_calibration_error(logits, series.map({0: "a", 1: "b", 2: "c"}))


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("extra", [1, 7])
def test_probabilities_are_refused_however_the_blocks_fall(scale, extra):
    rows = BLOCK_ENTRIES // 2 + extra
    probabilities = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0))
    table = scale * torch.cat([probabilities, 1 - probabilities], dim=1)
    table[0] = scale * torch.tensor([0.994, 0.0])
    with pytest.raises(ValueError, match="look like probabilities"):
        expected_calibration_error(table, torch.zeros(rows, dtype=torch.long))
