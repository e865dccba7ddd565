"""Neural collapse: explicit scatter matrices as oracles, the exact laws of the corners of a simplex, merging, faults."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.collapse import (
    INTERVALS,
    centred_means,
    class_distance_variance,
    collapse_index,
    collapse_intervals,
    collapse_statistics,
    etf_error,
    head_statistics,
    lone_classes,
    nearest_mean_agreement,
    numerical_rank,
    simplex_statistics,
    variability,
)
from lpft_nb.features import separation_statistics
from lpft_nb.geometry.sums import Undefined, feature_sums, merge

FEW = settings(deadline=None, max_examples=25)


def cloud(counts, size, seed, spread=1.0):
    """Float64 features and labels of classes of given sizes, off the origin, in random order."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = 2 * draw(len(counts), size)[labels] + spread * draw(len(labels), size) + 5
    order = torch.randperm(len(labels), generator=generator)
    return features[order], labels[order]


clouds = st.builds(
    cloud,
    st.lists(st.integers(2, 9), min_size=2, max_size=6),
    st.integers(2, 12),
    st.integers(0, 10_000),
    st.sampled_from([0.1, 1.0]),
)


def scatters(features, labels):
    """Σ_W, Σ_B with all classes alike about the mean of all examples, and class means, example by example."""
    features, labels = features.numpy(), labels.numpy()
    classes = sorted(set(labels.tolist()))
    means = np.stack([features[labels == one].mean(axis=0) for one in classes])
    within = sum(
        np.outer(row - means[classes.index(label)], row - means[classes.index(label)])
        for row, label in zip(features, labels.tolist(), strict=True)
    ) / len(features)
    shifts = means - features.mean(axis=0)
    between = sum(np.outer(row, row) for row in shifts) / len(classes)
    return within, between, means, shifts


@FEW
@given(clouds)
def test_nc1_equals_the_trace_of_explicit_matrices(case):
    features, labels = case
    within, between, means, _ = scatters(features, labels)
    found = variability(feature_sums(features, labels=labels))
    by_hand = np.trace(within @ np.linalg.pinv(between, rcond=1e-11)) / len(means)
    assert found["nc1"] == pytest.approx(by_hand, rel=1e-6)
    assert found["nc1_quotient"] == pytest.approx(np.trace(within) / np.trace(between), rel=1e-9)
    values, vectors = np.linalg.eigh(between)
    top = range(len(values) - 1, max(len(values) - len(means), -1), -1)
    kept = [j for j in top if values[j] > 1e-11 * values[-1]]
    by_top = sum(vectors[:, j] @ within @ vectors[:, j] / values[j] for j in kept) / len(means)
    assert found["nc1"] == pytest.approx(by_top, rel=1e-6)  # the top K - 1 are all there are


@FEW
@given(clouds)
def test_the_index_equals_explicit_matrices_and_lies_between_its_ends(case):
    features, labels = case
    within, _, means, shifts = scatters(features, labels)
    shares = np.bincount(labels.numpy()) / len(features)
    between = shifts.T @ (shares[:, None] * shifts)
    inside = 0.9 * within + 0.1 * np.trace(within) / features.shape[1] * np.eye(features.shape[1])
    rank = min(len(means) - 1, features.shape[1])  # weighted shifts sum to zero
    by_hand = 1 - np.trace(np.linalg.solve(between + inside, between)) / rank
    found = collapse_index(feature_sums(features, labels=labels))
    assert found == pytest.approx(by_hand, abs=1e-9) and 0 < found < 1


@FEW
@given(clouds)
def test_pairs_and_singular_values_equal_the_loop(case):
    features, labels = case
    sums, kinds = feature_sums(features, labels=labels), labels.unique().tolist()
    parts = [features[labels == one] for one in kinds]
    variance = [part.var(dim=0, correction=0).sum().item() for part in parts]
    pairs = [
        (variance[a] + variance[b])
        / (2 * (parts[a].mean(dim=0) - parts[b].mean(dim=0)).square().sum().item())
        for a, b in itertools.combinations(range(len(parts)), 2)
    ]
    assert class_distance_variance(sums) == pytest.approx(np.mean(pairs), rel=1e-9)
    singular = torch.linalg.svdvals(features)
    by_hand = (singular.sum() ** 2 / singular.square().sum()).item()
    assert numerical_rank(sums) == pytest.approx(by_hand, rel=1e-5)
    means = torch.stack([part.mean(dim=0) for part in parts]) - features.mean(dim=0)
    cosines = [
        torch.nn.functional.cosine_similarity(means[a], means[b], dim=0).item()
        for a, b in itertools.permutations(range(len(means)), 2)
    ]
    found = simplex_statistics(sums)
    assert found["nc2_angles"] == pytest.approx(
        np.mean([abs(one + 1 / (len(means) - 1)) for one in cosines]), rel=1e-8
    )
    lengths = means.norm(dim=1).numpy()
    assert found["nc2_lengths"] == pytest.approx(lengths.std() / lengths.mean(), abs=1e-9)


def simplex(classes, size, seed=0):
    """The corners of a simplex in a random turn, (K, h)."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, classes, generator=generator, dtype=torch.float64))[0]
    return (torch.eye(classes, dtype=torch.float64) - 1 / classes) @ turn.T


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_at_the_corners_with_an_aligned_head_everything_is_zero(classes):
    corners = simplex(classes, 9)
    labels = torch.arange(4 * classes) % classes
    sums = feature_sums(corners[labels] + 2, labels=labels)
    found = collapse_statistics(sums)
    for name in ("nc1", "nc1_quotient", "collapse_index", "class_distance_variance"):
        assert found[name] == pytest.approx(0, abs=1e-12)
    assert found["nc2"] < 1e-7 and found["nc2_lengths"] < 1e-7 and found["nc2_angles"] < 1e-7
    weight = 3 * corners
    bias = -weight @ torch.full((9,), 2.0, dtype=torch.float64)
    head = head_statistics(sums, weight, bias)
    assert max(head.values()) < 1e-7
    assert (
        nearest_mean_agreement(corners[labels] + 2, (corners[labels] + 2) @ weight.T + bias, sums)
        == 1
    )


def test_nc1_overlooks_spread_at_right_angles_and_the_quotient_does_not():
    corners, labels = simplex(3, 3), torch.arange(60) % 3
    normal = torch.ones(3, dtype=torch.float64) / math.sqrt(3)
    turn = torch.linalg.svd(corners)[2][2]  # at right angles to the plane of the corners
    heights = torch.linspace(-1, 1, 20).repeat_interleave(3).double()  # alike in every class
    features = corners[labels] + heights[:, None] * turn + 4 * normal
    found = variability(feature_sums(features, labels=labels))
    assert found["nc1"] < 1e-9 < 0.1 < found["nc1_quotient"]


@FEW
@given(clouds, st.floats(0.1, 50), st.integers(0, 100))
def test_scale_turn_and_shift_change_nothing(case, factor, seed):
    features, labels = case
    generator = torch.Generator().manual_seed(seed)
    size = features.shape[1]
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    shift = 10 * torch.randn(size, generator=generator, dtype=torch.float64)
    before = collapse_statistics(features, labels)
    after = collapse_statistics(factor * features @ turn + shift, labels)
    for name in set(before) - {"numerical_rank"}:
        assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-8)


@FEW
@given(clouds, st.integers(1, 5))
def test_merged_parts_are_the_whole_also_where_a_part_lacks_a_class(case, cut):
    features, labels = case
    first, second = (
        feature_sums(features[p], labels=labels[p]) for p in (slice(cut), slice(cut, None))
    )
    joined, whole = merge(first, second), feature_sums(features, labels=labels)
    torch.testing.assert_close(joined.spreads, whole.spreads, rtol=1e-9, atol=1e-9)
    found, expected = collapse_statistics(joined), collapse_statistics(whole)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9)


@FEW
@given(clouds)
def test_nc1_and_fishers_ratio_are_bound_to_each_other(case):
    """K NC1 tr(S_W⁺ S_B) is at least (K - 1)² where the classes span no more than they vary in; equal sizes."""
    features, labels = case
    kinds, size = int(labels.max()) + 1, features.shape[1]
    per_class = size // kinds + 3
    features, labels = cloud(
        [per_class] * kinds, size, seed=int(features[0, 0].item() * 1000) % 9999
    )
    if size < kinds - 1:
        return
    nc1 = variability(feature_sums(features, labels=labels))["nc1"]
    ratio = separation_statistics(features, labels)["fisher_ratio"]
    assert kinds * nc1 * ratio >= (kinds - 1) ** 2 * (1 - 1e-6)


def test_more_classes_than_dimensions_and_a_hundred_of_them():
    features, labels = cloud([3] * 100, 5, seed=1)
    found = collapse_statistics(features, labels)
    assert all(math.isfinite(value) for value in found.values())
    within, between, means, _ = scatters(features, labels)
    assert found["nc1"] == pytest.approx(np.trace(within @ np.linalg.pinv(between)) / 100, rel=1e-8)


def test_intervals_hold_their_number_repeat_and_narrow():
    small, large = (cloud([count] * 3, 6, seed=5) for count in (10, 250))
    found = collapse_intervals(*small, draws=200)
    assert found == collapse_intervals(*small, draws=200)
    wide = collapse_intervals(*large, draws=200)
    for name in INTERVALS:
        assert found[name].low < found[name].mean < found[name].high
        assert found[name].mean == pytest.approx(collapse_statistics(*small)[name], rel=1e-9)
        relative = [(one.high - one.low) / one.mean for one in (found[name], wide[name])]
        assert relative[1] < relative[0] / 2


def test_one_draw_with_all_weights_one_equals_a_set_with_examples_twice():
    """Drawing is counting: features twice over have the numbers of the features once."""
    features, labels = cloud([4, 5, 6], 7, seed=2)
    twice = collapse_statistics(features.repeat(2, 1), labels.repeat(2))
    assert twice == pytest.approx(collapse_statistics(features, labels), rel=1e-9)


def test_the_head_is_judged_against_its_own_classes():
    corners, labels = simplex(4, 6), torch.arange(40) % 4
    sums = feature_sums(corners[labels], labels=labels)
    right = head_statistics(sums, corners, torch.zeros(4))
    mixed = head_statistics(sums, corners.roll(1, dims=0), torch.zeros(4))
    assert right["nc3"] < 1e-7 and right["nc3_duality"] < 1e-7
    assert mixed["nc3"] > 1 and mixed["nc3_duality"] > 1 and mixed["nc2_head"] < 1e-7
    mixed_up = nearest_mean_agreement(
        corners[labels], corners[labels] @ corners.roll(1, dims=0).T, sums
    )
    assert mixed_up == 0


def test_what_cannot_be_judged_is_refused_by_name():
    features, labels = cloud([5, 5], 3, seed=0)
    sums = feature_sums(features, labels=labels)
    with pytest.raises(Undefined, match="no labels"):
        collapse_statistics(features)
    with pytest.raises(Undefined, match="the class 0 alone"):
        collapse_statistics(features, torch.zeros(10, dtype=torch.int64))
    with pytest.raises(Undefined, match="one vector"):
        collapse_statistics(torch.cat([features, features]), torch.arange(2).repeat_interleave(10))
    with pytest.raises(ValueError, match="NaN"):
        collapse_statistics(features * math.nan, labels)
    with pytest.raises(ValueError, match=r"\[0, 1\].*shape \(2, 3\), got \(3, 3\)"):
        head_statistics(sums, torch.ones(3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="zero head"):
        head_statistics(sums, torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="2 finite biases"):
        head_statistics(sums, torch.ones(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(10, 2\)"):
        nearest_mean_agreement(features, torch.zeros(10, 3), sums)
    with pytest.raises(ValueError, match="K ≥ 2"):
        etf_error(torch.ones(1, 1))
    with pytest.raises(ValueError, match="all zero"):
        etf_error(torch.zeros(3, 3))


def test_a_class_of_one_is_named_and_not_drawn():
    features, labels = cloud([5, 5], 3, seed=0)
    lone = torch.cat([labels, torch.tensor([7])]), torch.cat([features, torch.ones(1, 3)])
    sums = feature_sums(lone[1], labels=lone[0])
    assert lone_classes(sums) == [7] and len(centred_means(sums)) == 3
    with pytest.raises(Undefined, match=r"\[7\] have one example"):
        collapse_intervals(lone[1], lone[0])


def test_a_class_at_the_middle_has_no_angle():
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with pytest.raises(Undefined, match="no direction"):
        simplex_statistics(feature_sums(features + 0.0, labels=torch.tensor([0, 1, 2, 2])))
