"""Linear regression from a start: pseudo-inverses and loops of descent, laws over draws, bounds, faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import Ridge
from teachers_oracle import projector, randn, world

from lpft_nb.intervals import confidence_interval
from lpft_nb.teachers.bounds import (
    check_spectrum,
    gaussian_bound,
    hidden_variance,
    mean_length,
    split_bound,
)
from lpft_nb.teachers.regression import (
    descend_in_batches,
    descent_shares,
    fine_tuned,
    fitted,
    flow_shares,
    isotropic_mean_risk,
    mean_risk,
    ridge_shares,
)
from lpft_nb.teachers.spans import as_float64, check_covariance, risk, span_of, weighted_square

FEW = settings(deadline=None, max_examples=30)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
close = torch.testing.assert_close


# --- oracles


@FEW
@given(SIZES, st.booleans(), st.floats(0, 3))
def test_projections_and_end_point_against_the_pseudo_inverse(sizes, repeat, decay):
    inputs, spectrum, source, target = world(*sizes, repeat=repeat, decay=decay)
    span, onto = span_of(inputs), projector(inputs)
    assert span.rank == torch.linalg.matrix_rank(inputs)
    close(span.onto(source), onto @ source)
    end = fine_tuned(span, source, target)
    close(end, onto @ target + source - onto @ source)
    close(fitted(span, source, inputs @ target), end)
    close(inputs @ end, inputs @ target)  # the data are fitted
    off = spectrum.sqrt() * (target - source - onto @ (target - source))
    close(risk(end, target, spectrum), off.square().sum())


def test_plain_numbers_keep_their_digits():
    assert as_float64([0.1, 1 / 3], "numbers").tolist() == [0.1, 1 / 3]
    assert as_float64(torch.tensor([0.5], dtype=torch.float16), "numbers").dtype == torch.float64


@FEW
@given(
    SIZES,
    st.booleans(),
    st.integers(0, 40),
    st.floats(0.05, 1.9),
    st.sampled_from(["free", "zero", "orthogonal", "negative multiple"]),
)
def test_every_step_of_descent(sizes, repeat, steps, share, kind):
    inputs, _, source, target = world(*sizes, repeat=repeat)
    source = {
        "free": source,
        "zero": torch.zeros_like(target),
        "orthogonal": source - target * (source @ target) / (target @ target),
        "negative multiple": -1.5 * target,
    }[kind]
    span, labels = span_of(inputs), inputs @ target + 0.3 * randn(sizes[0], seed=99)
    rate = share * len(inputs) / span.values[0].square().item()
    predictor = source.clone()
    for _ in range(steps):
        predictor -= rate * inputs.T @ (inputs @ predictor - labels) / len(inputs)
    close(fitted(span, source, labels, descent_shares(span, steps, rate)), predictor)


def test_flow_by_an_ode_solver_and_in_its_limits():
    from scipy.integrate import solve_ivp

    inputs, _, source, target = world(5, 8, 3)
    labels = (inputs @ target).numpy()
    points = inputs.numpy()

    def slope(_, theta):
        return -points.T @ (points @ theta - labels) / 5

    run = solve_ivp(slope, (0, 2.5), source.numpy(), rtol=1e-11, atol=1e-12)
    span = span_of(inputs)
    at = fitted(span, source, labels, flow_shares(span, 2.5))
    np.testing.assert_allclose(at.numpy(), run.y[:, -1], rtol=1e-8)
    close(fitted(span, source, labels, flow_shares(span, 0.0)), source)
    close(
        fitted(span, source, labels, flow_shares(span, math.inf)), fine_tuned(span, source, target)
    )


def test_ridge_against_scikit_learn():
    inputs, _, source, target = world(12, 7, 1)
    labels = inputs @ target + randn(12, seed=9)
    theirs = Ridge(alpha=12 * 0.4, fit_intercept=False).fit(
        inputs.numpy(), (labels - inputs @ source).numpy()
    )
    span = span_of(inputs)
    ours = fitted(span, source, labels, ridge_shares(span, 0.4))
    np.testing.assert_allclose((ours - source).numpy(), theirs.coef_, rtol=1e-8)


@pytest.mark.parametrize("covariance", ["none", "spectrum", "matrix"])
@pytest.mark.parametrize("kind", ["all", "flow", "ridge"])
def test_mean_over_the_noise(covariance, kind):
    inputs, spectrum, source, target = world(4, 6, 5, repeat=True, decay=1.0)
    turn = torch.linalg.qr(randn(6, 6, seed=8)).Q
    moment = {"none": None, "spectrum": spectrum, "matrix": turn * spectrum @ turn.T}[covariance]
    span = span_of(inputs)
    shares = {"all": None, "flow": flow_shares(span, 3.0), "ridge": ridge_shares(span, 0.5)}[kind]
    answers = inputs @ target + 0.4 * randn(20_000, 4, seed=7)
    drawn = risk(fitted(span, source, answers, shares), target, moment)
    exact = mean_risk(span, source, target, noise=0.4, covariance=moment, shares=shares)
    interval = confidence_interval(drawn.numpy(), level=0.9999)
    assert interval.low < exact < interval.high
    still = mean_risk(span, source, target, covariance=moment, shares=shares)
    close(still, risk(fitted(span, source, inputs @ target, shares), target, moment))


@pytest.mark.parametrize("examples", [1, 4, 9, 10, 25])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_law_over_gaussian_inputs(examples, noise):
    if noise and abs(examples - 10) <= 1:
        assert math.isinf(isotropic_mean_risk(examples, 10, 1.0, noise))
        return
    spans = span_of(randn(3000, examples, 10, seed=examples))
    source, target = randn(10, seed=1), randn(10, seed=2)
    drawn = mean_risk(spans, source, target, noise=noise)
    law = isotropic_mean_risk(examples, 10, (target - source).norm().item(), noise)
    interval = confidence_interval(drawn.numpy(), level=0.9999)
    assert interval.low - 1e-9 <= law <= interval.high + 1e-9


def test_mini_batches_end_where_the_formula_says():
    inputs, _, source, target = world(6, 9, 4)
    end = descend_in_batches(
        inputs,
        inputs @ target,
        source,
        learning_rate=0.05,
        batch_size=4,
        epochs=3000,
        generator=torch.Generator().manual_seed(0),
    )
    close(end, fine_tuned(span_of(inputs), source, target), rtol=1e-7, atol=1e-7)


# --- bounds


@FEW
@given(st.integers(1, 12), st.integers(1, 10), st.integers(0, 500), st.floats(0.1, 2.5))
def test_the_split_bound_holds_always_and_is_the_best_of_all_k(examples, dimension, seed, decay):
    inputs, spectrum, source, target = world(examples, dimension, seed, decay=decay)
    deviation = torch.linalg.matrix_norm(
        spectrum.diag() - inputs.T @ inputs / examples, ord=2
    ).item()
    difference = target - source
    bound = split_bound(deviation, spectrum, difference)
    assert risk(fine_tuned(span_of(inputs), source, target), target, spectrum) <= bound * (1 + 1e-9)
    by_hand = min(
        2 * deviation * difference[k:].square().sum().item()
        + (
            2 * deviation**3 / spectrum[k - 1].item() ** 2 * difference[:k].square().sum().item()
            if k
            else 0
        )
        for k in range(dimension + 1)
    )
    assert bound.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("examples", [10, 60])
def test_the_gaussian_bound_fails_no_more_often_than_allowed(decay, examples):
    spectrum = torch.arange(1, 41, dtype=torch.float64) ** -decay
    spans = span_of(randn(400, examples, 40, seed=1) * spectrum.sqrt())
    differences = randn(400, 40, seed=2)
    risks = risk(fine_tuned(spans, torch.zeros(40), differences), differences, spectrum)
    failures = int((risks > gaussian_bound(spectrum, differences, examples, failure=0.2)).sum())
    assert stats.binom.sf(failures - 1, 400, 0.2) > 1e-6
    free = torch.eye(40, dtype=torch.float64) - spans.right.mT @ spans.right
    root = spectrum.sqrt()
    hidden = torch.linalg.matrix_norm(root[:, None] * free * root, ord=2)
    failures = int((hidden > hidden_variance(spectrum, examples, 0.2)).sum())
    assert stats.binom.sf(failures - 1, 400, 0.2) > 1e-6


@pytest.mark.parametrize("first", [0.1, 5.0])
def test_the_gaussian_bound_by_hand(first):
    spectrum = 4 * torch.arange(1, 13, dtype=torch.float64) ** -2.0
    difference = torch.tensor([first, *[0.2] * 11], dtype=torch.float64)
    hidden = hidden_variance(spectrum, 20, 0.1)
    margin = (mean_length(20) - math.sqrt(2 * math.log(10))) ** 2
    local = min(2 * spectrum[k:].sum().item() / (margin - 2 * k) for k in range(3))
    assert 4 < margin < 6
    assert hidden == pytest.approx(min(spectrum.sum().item() / margin, local, 4.0))
    assert 0.5 < hidden < 4 and abs(hidden - 1) > 0.1
    bounds = []
    for k in range(13):
        head = (difference[:k].square() / spectrum[:k]).sum().sqrt()
        bounds.append(hidden * (math.sqrt(hidden) * head + difference[k:].norm()) ** 2)
    least = min(range(13), key=lambda k: bounds[k])
    assert (least > 0) == (first > 0.5)
    bound = gaussian_bound(spectrum, difference, 20, failure=0.1)
    assert bound.item() == pytest.approx(bounds[least].item())
    assert mean_length(1) == pytest.approx(math.sqrt(2 / math.pi))
    assert hidden_variance(spectrum, 1, 0.01) == 4.0  # too few examples: the trivial bound
    assert hidden_variance(spectrum, 200, 0.01) == 0.0  # nothing is hidden


# --- properties


@FEW
@given(SIZES, st.floats(0.1, 5), st.booleans())
def test_scaling_and_rotation(sizes, factor, repeat):
    inputs, _, source, target = world(*sizes, repeat=repeat)
    turn = torch.linalg.qr(randn(sizes[1], sizes[1], seed=7)).Q
    span, turned = span_of(inputs), span_of(inputs @ turn.T)
    end = fine_tuned(span, source, target)
    close(fine_tuned(turned, turn @ source, turn @ target), turn @ end)
    close(fine_tuned(span_of(factor * inputs), factor * source, factor * target), factor * end)
    close(risk(factor * end, factor * target), factor**2 * risk(end, target))


@FEW
@given(SIZES)
def test_special_teachers(sizes):
    inputs, _, source, target = world(*sizes)
    span = span_of(inputs)
    close(fine_tuned(span, source, source), source)
    scratch = fine_tuned(span, torch.zeros_like(target), target)
    close(scratch, torch.linalg.lstsq(inputs, inputs @ target, driver="gelsd").solution)
    if sizes[0] >= sizes[1] and span.rank == sizes[1]:
        assert risk(fine_tuned(span, source, target), target) < 1e-12
    away = fine_tuned(span, -2 * target, target)
    close(risk(away, target), 9 * span.off(target).square().sum())


@FEW
@given(SIZES, st.floats(0.01, 5), st.floats(1.01, 3))
def test_longer_flow_learns_more_and_never_beyond(sizes, time, longer):
    span = span_of(world(*sizes)[0])
    early, late = flow_shares(span, time), flow_shares(span, longer * time)
    assert (early <= late).all() and (late <= 1).all() and (early >= 0).all()


def test_a_batch_of_draws_is_each_by_itself():
    inputs, source, target = randn(5, 3, 6), randn(5, 6, seed=1), randn(6, seed=2)
    inputs[2, 1] = inputs[2, 0]
    spans = span_of(inputs)
    batch = mean_risk(spans, source, target, noise=0.3, shares=flow_shares(spans, 1.0))
    assert spans.rank.tolist() == [3, 3, 2, 3, 3]
    for index in range(5):
        one = span_of(inputs[index])
        close(
            batch[index],
            mean_risk(one, source[index], target, noise=0.3, shares=flow_shares(one, 1.0)),
        )


def test_inputs_of_zeros_move_nothing():
    span = span_of(torch.zeros(3, 4))
    assert span.rank == 0
    close(fine_tuned(span, randn(4), randn(4, seed=1)), randn(4))
    assert mean_risk(span, randn(4), randn(4), noise=1.0) == 0


# --- faults

SPAN = span_of(randn(3, 5))
REFUSED = {
    "NaN inputs": (lambda: span_of([[1.0, math.nan]]), "NaN"),
    "flat inputs": (lambda: span_of(randn(4)), "dimensions"),
    "no inputs": (lambda: span_of(torch.zeros(0, 3)), "inputs"),
    "infinite teacher": (lambda: as_float64([math.inf], "teacher"), "teacher"),
    "length of source": (lambda: fine_tuned(SPAN, randn(4), randn(5)), "source"),
    "length of target": (lambda: fine_tuned(SPAN, randn(5), randn(4)), "target"),
    "length of labels": (lambda: fitted(SPAN, randn(5), randn(4)), "labels"),
    "length of predictor": (lambda: risk(randn(4), randn(5)), "predictor"),
    "negative time": (lambda: flow_shares(SPAN, -1.0), "time"),
    "NaN time": (lambda: flow_shares(SPAN, math.nan), "time"),
    "divergent rate": (lambda: descent_shares(SPAN, 5, 100.0), "diverges"),
    "no penalty": (lambda: ridge_shares(SPAN, 0.0), "penalty"),
    "negative noise": (lambda: mean_risk(SPAN, randn(5), randn(5), noise=-1.0), "noise"),
    "negative distance": (lambda: isotropic_mean_risk(3, 5, -1.0), "distance"),
    "covariance's shape": (lambda: check_covariance(randn(3), 5), "shape"),
    "covariance's symmetry": (lambda: check_covariance(randn(3, 3), 3), "symmetric"),
    "negative covariance": (lambda: weighted_square(randn(2), [1.0, -1.0]), "below zero"),
    "ascending spectrum": (lambda: check_spectrum([1.0, 2.0]), "descending"),
    "failure": (lambda: hidden_variance([1.0], 5, 1.0), "failure"),
    "deviation": (lambda: split_bound(math.nan, [1.0], [1.0]), "deviation"),
    "batches that diverge": (
        lambda: descend_in_batches(
            100 * randn(4, 4),
            randn(4),
            randn(4),
            learning_rate=10.0,
            batch_size=2,
            epochs=300,
            generator=torch.Generator(),
        ),
        "diverged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        call()
