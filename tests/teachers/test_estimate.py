"""The price before training: closed forms, sums over pairs by hand, refits without an example, simulation, faults."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers_oracle import randn

from lpft_nb.teachers.estimate import (
    accuracy_of_scores,
    effective_penalty,
    examples_needed,
    expected_price,
    first_reached,
    foresee,
    learned_shares,
    pool_weights,
    see_task,
)
from lpft_nb.teachers.regression import isotropic_mean_risk, mean_risk, ridge_shares
from lpft_nb.teachers.spans import span_of

FEW = settings(deadline=None, max_examples=30)
close = torch.testing.assert_close


# the mean over inputs


@FEW
@given(st.integers(1, 40), st.floats(0.5, 60), st.floats(0, 2), st.sampled_from([0.0, 0.01, 3.0]))
def test_the_root_solves_its_equation(dimension, examples, decay, penalty):
    spectrum = torch.arange(1, dimension + 1, dtype=torch.float64) ** -decay
    kappa = effective_penalty(spectrum, examples, penalty=penalty)
    if penalty == 0 and examples >= dimension:
        assert kappa == 0
    else:
        shares = spectrum / (spectrum + kappa)
        assert kappa == pytest.approx(penalty + kappa * shares.sum().item() / examples, rel=1e-6)
        assert kappa > 0
    shares = learned_shares(spectrum, examples, penalty=penalty)
    assert ((shares >= 0) & (shares <= 1)).all() and (shares.diff() <= 1e-12).all()
    if penalty == 0:
        assert shares.sum().item() == pytest.approx(min(examples, dimension), rel=1e-6)
    more = learned_shares(spectrum, 1.5 * examples, penalty=penalty)
    assert (more >= shares - 1e-9).all()


@pytest.mark.parametrize("examples", [3, 10, 19])
def test_isotropic_inputs_have_the_exact_law(examples):
    difference = randn(20, seed=1)
    found = expected_price(torch.ones(20), difference, examples).item()
    assert found == pytest.approx(isotropic_mean_risk(examples, 20, difference.norm().item()))
    scaled = expected_price(4 * torch.ones(20), difference, examples).item()
    assert scaled == pytest.approx(4 * found)


def test_with_noise_isotropic_inputs_tend_to_the_exact_law():
    exact = isotropic_mean_risk(500, 2000, 1.0, noise=0.7)
    difference = torch.ones(2000) / 2000**0.5
    assert expected_price(torch.ones(2000), difference, 500, noise=0.7).item() == pytest.approx(exact, rel=1e-3)  # fmt: skip
    many = expected_price(torch.ones(200), torch.ones(200), 1000, noise=1.0).item()
    assert many == pytest.approx(200 / 800)  # sigma² d / (n − d)


@pytest.mark.parametrize(("penalty", "noise"), [(0.0, 0.0), (0.03, 0.0), (0.03, 0.8)])
def test_the_mean_of_simulated_worlds(penalty, noise):
    spectrum = torch.arange(1, 101, dtype=torch.float64) ** -1.2
    difference = randn(100, seed=2)
    inputs = randn(300, 25, 100, seed=3) * spectrum.sqrt()
    span = span_of(inputs)
    shares = ridge_shares(span, penalty) if penalty else None
    costs = mean_risk(
        span, torch.zeros(100), difference, noise=noise, covariance=spectrum, shares=shares
    )
    found = expected_price(spectrum, difference, 25, penalty=penalty, noise=noise).item()
    assert found == pytest.approx(costs.mean().item(), rel=0.05)


def test_as_many_examples_as_directions_leave_nothing_but_noise():
    assert expected_price(torch.ones(5), torch.ones(5), 5).item() == 0
    assert expected_price(torch.ones(5), torch.ones(5), 5, noise=1.0).item() == math.inf
    assert (
        expected_price([1.0, 0.0], [3.0, 3.0], 4).item() == 0
    )  # what no input shows costs nothing


# sums over pairs


def sample(count=12, dimension=5, classes=3, seed=0):
    """Features that know a little of the labels, and a pool."""
    labels = torch.arange(count) % classes
    features = randn(count, dimension, seed=seed) + torch.eye(classes, dimension).double()[labels]
    return features, labels, 1.2 * randn(40, dimension, seed=seed + 1)


def by_pairs(features, labels, pool, weights, classes=3, rows=None):
    """Equation (eq-pairs) by two loops, with centring from all examples, over some rows."""
    middle = pool.mean(dim=0)
    moment = (pool - middle).T @ (pool - middle) / (len(pool) - 1)
    values, axes = torch.linalg.eigh(moment)
    values, axes = values.flip(0), axes.flip(1)
    seen = (features - middle) @ axes / values.sqrt()
    marks = torch.nn.functional.one_hot(labels, classes).double()
    targets = marks - marks.mean(dim=0)
    rows = list(range(len(labels))) if rows is None else rows
    pairs = [
        (targets[j] @ targets[k]) * (weights * seen[j] * seen[k]).sum()
        for j in rows
        for k in rows
        if j != k
    ]
    return torch.stack(pairs).mean().item()


def test_means_are_sums_over_pairs_with_and_without_each_example():
    features, labels, pool = sample()
    seen = see_task(features, labels, classes=3, pool=pool)
    weights = torch.tensor([[1.0, 0.8, 0.5, 0.1, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]).double()
    found = seen.means(torch.cat([weights, torch.ones(2, 1).double()], dim=1))
    assert found.shape == (13, 2)
    for column, one in enumerate(weights):
        assert found[0, column].item() == pytest.approx(by_pairs(features, labels, pool, one))
        for left_out in (0, 7):
            rows = [row for row in range(12) if row != left_out]
            wanted = by_pairs(features, labels, pool, one, rows=rows)
            assert found[1 + left_out, column].item() == pytest.approx(wanted)
    total = seen.total()
    marks = torch.nn.functional.one_hot(labels, 3).double()
    sizes = (marks - marks.mean(dim=0)).square().sum(dim=1)
    assert total[0].item() == pytest.approx(sizes.mean().item())
    assert total[3].item() == pytest.approx(sizes[torch.arange(12) != 2].mean().item())


def test_labels_that_say_nothing_are_worth_nothing_on_average():
    """Without the pairs' care the mean would be about dimension times variance over examples."""
    found = []
    for seed in range(400):
        labels = torch.from_numpy(np.random.default_rng(seed).permutation(20) % 2)
        seen = see_task(randn(20, 10, seed=seed), labels, classes=2, pool=randn(300, 10, seed=999))
        found.append(seen.means(torch.ones(11).double())[0].item())
    error = np.std(found) / len(found) ** 0.5
    naive = 10 * 0.5 / 20
    assert abs(np.mean(found)) < 4 * error + 0.5 / 19 and naive > 3 * abs(np.mean(found))


def test_a_start_that_answers_right_leaves_little_to_learn():
    features, labels, pool = sample(count=60, seed=4)
    marks = torch.nn.functional.one_hot(labels, 3).double()
    centred = features - pool.mean(dim=0)
    head = torch.linalg.lstsq(centred, marks - marks.mean(dim=0)).solution
    weights = torch.ones(6).double()
    zero = see_task(features, labels, classes=3, pool=pool).means(weights)[0]
    near = see_task(features, labels, classes=3, pool=pool, start=head).means(weights)[0]
    assert near.abs() < 0.25 * zero
    curve = foresee(see_task(features, labels, classes=3, pool=pool, start=head), [5], penalty=0.1)
    assert curve["accuracy"].isna().all() and curve["error"].notna().all()


def test_scales_and_turns_of_the_features_change_nothing():
    features, labels, pool = sample(count=30)
    turn = 3 * torch.linalg.qr(randn(5, 5, seed=8)).Q
    first, second = (
        foresee(see_task(one, labels, classes=3, pool=other), [4, 40], penalty=0.02)
        for one, other in ((features, pool), (features @ turn + 7, pool @ turn + 7))
    )
    pd.testing.assert_frame_equal(first, second, rtol=1e-6)


def test_what_the_pool_does_not_show_counts_by_pairs_too():
    features, labels, _ = sample(count=9, dimension=6)
    pool = torch.cat([randn(30, 4, seed=3), torch.zeros(30, 2).double()], dim=1)
    seen = see_task(features, labels, classes=3, pool=pool)
    assert len(seen.spectrum) == 4 and seen.pool == 29
    marks = torch.nn.functional.one_hot(labels, 3).double()
    targets, hidden = marks - marks.mean(dim=0), features[:, 4:]
    pairs = [
        (targets[j] @ targets[k]) * (hidden[j] @ hidden[k])
        for j in range(9)
        for k in range(9)
        if j != k
    ]
    last = torch.tensor([0.0, 0, 0, 0, 1]).double()
    assert seen.means(last)[0].item() == pytest.approx(torch.stack(pairs).mean().item())


def test_an_endless_pool_gives_the_shares_themselves():
    pool = randn(200_000, 6, seed=1) * torch.arange(1, 7).double() ** -0.5
    seen = see_task(randn(4, 6), [0, 1, 0, 1], classes=2, pool=pool)
    weights, spread = pool_weights(seen, 4, 0.05)
    shares = learned_shares(seen.spectrum, 4, penalty=0.05)
    close(weights[0, :-1], shares, rtol=1e-3, atol=1e-3)
    close(weights[1, :-1], shares.square(), rtol=1e-3, atol=1e-3)
    assert spread == pytest.approx(shares.square().sum().item() / 4, rel=1e-3)


def test_a_small_pool_foresees_what_a_large_one_does():
    """300 features: forms of the inverse from 150 texts, corrected, against the true covariance."""
    spectrum = torch.arange(1, 301, dtype=torch.float64) ** -0.8
    difference = randn(300, seed=5) * spectrum
    true = learned_shares(spectrum, 80, penalty=0.05)
    products = spectrum * difference.square()
    found = []
    for seed in range(20):
        pool = randn(151, 300, seed=100 + seed) * spectrum.sqrt()
        seen = see_task(randn(4, 300), [0, 1, 0, 1], classes=2, pool=pool)
        weights, spread = pool_weights(seen, 80, 0.05)
        centred = pool - pool.mean(dim=0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:150]
        answer = spectrum * difference  # the mean of feature times answer
        along = (axes @ answer).square()
        rest = answer.square().sum() - along.sum()
        forms = weights[:, :-1] @ (along / seen.spectrum) + weights[:, -1] * rest
        found.append(torch.cat([forms, torch.tensor([spread]).double()]))
    means = torch.stack(found).mean(dim=0)
    wanted = [(true * products).sum(), (true.square() * products).sum(), true.square().sum() / 80]
    close(means, torch.stack(wanted), rtol=0.05, atol=0)


# accuracy


def test_an_accuracy_is_that_of_gaussian_scores():
    priors = torch.tensor([0.5, 0.5]).double()
    total, scale, spread = 0.5, 0.6, 0.2
    agreement, power = scale * total, scale**2 * total + spread
    found = accuracy_of_scores(*(torch.tensor(x).double() for x in (agreement, power, total)), priors=priors)  # fmt: skip
    margin = (
        scale / (2 * spread) ** 0.5
    )  # between two scores, over the deviation of their difference
    assert found.item() == pytest.approx(0.5 * (1 + math.erf(margin / 2**0.5)), abs=0.01)
    many = randn(200_000, 3, seed=5)
    noise = (many - many.mean(dim=1, keepdim=True)) * 0.3**0.5
    shares = torch.tensor([0.6, 0.3, 0.1]).double()
    whole = (shares * (1 - shares)).sum()
    wanted = sum(
        shares[c]
        * ((0.7 * (torch.eye(3)[c] - shares) + noise + shares).argmax(1) == c).double().mean()
        for c in range(3)
    )
    found = accuracy_of_scores(0.7 * whole, 0.49 * whole + 0.6, whole, priors=shares)
    assert found.item() == pytest.approx(wanted.item(), abs=0.01)


def test_scores_that_know_nothing_stay_at_the_largest_class():
    priors = torch.tensor([0.7, 0.3]).double()
    zero, total = torch.zeros(()).double(), torch.tensor(0.42).double()
    assert accuracy_of_scores(zero, zero, total, priors=priors).item() == pytest.approx(
        0.7, abs=1e-6
    )


# curves


def test_where_a_curve_first_reaches_a_level():
    assert first_reached([10, 40], [0.5, 0.7], 0.6) == pytest.approx(20)
    assert first_reached([10, 40], [0.5, 0.7], 0.4) == 10
    assert first_reached([10, 40], [0.5, 0.7], 0.71) == math.inf
    assert first_reached([10, 40, 90], [0.5, 0.7, 0.6], 0.65) < 40
    curve = pd.DataFrame(
        {
            "examples": [10, 40],
            "accuracy": [0.5, 0.7],
            "accuracy_low": [0.4, 0.5],
            "accuracy_high": [0.6, 0.9],
        }
    )
    needed = examples_needed(curve, 0.6)
    assert needed == (pytest.approx(20), 10, math.inf)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """Fresh samples of one task: how often the band holds the curve that 3000 labels foresee."""
    rule, hits, pool = torch.tensor([1.0, 0.5, 0.2, 0.0]).double(), 0, randn(2000, 4, seed=77)

    def task(count, seed):
        points = randn(count, 4, seed=seed)
        return points, ((points @ rule + 0.5 * randn(count, seed=seed + 5000)) > 0).long()

    truth = foresee(see_task(*task(3000, 1), classes=2, pool=pool), [10], penalty=0.05)
    for seed in range(100):
        found = foresee(see_task(*task(60, 10 + seed), classes=2, pool=pool), [10], penalty=0.05)
        hits += found["error_low"].item() <= truth["error"].item() <= found["error_high"].item()
    assert 87 <= hits <= 100


# faults


REFUSED = {
    "no variance": (lambda: learned_shares(torch.zeros(3), 2), "one above"),
    "a negative variance": (lambda: learned_shares([1.0, -1.0], 2), "none below zero"),
    "no examples": (lambda: learned_shares([1.0], 0), "examples > 0"),
    "negative noise": (lambda: expected_price([1.0], [1.0], 1, noise=-1), "noise"),
    "another length": (lambda: expected_price([1.0], [1.0, 2.0], 1), "difference"),
    "labels are scores": (lambda: see_task(randn(4, 2), randn(4), classes=2, pool=randn(9, 2)), "whole numbers"),
    "a class too many": (lambda: see_task(randn(4, 2), [0, 1, 2, 0], classes=2, pool=randn(9, 2)), "0..1"),
    "one class": (lambda: see_task(randn(4, 2), [1, 1, 1, 1], classes=2, pool=randn(9, 2)), "two classes"),
    "too few": (lambda: see_task(randn(2, 2), [0, 1], classes=2, pool=randn(9, 2)), "m >= 3"),
    "another pool": (lambda: see_task(randn(4, 2), [0, 1, 0, 1], classes=2, pool=randn(9, 3)), "pool"),
    "no penalty": (lambda: foresee(see_task(randn(4, 2), [0, 1, 0, 1], classes=2, pool=randn(9, 2)), [5], penalty=0), "penalty"),
    "a pool too small": (
        lambda: foresee(
            see_task(randn(4, 3), [0, 1, 0, 1], classes=2, pool=randn(3, 3)), [900], penalty=1e-9
        ),
        "too few to foresee 900",
    ),
    "an accuracy in percent": (lambda: examples_needed(pd.DataFrame(), 80), "between 0 and 1"),
    "sizes not ascending": (lambda: first_reached([40, 10], [0.5, 0.7], 0.6), "ascending"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
