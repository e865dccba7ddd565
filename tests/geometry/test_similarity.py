"""Two clouds from their sums: tables of all pairs, quadruples, scipy; what turns, shifts and scales leave alone."""

from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_oracle import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.geometry.similarity import (
    linear_cka,
    move_statistics,
    principal_angles,
    principal_directions,
    procrustes_distance,
    unbiased_hsic,
)
from lpft_nb.geometry.sums import Undefined, feature_sums, merged

FEW = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)


def hsic_of_tables(x, y):
    """Equation (eq-hsic-pairs) on N × N tables."""
    count, one = len(x), np.ones(len(x))
    k, l = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0), np.fill_diagonal(l, 0)
    total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((count - 1) * (count - 2))
    return (total - 2 / (count - 2) * (one @ k @ l @ one)) / (count * (count - 3))


@FEW
@given(st.integers(4, 40), st.integers(1, 8), seeds, st.sampled_from([0.0, 2.0, 100.0]))
def test_hsic_and_cka_equal_the_tables_of_all_pairs(examples, size, seed, offset):
    x, y = draw(examples, size, seed, offset), draw(examples, size, seed + 1)
    y = y + 0.5 * x
    sums = merged(feature_sums(x[i::3], y[i::3]) for i in range(3))
    own = hsic_of_tables(x.numpy(), x.numpy()), hsic_of_tables(y.numpy(), y.numpy())
    cross = hsic_of_tables(x.numpy(), y.numpy())
    unit = np.sqrt(own[0] * own[1])
    assert unbiased_hsic(sums, 0, 0) == pytest.approx(own[0], rel=1e-6)
    assert unbiased_hsic(sums, 0, 1) == pytest.approx(cross, rel=1e-6, abs=1e-6 * unit)
    assert unbiased_hsic(sums, 1, 1) == pytest.approx(own[1], rel=1e-6)
    assert linear_cka(sums) == pytest.approx(cross / unit, rel=1e-6, abs=1e-6)


def test_hsic_is_the_mean_over_quadruples():
    """Without bias: the average over four different examples of a product of differences."""
    x, y = draw(6, 3, 0).numpy(), draw(6, 3, 1).numpy()
    values = [
        ((x[i] - x[j]) @ (x[k] - x[l])) * ((y[i] - y[j]) @ (y[k] - y[l])) / 4
        for i, j, k, l in permutations(range(6), 4)
    ]
    assert unbiased_hsic(feature_sums(x, y), 0, 1) == pytest.approx(np.mean(values), rel=1e-10)


@FEW
@given(st.integers(14, 40), st.integers(2, 6), seeds, st.floats(1e-2, 1e2))
def test_what_turns_shifts_and_scales_leave_alone(examples, size, seed, scale):
    x, y = draw(examples, size, seed), draw(examples, size, seed + 1)
    turn = torch.linalg.qr(draw(size, size, seed + 2, 0.0)).Q
    plain, other = feature_sums(x, y), feature_sums(scale * x @ turn + 7, y - 3)
    assert linear_cka(other) == pytest.approx(linear_cka(plain), abs=1e-8)
    assert procrustes_distance(other) == pytest.approx(procrustes_distance(plain), abs=1e-7)
    back = feature_sums(y, x)
    assert linear_cka(back) == pytest.approx(linear_cka(plain), abs=1e-10)
    assert procrustes_distance(back) == pytest.approx(procrustes_distance(plain), abs=1e-7)
    both = feature_sums(scale * x @ turn + 1, scale * y @ turn - 2)
    torch.testing.assert_close(
        principal_angles(both, size - 1), principal_angles(plain, size - 1), rtol=0, atol=1e-5
    )
    same = feature_sums(x, scale * x @ turn + 5)
    assert linear_cka(same) == pytest.approx(1, abs=1e-9)
    assert procrustes_distance(same) == pytest.approx(0, abs=1e-6)


@FEW
@given(st.integers(8, 40), st.integers(2, 8), seeds)
def test_procrustes_equals_the_best_turn_of_scipy(examples, size, seed):
    x, y = draw(examples, size, seed), draw(examples, size, seed + 1)
    sides = [(side - side.mean(dim=0)).numpy() for side in (x, y)]
    left, right = (side / np.linalg.norm(side) for side in sides)
    turn, _ = scipy.linalg.orthogonal_procrustes(left, right)
    found = procrustes_distance(feature_sums(x, y))
    assert found == pytest.approx(np.linalg.norm(left @ turn - right), abs=1e-6)
    assert 0 <= found <= np.sqrt(2)


def test_procrustes_obeys_the_triangle_inequality():
    clouds = [draw(20, 4, seed) for seed in range(8)]
    distance = lambda a, b: procrustes_distance(feature_sums(clouds[a], clouds[b]))
    for a, b, c in permutations(range(8), 3):
        assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-7


@FEW
@given(st.integers(12, 40), st.integers(3, 8), st.integers(1, 3), seeds)
def test_angles_equal_those_of_scipy(examples, size, directions, seed):
    x, y = draw(examples, size, seed), draw(examples, size, seed + 1)
    axes = [np.linalg.svd((side - side.mean(dim=0)).numpy())[2][:directions].T for side in (x, y)]
    expected = np.rad2deg(scipy.linalg.subspace_angles(*axes))[::-1]
    np.testing.assert_allclose(
        principal_angles(feature_sums(x, y), directions), expected, atol=1e-5
    )


def test_small_and_right_angles_are_known():
    cross = torch.tensor([[9.0, 0, 0], [-9, 0, 0], [0, 3, 0], [0, -3, 0], [0, 0, 1], [0, 0, -1]])
    cross, angle = cross.double(), 1e-6
    turn = torch.eye(3).double()
    turn[1:, 1:] = torch.tensor([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    found = principal_angles(feature_sums(cross + 4, cross @ turn + 4), 2)
    assert found[0].item() == pytest.approx(0, abs=1e-9)
    assert found[1].item() == pytest.approx(np.rad2deg(angle), rel=1e-6)
    swapped = principal_angles(feature_sums(cross + 4, cross[:, [0, 2, 1]] + 4), 2)
    assert swapped.tolist() == pytest.approx([0, 90], abs=1e-6)
    axes = principal_directions(feature_sums(cross + 4), 2)
    torch.testing.assert_close(axes.abs(), torch.eye(3, 2).double())


def test_moves_of_a_known_step():
    x = draw(20, 4, 0)
    found = move_statistics(feature_sums(x + torch.tensor([3.0, 4, 0, 0]), x))
    assert found["feature_change"] == pytest.approx(5)
    assert found["dot_to_reference"] == pytest.approx(
        ((x + torch.tensor([3.0, 4, 0, 0])) * x).sum(dim=1).mean().item()
    )
    assert move_statistics(feature_sums(3 * x, x))["feature_change_relative"] == pytest.approx(2)


X = draw(9, 3, 0)
POINT = torch.full((9, 3), 0.1).double()
BALL = torch.cat([torch.eye(3), -torch.eye(3)]).double() + 2
UNDEFINED = {
    "one snapshot": (lambda: move_statistics(feature_sums(X)), "no reference"),
    "CKA of one snapshot": (lambda: linear_cka(feature_sums(X)), "no reference"),
    "three examples": (lambda: linear_cka(feature_sums(X[:3], X[3:6])), "four examples, got 3"),
    "features that stand still": (lambda: linear_cka(feature_sums(POINT, X)), "all features"),
    "a reference of one point": (lambda: procrustes_distance(feature_sums(X, POINT)), "reference"),
    "more directions than there are": (
        lambda: principal_angles(feature_sums(X, X), 4),
        "4 directions were asked for, the features vary in 3",
    ),
    "fewer examples than directions": (
        lambda: principal_angles(feature_sums(X[:3], X[3:6]), 3),
        "vary in 2",
    ),
    "a round cloud": (lambda: principal_angles(feature_sums(BALL, BALL), 2), "there is no first"),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_what_is_not_defined_says_why(name):
    work, message = UNDEFINED[name]
    with pytest.raises(Undefined, match=message):
        work()


def test_no_directions_are_no_question():
    with pytest.raises(ValueError, match="at least 1"):
        principal_angles(feature_sums(X, X), 0)
