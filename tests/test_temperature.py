"""Repairs: exact optima against oracles, guarantees on the fitting split, bounds, guards, and the scaled head."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, minimize_scalar
from test_calibration import nature
from torch.testing import assert_close

from lpft_nb.calibration import (
    calibration_metrics,
    expected_calibration_error,
    negative_log_likelihood,
)
from lpft_nb.temperature import (
    REPAIRS,
    BoundedTemperatureWarning,
    CalibrationError,
    Temperature,
    fit_isotonic,
    fit_matrix_scaling,
    fit_scaling,
    fit_temperature,
    fit_vector_scaling,
    repair,
    slope_and_curvature,
    temperature_scaling,
)


def nll(logits, labels) -> float:
    return torch.nn.functional.cross_entropy(
        torch.as_tensor(logits).double(), torch.as_tensor(labels)
    ).item()


# --- the temperature


@pytest.mark.parametrize("factor", [1e-4, 0.3, 1.0, 7.0, 1e5])
@pytest.mark.parametrize("classes", [2, 5])
def test_temperature_against_scipy(classes, factor):
    logits, labels = nature(300, 1, classes, factor)
    found = temperature_scaling(logits, labels)
    root = brentq(
        lambda log: slope_and_curvature(logits, labels, math.exp(log) / factor)[0],
        -5,
        5,
        xtol=1e-13,
    )
    assert not found.bounded and found.temperature == pytest.approx(
        factor / math.exp(root), rel=1e-10
    )
    lowest = minimize_scalar(
        lambda log: nll(logits / (factor * math.exp(log)), labels),
        bounds=(-3, 3),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert nll(logits / found.temperature, labels) <= lowest.fun + 1e-13


def test_temperature_by_hand():
    logits = torch.tensor(
        [[0.5, -0.5]] * 4, dtype=torch.float64
    )  # right 3 times in 4: log 3 = 1 / T
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(
        1 / math.log(3), rel=1e-12
    )


def test_derivatives_against_autograd():
    logits, labels = nature(50, 2, 4)
    beta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(beta * logits, labels), beta, create_graph=True
    )
    (second,) = torch.autograd.grad(first, beta)
    assert slope_and_curvature(logits, labels, 0.6) == pytest.approx(
        (first.item(), second.item()), rel=1e-10
    )


def test_one_wrong_answer_in_a_thousand_has_a_temperature():
    logits = torch.tensor([[40.0, 0.0]] * 1000 + [[1e-3, 0.0]], dtype=torch.float64)
    found = temperature_scaling(logits, torch.tensor([0] * 1000 + [1]))
    slope = slope_and_curvature(logits, torch.tensor([0] * 1000 + [1]), 1 / found.temperature)[0]
    assert not found.bounded and abs(slope) < 1e-12


CASES = st.integers(2, 4).flatmap(
    lambda classes: st.integers(4, 30).flatmap(
        lambda rows: st.tuples(
            arrays(np.float64, (rows, classes), elements=st.floats(-30, 30)),
            arrays(np.int64, (rows,), elements=st.integers(0, classes - 1)),
        )
    )
)


def usable(case) -> bool:
    logits, labels = case
    spread = logits.max(1) - logits.min(1)
    return (
        len(set(labels.tolist())) > 1 and spread.max() > 1e-3 and not np.allclose(logits.sum(1), 1)
    )


@settings(deadline=None, max_examples=80)
@given(CASES)
def test_properties_of_the_temperature(case):
    if not usable(case):
        return
    logits, labels = torch.from_numpy(case[0]), torch.from_numpy(case[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = temperature_scaling(logits, labels)
    assert found.bounded == bool(caught) and 0 < found.temperature < math.inf
    assert torch.equal(found.apply(logits).argmax(1), logits.argmax(1)) or found.bounded
    if not found.bounded:
        best = nll(found.apply(logits), labels)
        assert best <= nll(logits, labels) + 1e-12  # never rises
        assert (
            best
            <= min(nll(logits / (found.temperature * step), labels) for step in (0.98, 1.02))
            + 1e-12
        )
        three_times = pytest.approx(3 * found.temperature, rel=1e-6)
        assert fit_temperature(3 * logits, labels) == three_times
        shifted = 3 * logits + 5  # a logit as small as 1e-117 drowns in the shift
        if torch.allclose(shifted - 5, 3 * logits, rtol=1e-9, atol=0):
            assert fit_temperature(shifted, labels) == three_times
        assert fit_temperature(found.apply(logits), labels) == pytest.approx(1, rel=1e-6)


def test_temperature_one_is_the_identity():
    logits, labels = nature(100, 3)
    assert torch.equal(Temperature(1.0).apply(logits.float()), logits.float())
    assert calibration_metrics(Temperature(1.0).apply(logits), labels) == calibration_metrics(
        logits, labels
    )


def test_repair_of_a_loud_model_finds_the_factor_and_helps_elsewhere():
    found = temperature_scaling(*nature(4000, 4, factor=3.0))
    assert found.temperature == pytest.approx(3, rel=0.1)
    logits, labels = nature(4000, 5, factor=3.0)
    assert expected_calibration_error(
        found.apply(logits), labels
    ) < 0.25 * expected_calibration_error(logits, labels)


def test_separable_and_misleading_logits_are_bounded_and_reported():
    logits, _ = nature(60, 6)
    for labels, small, reason in (
        (logits.argmax(1), True, "best temperature is 0"),
        (logits.argmin(1), False, "infinite"),
    ):
        with pytest.warns(BoundedTemperatureWarning, match=reason):
            found = temperature_scaling(logits, labels)
        assert (
            found.bounded
            and math.isfinite(found.temperature)
            and (found.temperature < 0.05) == small
        )
        with pytest.warns(BoundedTemperatureWarning):
            assert fit_temperature(1000 * logits, labels) == pytest.approx(1000 * found.temperature)
        repaired = calibration_metrics(found.apply(logits), labels)
        assert all(
            math.isfinite(value) for name, value in repaired.items() if name != "confidence_auroc"
        )


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200])
def test_extreme_sizes_do_not_overflow(size):
    logits, labels = nature(100, 7)
    assert fit_temperature(size * logits, labels) / size == pytest.approx(
        fit_temperature(logits, labels), rel=1e-6
    )


@pytest.mark.parametrize("method", REPAIRS)
def test_faults_of_the_fitting_split(method):
    logits, labels = nature(40, 8)
    with pytest.raises(CalibrationError, match="one class"):
        fit_scaling(logits, torch.ones(40, dtype=torch.long), method)
    with pytest.raises(CalibrationError, match="all logits are equal"):
        fit_scaling(torch.full((40, 3), 2.0), labels, method)
    with pytest.raises(ValueError, match="probabilities"):
        fit_scaling(logits.softmax(1), labels, method)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        fit_scaling(logits, labels + 1, method)
    logits[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit_scaling(logits, labels, method)


def test_misspelt_method():
    with pytest.raises(ValueError, match="did you mean 'matrix'"):
        fit_scaling(*nature(40, 9), method="matrx")


# --- vector, matrix, isotonic


@pytest.mark.parametrize("fit", [fit_vector_scaling, fit_matrix_scaling])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_affine_optimum_has_no_gradient_and_never_raises_the_nll(fit, penalty):
    """Oracle: the gradient of equation (eq-affine) by autograd is zero where W may move."""
    logits, labels = nature(80, 10, 4, 2.5)
    logits = logits + torch.tensor([1.0, 0.0, -1.0, 0.5])
    found = fit(logits, labels, penalty)
    start = fit_temperature(logits, labels)
    centred = logits - logits.mean(1, keepdim=True)
    size = centred.square().sum(1).mean().sqrt()
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(centred @ weight.T + bias, labels, reduction="sum")
    loss = loss + penalty / 2 * (
        size**2 * (weight - torch.eye(4) / start).square().sum() + bias.square().sum()
    )
    loss.backward()
    free = torch.eye(4) if fit is fit_vector_scaling else torch.ones(4, 4)
    assert (weight.grad / size * free).abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4
    assert torch.equal(found.weight * (1 - free), torch.zeros(4, 4).double())
    assert nll(found.apply(logits), labels) <= nll(logits / start, labels) + 1e-12
    assert_close(found.apply(logits + 7.0), found.apply(logits))
    assert found.apply(logits.float()).dtype == torch.float32


def test_matrix_scaling_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    logits, labels = nature(300, 11, factor=3.0)
    centred = logits - logits.mean(1, keepdim=True)
    oracle = LogisticRegression(C=1e7, tol=1e-12, max_iter=20_000).fit(centred, labels)
    found = fit_matrix_scaling(logits, labels, penalty=1e-7).apply(logits)
    assert_close(
        found.softmax(1), torch.from_numpy(oracle.predict_proba(centred)), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("penalty", [0, -1.0, math.inf, math.nan])
def test_penalty_must_be_positive(penalty):
    with pytest.raises(ValueError, match="penalty"):
        fit_vector_scaling(*nature(40, 12), penalty=penalty)


def test_isotonic_against_pool_adjacent_violators():
    logits, labels = nature(60, 13, 2, 3.0)
    found = fit_isotonic(logits, labels)
    p = logits.softmax(1)[:, 1].numpy()
    order = np.argsort(p)
    blocks = [[float(label), 1] for label in labels.numpy()[order]]
    index = 0
    while index < len(blocks) - 1:
        if blocks[index][0] / blocks[index][1] > blocks[index + 1][0] / blocks[index + 1][1]:
            blocks[index] = [
                blocks[index][0] + blocks[index + 1][0],
                blocks[index][1] + blocks[index + 1][1],
            ]
            del blocks[index + 1]
            index = max(index - 1, 0)
        else:
            index += 1
    heights = np.concatenate([np.full(count, total / count) for total, count in blocks]).clip(
        1 / 120, 1 - 1 / 120
    )
    assert_close(found.apply(logits).exp()[order, 1].numpy(), heights, atol=1e-9, rtol=0)
    fresh = found.apply(nature(50, 14, 2, 3.0)[0])
    assert fresh.isfinite().all() and (fresh.exp().sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("method", REPAIRS)
def test_every_repair_can_be_judged(method):
    found = fit_scaling(*nature(200, 15, factor=3.0), method=method)
    logits, labels = nature(300, 16, factor=3.0)
    assert negative_log_likelihood(found.apply(logits), labels) < negative_log_likelihood(
        logits, labels
    )
    assert found.apply(logits.numpy().astype(np.float32)).dtype == torch.float32


# --- fit here, judge there


@pytest.fixture
def splits():
    names = {"validation": 20, "test": 21, "ood/other": 22}
    drawn = {name: nature(90, seed, factor=2.0) for name, seed in names.items()}
    return {name: pair[0] for name, pair in drawn.items()}, {
        name: pair[1] for name, pair in drawn.items()
    }


def test_repair_fits_on_one_split_and_changes_the_others(splits):
    found = repair(*splits, judge_on=("test", "ood/other"))
    assert found.scaling == temperature_scaling(splits[0]["validation"], splits[1]["validation"])
    assert set(found.logits) == {"test", "ood/other"}
    assert_close(found.logits["test"], splits[0]["test"] / found.scaling.temperature)
    assert set(repair(*splits, judge_on="test").logits) == {"test"}


def test_repair_refuses_the_fitting_split_by_name_and_by_content(splits):
    logits, labels = splits
    with pytest.raises(CalibrationError, match="is the split that the repair is fitted on"):
        repair(logits, labels, judge_on=("test", "validation"))
    logits["copy"], labels["copy"] = (
        logits["validation"].numpy().copy(),
        labels["validation"].numpy().copy(),
    )
    with pytest.raises(CalibrationError, match="holds the same logits and labels as 'validation'"):
        repair(logits, labels, judge_on=("copy",))
    assert set(
        repair(logits, labels, judge_on=("validation", "copy"), allow_same_split=True).logits
    ) == {"validation", "copy"}
    labels["copy"] = (
        labels["copy"] + 1
    ) % 3  # a collapsed model may give equal logits on different data
    assert "copy" in repair(logits, labels, judge_on=("copy",)).logits


def test_repair_names_close_splits(splits):
    with pytest.raises(ValueError, match="did you mean 'test'"):
        repair(*splits, judge_on=("tset",))
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        repair(*splits, fit_on="validaton")


# --- the scaled head


def test_scaled_head_divides_the_logits_and_is_saved_like_any_other(tiny_model, tmp_path):
    from lpft_nb.classifier import Classifier

    model = tiny_model("bert")
    texts = ["the cat sat", "find the mean"]
    before = model(**model.tokenize(texts)).logits.detach()
    softer = model.with_temperature(2.5)
    assert_close(softer(**softer.tokenize(texts)).logits.detach(), before / 2.5, rtol=0, atol=1e-12)
    assert_close(softer.head.weight, model.head.weight / 2.5)
    assert_close(softer.head.bias, model.head.bias / 2.5)
    assert torch.equal(
        model(**model.tokenize(texts)).logits.detach(), before
    )  # the model itself stays
    softer.save_pretrained(tmp_path / "softer")
    loaded = Classifier.from_pretrained(tmp_path / "softer")
    assert torch.equal(loaded.head.weight, softer.head.weight)
    assert_close(loaded(**loaded.tokenize(texts)).logits, before / 2.5, rtol=0, atol=1e-12)
    assert (loaded.predict(texts).labels == model.predict(texts).labels).all()


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, True, "2"])
def test_scaled_head_needs_a_positive_temperature(tiny_model, temperature):
    with pytest.raises(ValueError, match="positive finite number"):
        tiny_model("bert").with_temperature(temperature)


@pytest.mark.parametrize(
    "disguise",
    [
        lambda z, y: (z.float(), y),
        lambda z, y: (z.bfloat16(), y),
        lambda z, y: (z.flip(0), y.flip(0)),
        lambda z, y: (z[::3], y[::3]),
        lambda z, y: (z[:40].float().flip(0), y[:40].flip(0).int()),
        lambda z, y: (z.numpy() + 1e-9, y.numpy()),
        lambda z, y: (z.log_softmax(1), y),
        lambda z, y: (z + 3, y),
        lambda z, y: (z / 1.7, y),
        lambda z, y: (z.flip(0) / 1.7, y.flip(0)),
        lambda z, y: (z.bfloat16().double(), y),
        lambda z, y: (z.round(decimals=2), y),
        lambda z, y: (z + 1e-4 * torch.randn_like(z), y),
        lambda z, y: (z[:, [2, 0, 1]], (y + 1) % 3),
        lambda z, y: (z.repeat(3, 1), y.repeat(3)),
        lambda z, y: (torch.cat([z, z.square()]), torch.cat([y, y])),
    ],
)
def test_the_fitting_split_is_known_in_every_disguise(splits, disguise):
    logits, labels = splits
    logits["other"], labels["other"] = disguise(logits["validation"], labels["validation"])
    with pytest.raises(CalibrationError, match="that the repair is fitted on"):
        repair(logits, labels, judge_on="other")
    assert "other" in repair(logits, labels, judge_on="other", allow_same_split=True).logits


def test_a_few_common_examples_and_a_collapsed_model_are_let_through(splits):
    logits, labels = splits
    logits["test"][:9], labels["test"][:9] = logits["validation"][:9], labels["validation"][:9]
    assert "test" in repair(logits, labels).logits
    flat = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64).expand(90, 3)
    logits |= {"validation": flat, "test": flat}
    assert "test" in repair(logits, labels).logits


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z, y: (z.masked_fill(torch.arange(90)[:, None] == 3, math.nan), y), "NaN"),
        (lambda z, y: (z.softmax(1), y), "look like probabilities"),
        (lambda z, y: (torch.cat([z, z[:, :1]], 1), y), "'test' has 4 classes, 'validation' has 3"),
        (lambda z, y: (z, y + 7), r"must lie in 0\.\.2"),
        (lambda z, y: (z, y[:-1]), "must have shape"),
    ],
)
def test_the_judged_split_is_checked_too(splits, spoil, message):
    logits, labels = splits
    logits["test"], labels["test"] = spoil(logits["test"], labels["test"])
    with pytest.raises(ValueError, match=message):
        repair(logits, labels)
