"""Conformal sets: scores and ranks by hand, coverage on simulations against its exact law, and splits that are too small."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, kstest
from test_calibration import nature

from lpft_nb.conformal import (
    SCORES,
    ConformalError,
    binomial_interval,
    conformal_rank,
    conformity_scores,
    coverage_range,
    fit_conformal,
    judge_sets,
)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 500), st.integers(1, 99))
def test_rank_by_exact_arithmetic(examples, percent):
    rank = -(-(examples + 1) * percent // 100)
    if rank > examples:
        with pytest.raises(
            ConformalError, match=f"at least {-(-percent // (100 - percent))} calibration"
        ):
            conformal_rank(examples, percent / 100)
    else:
        assert conformal_rank(examples, percent / 100) == rank


def test_scores_against_a_loop():
    logits = nature(40, 1, 5)[0]
    p = logits.softmax(1).numpy()
    adaptive, threshold = (
        conformity_scores(logits, score, (0,)) for score in ("adaptive", "threshold")
    )
    randomised, uniform = (
        conformity_scores(logits, "randomised", (3, 1)),
        np.random.default_rng((3, 1)).random(40),
    )
    for row in range(40):
        for k in range(5):
            before = sum(p[row, j] for j in range(5) if p[row, j] > p[row, k])
            assert adaptive[row, k] == pytest.approx(before, abs=1e-12)
            assert randomised[row, k] == pytest.approx(before + uniform[row] * p[row, k], abs=1e-12)
            assert threshold[row, k] == pytest.approx(1 - p[row, k], abs=1e-12)


def test_threshold_is_the_calibration_score_of_the_right_rank():
    logits, labels = nature(50, 2, 4)
    own = np.sort(1 - logits.softmax(1).numpy()[np.arange(50), labels])
    assert fit_conformal(logits, labels, 0.8, "threshold").threshold == own[math.ceil(51 * 0.8) - 1]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("score", ["randomised", "threshold"])
def test_coverage_follows_its_beta_law_whatever_the_model(score, factor):
    """Oracle: with continuous scores the coverage of a rule is Beta(k, n + 1 - k)."""
    logits, labels = nature(200_000, 3, 4, factor)
    scores = conformity_scores(logits, score, (9,))[np.arange(200_000), labels]
    covered = []
    for run in range(120):
        rows = slice(50 * run, 50 * run + 50)
        rule = fit_conformal(logits[rows], labels[rows], 0.9, score, seed=run)
        covered.append((scores[50 * 120 :] <= rule.threshold).mean())
    rank = conformal_rank(50, 0.9)
    assert np.mean(covered) == pytest.approx(rank / 51, abs=4 * np.std(covered) / math.sqrt(120))
    assert kstest(covered, beta(rank, 51 - rank).cdf).pvalue > 1e-3


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.95])
def test_sets_cover_at_least_what_was_asked(score, coverage):
    shares = []
    for run in range(60):
        logits, labels = nature(400, 100 + run, 5, 2.0)
        rule = fit_conformal(logits[:100], labels[:100], coverage, score, seed=run)
        shares.append(judge_sets(rule.apply(logits[100:]), labels[100:])["coverage"])
    assert np.mean(shares) > coverage - 4 * np.std(shares) / math.sqrt(60)


def test_adaptive_sets_hold_the_prediction_and_grow_with_coverage():
    logits, labels = nature(500, 4, 6)
    smaller, larger = (
        fit_conformal(logits[:200], labels[:200], coverage).apply(logits[200:])
        for coverage in (0.7, 0.95)
    )
    assert smaller[torch.arange(300), logits[200:].argmax(1)].all()
    assert (larger | ~smaller).all() and larger.sum() > smaller.sum()
    p = logits[200:].softmax(1)
    assert not (
        ~smaller & (p > torch.where(smaller, p, 2.0).amin(1, keepdim=True))
    ).any()  # the most probable classes


def test_randomised_sets_are_reproducible():
    logits, labels = nature(300, 5, 6)
    rules = [
        fit_conformal(logits[:100], labels[:100], 0.9, "randomised", seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(rules[0].apply(logits), rules[1].apply(logits))
    assert not torch.equal(rules[0].apply(logits), rules[2].apply(logits))


def test_judge_sets_by_hand():
    sets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    found = judge_sets(sets, torch.tensor([0, 2, 1, 1]))
    expected = binomtest(2, 4).proportion_ci(0.95, method="exact")
    assert found == pytest.approx(
        {
            "coverage": 0.5,
            "coverage_low": expected.low,
            "coverage_high": expected.high,
            "coverage_worst_class": 0.0,
            "mean_size": 1.5,
            "share_empty": 0.25,
            "share_single": 0.25,
        },
        abs=1e-9,
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(0, 200), st.sampled_from([0.5, 0.9, 0.99]))
def test_binomial_interval_against_scipy(examples, hits, level):
    hits = min(hits, examples)
    expected = binomtest(hits, examples).proportion_ci(level, method="exact")
    assert binomial_interval(hits, examples, level) == pytest.approx(
        (expected.low, expected.high), abs=1e-9
    )


def test_range_of_coverage():
    low, high = coverage_range(99, 0.9, 0.95)
    assert (low, high) == pytest.approx(beta(90, 10).ppf([0.025, 0.975]))


def test_faults():
    logits, labels = nature(30, 6)
    with pytest.raises(ConformalError, match="at least 99 calibration examples, got 30"):
        fit_conformal(logits, labels, 0.99)
    for coverage in (0, 1, 90, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            fit_conformal(logits, labels, coverage)
    with pytest.raises(ValueError, match="did you mean 'adaptive'"):
        fit_conformal(logits, labels, 0.9, "adaptiv")
    with pytest.raises(ValueError, match="probabilities"):
        fit_conformal(logits.softmax(1), labels)
    rule = fit_conformal(logits, labels)
    with pytest.raises(ValueError, match="probabilities"):
        rule.apply(logits.softmax(1))
    with pytest.raises(ValueError, match="expected bool sets"):
        judge_sets(logits, labels)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        judge_sets(rule.apply(logits), labels + 1)
