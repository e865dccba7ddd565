"""Intervals: they agree with SciPy, move with their values, and are written one way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lpft_nb.intervals import Interval, confidence_interval, interval_text, rank_correlation

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda number: round(number, 6))


@settings(deadline=None, max_examples=80)
@given(st.lists(numbers, min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_scipys(values, level):
    mean, low, high = confidence_interval(values, level)
    error = stats.sem(values)
    expected = (
        stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=error)
        if error > 0
        else (np.mean(values),) * 2
    )
    np.testing.assert_allclose(
        (mean, low, high),
        (np.mean(values), *expected),
        rtol=1e-9,
        atol=1e-9 * max(map(abs, values), default=0),
    )
    assert low <= mean <= high


@settings(deadline=None, max_examples=40)
@given(st.lists(numbers, min_size=2, max_size=8), st.floats(0.1, 10), st.floats(-5, 5))
def test_interval_moves_and_scales_with_its_values(values, scale, shift):
    before = np.array(confidence_interval(values))
    after = np.array(confidence_interval([scale * value + shift for value in values]))
    np.testing.assert_allclose(after, scale * before + shift, rtol=1e-6, atol=1e-6)


def test_interval_by_hand():
    assert confidence_interval([1.0, 3.0]) == pytest.approx(
        (2, 2 - 12.7062047361747, 2 + 12.7062047361747)
    )
    single = confidence_interval(torch.tensor([4.0]))
    assert single.mean == 4 and math.isnan(single.low) and math.isnan(single.high)
    assert all(math.isnan(value) for value in confidence_interval([1.0, float("nan"), 2.0]))
    assert all(math.isnan(value) for value in confidence_interval([1.0, float("inf")]))


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([], 0.95),
        ([[1.0, 2.0]], 0.95),
        (3.0, 0.95),
        ([1, 2], 95),
        ([1, 2], 0),
        ([1, 2], float("nan")),
    ],
)
def test_interval_refuses(values, level):
    with pytest.raises(ValueError, match="expected"):
        confidence_interval(values, level)


def test_interval_text_by_hand():
    interval = Interval(0.8412, 0.8292, 0.8532)
    assert interval_text(interval, 100, n=5) == "84.1\u00a0±\u00a01.2 (5)"
    assert interval_text(interval, digits=3) == "0.841\u00a0±\u00a00.012"
    assert interval_text(confidence_interval([0.5]), 100, n=1) == "50.0 (1)"
    assert interval_text(Interval(math.nan, math.nan, math.nan), 100, n=3) == "–"
    assert interval_text(Interval(-0.0001, -0.01, 0.0098), 100).startswith("0.0\u00a0")


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=2, max_size=6), st.integers(0, 4))
def test_interval_text_says_the_numbers(values, digits):
    interval = confidence_interval(values)
    mean, half = interval_text(interval, digits=digits).split("\u00a0±\u00a0")
    rounding = 0.5000001 * 10**-digits
    assert float(mean) == pytest.approx(interval.mean, abs=rounding + 1e-9 * abs(interval.mean))
    expected = (interval.high - interval.low) / 2
    assert float(half) == pytest.approx(expected, abs=rounding + 1e-9 * expected)


pairs = st.lists(st.tuples(numbers, numbers), min_size=4, max_size=15)


@settings(deadline=None, max_examples=80)
@given(pairs, st.sampled_from([0.5, 0.9, 0.95]))
def test_rank_correlation_is_scipys_with_the_interval_of_fisher(values, level):
    left, right = np.array(values).T
    found = rank_correlation(left, right, level)
    assert np.allclose(found, rank_correlation(right, left, level), equal_nan=True)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert all(map(math.isnan, found))
        return
    expected = stats.spearmanr(left, right).statistic
    assert found.mean == pytest.approx(expected, abs=1e-12)
    if abs(expected) > 1 - 1e-12:
        assert math.isnan(found.low) and math.isnan(found.high)
        return
    error = math.sqrt((1 + expected**2 / 2) / (len(left) - 3))
    ends = stats.norm.interval(level, loc=np.arctanh(expected), scale=error)
    assert found[1:] == pytest.approx(np.tanh(ends), rel=1e-9)
    stretched = rank_correlation(left**3, 2 * right + 1, level)  # the same orders
    if len(set(left**3)) == len(set(left)):
        assert stretched == pytest.approx(found, rel=1e-9)


def test_few_cases_and_perfect_orders_have_no_interval():
    few = rank_correlation([1, 2, 3], [1, 3, 2])
    assert few.mean == pytest.approx(0.5) and math.isnan(few.low)
    perfect = rank_correlation([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])
    assert perfect.mean == -1 and math.isnan(perfect.low) and math.isnan(perfect.high)


@pytest.mark.parametrize(
    ("left", "right", "level", "words"),
    [
        ([1, 2], [1, 2, 3], 0.95, "two lists of one length"),
        ([1], [1], 0.95, "two cases or more"),
        ([[1, 2]], [[1, 2]], 0.95, "two lists"),
        ([1, 2, math.nan], [1, 2, 3], 0.95, "finite values"),
        ([1, 2, 3], [1, 2, 3], 1.0, "level between 0 and 1"),
    ],
)
def test_rank_correlation_refuses(left, right, level, words):
    with pytest.raises(ValueError, match=words):
        rank_correlation(left, right, level)
