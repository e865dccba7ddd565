"""One cloud from its sums: loops over pairs, singular values and matrices written out, laws of scale and turn."""

import math

import numpy as np
import pytest
import torch
from feature_oracle import draw, scatters
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.features import mean_cosine
from lpft_nb.geometry.spread import effective_rank, fisher_ratios, pair_statistics, spectrum
from lpft_nb.geometry.sums import Undefined, feature_sums, merged

FEW = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)


@FEW
@given(st.integers(2, 30), st.integers(1, 8), seeds)
def test_pairs_equal_the_loop(examples, size, seed):
    features = draw(examples, size, seed)
    found = pair_statistics(feature_sums(features))
    rows = features.numpy()
    dots = [rows[i] @ rows[j] for i in range(examples) for j in range(examples) if i != j]
    assert found["mean_dot"] == pytest.approx(np.mean(dots), abs=1e-10)
    assert found["mean_cosine"] == pytest.approx(mean_cosine(features), abs=1e-12)


@FEW
@given(st.integers(2, 30), st.integers(1, 8), seeds, st.floats(1e-3, 1e3))
def test_effective_rank_equals_that_of_singular_values(examples, size, seed, scale):
    features = draw(examples, size, seed)
    singular = np.linalg.svd((features - features.mean(dim=0)).numpy(), compute_uv=False)
    shares = singular[singular > 1e-6 * singular[0]]
    shares = shares / shares.sum()
    found = effective_rank(feature_sums(features))
    assert found == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert 1 - 1e-9 <= found <= min(size, examples - 1) + 1e-6
    turn = torch.linalg.qr(draw(size, size, seed + 1, 0.0)).Q
    assert effective_rank(feature_sums(scale * features @ turn - 3)) == pytest.approx(
        found, rel=1e-6
    )


def test_closed_forms_of_the_spectrum():
    corners = torch.cat([torch.eye(3), -torch.eye(3)]).double()  # variance 1/3 along each axis
    torch.testing.assert_close(spectrum(feature_sums(corners)), torch.full((3,), 1 / 3).double())
    assert effective_rank(feature_sums(corners)) == pytest.approx(3)
    line = torch.tensor([[1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    assert effective_rank(feature_sums(line)) == pytest.approx(1)


@FEW
@given(st.integers(30, 60), st.integers(1, 6), st.integers(2, 4), seeds)
def test_fisher_ratios_equal_the_matrices_and_merge(examples, size, classes, seed):
    features, labels = draw(examples, size, seed), torch.arange(examples) % classes
    between, within = scatters(features, labels)
    sums = merged(feature_sums(features[i::4], labels=labels[i::4]) for i in range(4))
    found = fisher_ratios(sums)
    assert found["fisher_ratio"] == pytest.approx(np.trace(np.linalg.pinv(within) @ between))
    shrunk = 0.9 * within + 0.1 * np.trace(within) / size * np.eye(size)
    assert found["fisher_ratio_shrunk"] == pytest.approx(np.trace(np.linalg.solve(shrunk, between)))


def test_points_have_an_infinite_ratio_though_means_round():
    points = torch.tensor([[0.1, 0.7], [0.3, 0.2]]).double()[torch.arange(30) % 2]
    sums = merged(feature_sums(points[i::3], labels=(torch.arange(30) % 2)[i::3]) for i in range(3))
    assert fisher_ratios(sums) == {"fisher_ratio": math.inf, "fisher_ratio_shrunk": math.inf}


def test_unbalanced_classes_are_weighted_by_their_size():
    features = torch.tensor([[1.0], [3.0], [3.0], [1.0], [6.0], [8.0]])
    found = fisher_ratios(feature_sums(features, labels=[0, 0, 0, 0, 1, 1]))
    assert found["fisher_ratio"] == pytest.approx(
        50 / 9
    )  # means 2 and 7: (4·25/9 + 2·100/9)/6 over 1


UNDEFINED = {
    "one example": (lambda: pair_statistics(feature_sums(torch.ones(1, 3))), "two examples"),
    "equal points": (lambda: effective_rank(feature_sums(torch.full((9, 3), 0.1))), "same vector"),
    "no labels": (lambda: fisher_ratios(feature_sums(draw(9, 3, 0))), "no labels"),
    "one class": (
        lambda: fisher_ratios(feature_sums(draw(9, 3, 0), labels=[2] * 9)),
        "two classes",
    ),
    "single examples": (
        lambda: fisher_ratios(feature_sums(draw(3, 3, 0), labels=[0, 1, 2])),
        r"classes of \[1, 1, 1\]",
    ),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_is_not_defined_says_why(name):
    work, message = UNDEFINED[name]
    with pytest.raises(Undefined, match=message):
        work()
