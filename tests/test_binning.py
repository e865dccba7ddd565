"""Sums over bins, ranks and cells: plain loops, and many resamples at once against one after the other."""

import math

import numpy as np
import pytest

from lpft_nb import calibration
from lpft_nb.binning import (
    SMOOTH_CELLS,
    BinSums,
    Ranked,
    adaptive_of,
    auroc_of,
    bin_numbers,
    bin_sums,
    check_bins,
    debiased_square_of,
    ece_of,
    mce_of,
    ranked,
    risk_area_of,
    smooth_cells,
    smooth_of,
)


def drawn(rows: int, seed: int, grid: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Confidences with ties and answers that are right somewhat less often than claimed."""
    random = np.random.default_rng(seed)
    confidence = np.ceil(grid * random.uniform(0.3, 1, rows)) / grid - 0.01
    return confidence, (random.random(rows) < 0.9 * confidence).astype(float)


def test_a_value_on_an_edge_belongs_to_the_lower_bin_and_zero_to_the_first():
    assert bin_numbers(np.array([0.0, 1e-9, 0.25, 0.2500001, 0.5, 0.75, 1.0]), 4).tolist() == [
        0,
        0,
        0,
        1,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("bins", [1, 2, 7, 10, 15, 49, 1000])
def test_bins_are_those_of_a_search_among_the_edges(bins):
    edges = np.linspace(0, 1, bins + 1)
    near = np.concatenate(
        [
            edges,
            np.nextafter(edges, 0),
            np.nextafter(edges, 1).clip(max=1),
            [5e-324],
            np.random.default_rng(0).random(10_000),
        ]
    )
    np.testing.assert_array_equal(
        bin_numbers(near, bins), np.searchsorted(edges[1:-1], near, side="left")
    )


def test_sums_are_those_of_a_loop_also_beyond_one_part():
    confidence, correct = drawn(2**14 + 77, 0)
    sums = bin_sums(confidence, correct, 15)
    numbers = bin_numbers(confidence, 15)
    for place in range(15):
        inside = numbers == place
        assert sums.counts[place] == inside.sum()
        assert sums.confidence[place] == pytest.approx(confidence[inside].sum())
        assert sums.correct[place] == correct[inside].sum()


@pytest.mark.parametrize("bins", [0, -1, 2.0, True, "15"])
def test_bins_must_be_a_positive_integer(bins):
    with pytest.raises(ValueError, match="positive integer"):
        check_bins(bins)


@pytest.mark.parametrize("formula", [ece_of, mce_of, debiased_square_of])
def test_formulas_of_bins_take_leading_axes(formula):
    several = [bin_sums(*drawn(60, seed), 15) for seed in range(6)]
    stacked = BinSums(*(np.stack(part).reshape(2, 3, 15) for part in zip(*several)))
    expected = np.reshape([formula(sums) for sums in several], (2, 3))
    np.testing.assert_allclose(formula(stacked), expected, rtol=1e-12)


def test_formulas_of_ranks_and_cells_take_leading_axes():
    levels = np.unique(drawn(400, 0)[0])
    several = []
    for seed in range(4):
        confidence, correct = drawn(50, seed)
        counts = np.array([(confidence == level).sum() for level in levels])
        right = np.array([correct[confidence == level].sum() for level in levels])
        several.append((Ranked(counts, counts * levels, right), ranked(confidence, correct)))
    stacked = Ranked(*(np.stack(part) for part in zip(*(padded for padded, _ in several))))
    for formula in (lambda ranks: adaptive_of(ranks, 9), auroc_of, risk_area_of):
        np.testing.assert_allclose(formula(stacked), [formula(plain) for _, plain in several])
    residuals = np.stack(
        [
            np.bincount(smooth_cells(confidence), confidence - correct, SMOOTH_CELLS) / 50
            for confidence, correct in (drawn(50, seed) for seed in range(4))
        ]
    )
    np.testing.assert_allclose(smooth_of(residuals), [smooth_of(row) for row in residuals])


def test_equal_confidences_have_no_order():
    confidence, correct = drawn(80, 3)
    shuffle = np.random.default_rng(1).permutation(80)
    for formula in (lambda ranks: adaptive_of(ranks, 15), auroc_of, risk_area_of):
        assert formula(ranked(confidence, correct)) == pytest.approx(
            formula(ranked(confidence[shuffle], correct[shuffle])), abs=1e-14
        )


def test_ranking_without_wrong_answers_is_not_a_number():
    assert math.isnan(float(auroc_of(ranked(np.array([0.4, 0.9]), np.ones(2)))))


def test_the_face_offers_the_same_functions():
    assert calibration.bin_numbers is bin_numbers and calibration.smooth_of is smooth_of
    assert calibration.Ranked is Ranked and calibration.BinSums is BinSums
