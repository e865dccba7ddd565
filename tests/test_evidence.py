"""Four words from intervals: every side, no interval, no place, faults."""

import itertools
import math

import numpy as np
import pytest

from lpft_nb.binning import ece_of, mce_of
from lpft_nb.intervals import Interval, confidence_interval
from lpft_nb.evidence import (
    WORDS,
    crossed_errors,
    crossed_interval,
    crossed_means,
    judge,
    judge_range,
    judge_sign,
    ratio,
    slope,
    why_not,
)

UP, DOWN, ACROSS = Interval(2, 1, 3), Interval(-2, -3, -1), Interval(1, -1, 3)
NONE = Interval(math.nan, math.nan, math.nan)


@pytest.mark.parametrize(
    "intervals, word",
    [
        ([UP, UP], "supported"),
        ([DOWN, DOWN], "contradicted"),
        ([UP, DOWN], "open"),
        ([UP, ACROSS], "open"),  # a mean above zero is not enough
        ([DOWN, ACROSS], "open"),
        ([ACROSS], "open"),
        ([UP, NONE], "open"),
        ([Interval(2, 0, 4)], "open"),  # zero itself is on neither side
        ([], "not testable"),
    ],
)
def test_the_word_follows_from_all_intervals_and_turns_with_the_claim(intervals, word):
    places = {f"place {number}": interval for number, interval in enumerate(intervals)}
    turned = {"supported": "contradicted", "contradicted": "supported"}
    assert judge_sign(places, above=True).word == word
    assert judge_sign(places, above=False).word == turned.get(word, word)
    assert word in WORDS


def test_every_place_is_named_once_on_its_side():
    found = judge_sign({"a": UP, "b": DOWN, "c": ACROSS, "d": UP, "e": NONE}, above=True)
    assert found.places == "for: a, d; against: b; open: c, e"


@pytest.mark.parametrize(
    "low, high, word",
    [
        (1, 3, "supported"),
        (0, math.inf, "supported"),
        (1.1, 3, "open"),
        (1, 2.9, "open"),
        (1.5, 2.5, "open"),
        (3.1, 9, "contradicted"),
        (-9, 0.9, "contradicted"),
        (3, 9, "open"),  # the ends touch
    ],
)
def test_a_range_wants_the_whole_interval_inside_or_outside(low, high, word):
    assert judge_range({"a": UP}, low, high).word == word


@pytest.mark.parametrize(
    "supports, contradicts",
    [({"a": True}, {"b": False}), ({"a": True}, {}), ({"a": True}, {"a": True})],
)
def test_other_places_and_places_on_both_sides_are_refused(supports, contradicts):
    with pytest.raises(ValueError, match="places"):
        judge(supports, contradicts)


# the crossed interval


def sample(rows, columns, scatter, seed=0):
    generator = np.random.default_rng(seed)
    sizes = ((rows, 1), (1, columns), (rows, columns))
    return sum(s * generator.standard_normal(size) for s, size in zip(scatter, sizes, strict=True))


def half(interval):
    return (interval.high - interval.low) / 2


def test_without_chance_in_the_examples_it_is_students_interval_over_seeds():
    table = np.repeat([[0.1], [0.25], [0.4], [0.2], [0.3], [0.18], [0.22], [0.27]], 50, axis=1)
    student = confidence_interval(table[:, 0])
    found = crossed_interval(table)
    assert found.mean == pytest.approx(student.mean)
    assert half(found) == pytest.approx(half(student), rel=0.06)


def test_without_chance_in_the_seeds_it_is_the_normal_interval_over_examples():
    row = np.random.default_rng(1).normal(0.1, 1, 2000)
    found = crossed_interval(np.tile(row, (4, 1)))
    assert half(found) == pytest.approx(1.96 * row.std() / math.sqrt(2000), rel=0.03)


def test_two_tables_are_paired_over_both():
    common = sample(5, 300, (1, 1, 1))
    first, second = common + sample(5, 300, (0, 0, 0.1), 1), common + sample(5, 300, (0, 0, 0.1), 2)
    found = crossed_interval(first, second)
    assert half(found) < half(crossed_interval(first)) / 10
    np.testing.assert_allclose(found, crossed_interval(first - second), rtol=1e-9)
    turned = crossed_interval(second, first)
    np.testing.assert_allclose(turned, (-found.mean, -found.high, -found.low))


def test_it_repeats_and_moves_with_the_values():
    table = sample(5, 40, (0.1, 0.3, 0.3))
    found = crossed_interval(table)
    assert found == crossed_interval(table) != crossed_interval(table, seed=1)
    np.testing.assert_allclose(crossed_interval(3 * table + 2), [3 * one + 2 for one in found])
    order = np.random.default_rng(0).permutation(40)
    shuffled = crossed_interval(table[::-1][:, order])
    np.testing.assert_allclose(shuffled, found, atol=0.02)
    assert half(crossed_interval(table, level=0.5)) < half(found) / 2


def test_blocks_of_draws_change_nothing(monkeypatch):
    from lpft_nb import bootstrap

    table = sample(4, 30, (0.1, 0.3, 0.3))
    whole = crossed_interval(table, draws=500)
    monkeypatch.setattr(bootstrap, "RESAMPLE_ENTRIES", 30 * 7)
    np.testing.assert_allclose(crossed_interval(table, draws=500), whole, rtol=1e-12)


def test_ratios_and_slopes_agree_with_the_delta_method():
    first, second = 4 + sample(6, 400, (0.1, 0.5, 0.5)), 2 + sample(6, 400, (0.1, 0.5, 0.5), 3)
    found = crossed_interval(first, second, statistic=ratio)
    linear = (first - found.mean * second) / second.mean()  # first order around the means
    assert found.mean == pytest.approx(first.mean() / second.mean())
    assert half(found) == pytest.approx(half(crossed_interval(linear)), rel=0.1)
    tables = [sample(5, 20, (0.1, 0.1, 0.1), k) + 2 * k for k in range(4)]
    found = crossed_interval(*tables, statistic=slope(range(4)))
    weights = (np.arange(4) - 1.5) / 5
    by_hand = crossed_interval(np.tensordot(weights, np.stack(tables), axes=1))
    np.testing.assert_allclose(found, by_hand, rtol=1e-9)


@pytest.mark.parametrize("rows, columns", [(5, 60), (3, 60), (4, 4), (3, 5)])
def test_it_covers(rows, columns):
    """A 95 % interval holds the truth in at least 90 % of 200 repetitions, 4.5 standard errors from 97 %."""
    scatter = (0.1, 0.3, 0.3)
    held = [
        found.low < 0 < found.high
        for number in range(200)
        for found in [crossed_interval(sample(rows, columns, scatter, number), draws=400)]
    ]
    assert np.mean(held) > 0.9


def test_one_seed_has_no_interval():
    found = crossed_interval(np.ones((1, 9)))
    assert found.mean == 1 and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize(
    "tables, message",
    [
        ([], "one shape"),
        ([np.ones(5)], "one shape"),
        ([np.ones((0, 5))], "one shape"),
        ([np.ones((2, 5)), np.ones((2, 4))], "one shape"),
        ([np.array([[1.0, np.nan]])], "finite"),
    ],
)
def test_what_is_no_pair_of_full_tables_is_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        crossed_interval(*tables)


# places that cannot tell


def test_a_place_cannot_tell_with_few_seeds_at_chance_or_at_a_grids_end():
    above, around = Interval(0.8, 0.7, 0.9), Interval(0.52, 0.48, 0.56)
    assert why_not(3, accuracies={"FT": around, "LP": above}, floor=0.5) == ""
    assert why_not(3, accuracies={"FT": around}, floor=0.5) == "at chance"
    assert why_not(3, accuracies={"FT": Interval(0.5, 0.5, 0.5)}, floor=0.5) == "at chance"
    found = why_not(2, accuracies={"FT": around}, floor=0.5, at_end=["FT", "LoRA"])
    assert found == "2 replicates, at chance, end of the grid: FT, LoRA"


def test_places_that_cannot_tell_are_named_and_decide_nothing():
    places = {"a": UP, "b": DOWN}
    found = judge_sign(places, above=True, set_aside={"a": "", "b": "at chance"})
    assert found == ("supported", "for: a; cannot tell: b (at chance)")
    found = judge_range(places, 0, set_aside={"a": "1 replicate", "b": "at chance"})
    assert found == ("not testable", "cannot tell: a (1 replicate), b (at chance)")


def test_calibration_errors_of_counts_are_those_of_the_repeated_examples():
    generator = np.random.default_rng(3)
    sure, right = generator.uniform(0.3, 1, (2, 40)), generator.random((2, 40)) < 0.6
    counts = generator.multinomial(40, np.full(40, 1 / 40), size=3)
    for error, whole in ((ece_of, 0), (mce_of, 1)):
        found = crossed_errors(sure, right, 10, error=error).of_rows(counts)
        assert found.shape == (3, 2)
        for draw, row in itertools.product(range(3), range(2)):
            confidence = np.repeat(sure[row], counts[draw])
            answers = np.repeat(right[row], counts[draw])
            bins = np.clip(np.ceil(confidence * 10).astype(int) - 1, 0, 9)
            gaps = [
                (
                    (bins == one).mean(),
                    abs(confidence[bins == one].mean() - answers[bins == one].mean()),
                )
                for one in set(bins)
            ]
            expected = (sum(share * gap for share, gap in gaps), max(gap for _, gap in gaps))[whole]
            assert found[draw, row] == pytest.approx(expected)


def test_an_interval_of_errors_lies_around_the_error_itself():
    generator = np.random.default_rng(4)
    sure, right = generator.uniform(0.5, 1, (5, 60)), generator.random((5, 60)) < 0.7
    errors = crossed_errors(sure, right)
    found = crossed_interval(errors, draws=2000)
    assert found.mean == pytest.approx(errors.of_rows(np.ones((1, 60))).mean())
    assert found.low < found.mean < found.high
    assert crossed_interval(errors, errors, draws=200) == (0, 0, 0)


def test_crossed_numbers_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        crossed_interval(crossed_means(np.ones((3, 4))), np.ones((3, 5)))
    with pytest.raises(ValueError, match="one shape"):
        crossed_errors(np.ones((3, 4)), np.ones((3, 5)))


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_with_one_column_the_interval_is_students(rows):
    generator = np.random.default_rng(rows)
    first, second = generator.normal(3, 1, (2, rows, 1))
    for interval, values in (
        (crossed_interval(first), first[:, 0]),
        (crossed_interval(first, second), (first - second)[:, 0]),
        (crossed_interval(first, second, statistic=slope([0, 1])), (second - first)[:, 0]),
    ):
        assert interval == pytest.approx(confidence_interval(values))
    found = crossed_interval(first, second, statistic=ratio)
    assert found.mean == pytest.approx(first.mean() / second.mean())
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
