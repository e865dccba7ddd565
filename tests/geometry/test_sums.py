"""Sums over examples: each against its definition, merging in any order and size, and what is refused."""

import pickle
from itertools import pairwise

import pytest
import torch
from feature_oracle import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.geometry import sums as module
from lpft_nb.geometry.sums import FeatureSums, feature_sums, merge, merged, sums_by_class

FEW = settings(deadline=None, max_examples=25)
FIELDS = ("counts", "means", "spreads", "units", "norms", "moves", "within", "cubes", "fourths")


def assert_same(one: FeatureSums, two: FeatureSums, tolerance: float = 1e-9):
    assert one.classes == two.classes
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(one, name), getattr(two, name), rtol=tolerance, atol=tolerance, msg=name
        )


def by_definition(features, reference, labels):
    """Equation (eq-feature-sums), one example after another."""
    sides = (features, reference)
    classes = sorted(set(labels.tolist()))
    size, pairs = features.shape[1], ((0, 0), (0, 1), (1, 1))
    means = torch.stack(
        [torch.stack([side[labels == name].mean(dim=0) for name in classes]) for side in sides]
    )
    centres = [side.mean(dim=0) for side in sides]
    within, cubes = torch.zeros(3, size, size).double(), torch.zeros(3, 2, size).double()
    spreads = torch.zeros(2, len(classes)).double()
    fourths, moves = torch.zeros(3).double(), torch.zeros(3).double()
    for i, label in enumerate(labels.tolist()):
        inner = [side[i] - means[s, classes.index(label)] for s, side in enumerate(sides)]
        hats = [side[i] - centre for side, centre in zip(sides, centres, strict=True)]
        spreads[:, classes.index(label)] += torch.stack([row @ row for row in inner])
        for p, (l, r) in enumerate(pairs):
            within[p] += torch.outer(inner[l], inner[r])
            cubes[p, 0] += hats[l] * (hats[r] @ hats[r])
            cubes[p, 1] += hats[r] * (hats[l] @ hats[l])
            fourths[p] += (hats[l] @ hats[l]) * (hats[r] @ hats[r])
        x, y = features[i], reference[i]
        gap = (x - y).norm()
        moves += torch.stack([gap, gap / y.norm(), x @ y / (x.norm() * y.norm())])
    return FeatureSums(
        classes=tuple(classes),
        counts=torch.tensor([(labels == name).sum() for name in classes]).double(),
        means=means,
        spreads=spreads,
        units=torch.stack([(side / side.norm(dim=1, keepdim=True)).sum(dim=0) for side in sides]),
        norms=torch.stack([side.norm(dim=1).sum() for side in sides]),
        moves=moves,
        within=within,
        cubes=cubes,
        fourths=fourths,
    )


@FEW
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_sums_are_those_of_the_definition(examples, size, classes, seed):
    features, reference = draw(examples, size, seed, 2.0), draw(examples, size, seed + 1, -1.0)
    labels = torch.arange(examples) % classes + 5
    assert_same(
        feature_sums(features, reference, labels), by_definition(features, reference, labels)
    )


@FEW
@given(
    st.integers(2, 40),
    st.integers(1, 6),
    st.integers(0, 10_000),
    st.lists(st.integers(1, 39), max_size=6),
    st.sampled_from([0.0, 3.0, 1e3]),
)
def test_batches_merge_to_the_whole(examples, size, seed, cuts, offset):
    features, reference = draw(examples, size, seed, offset), draw(examples, size, seed + 1)
    labels = torch.randint(0, 4, (examples,), generator=torch.Generator().manual_seed(seed))
    edges = sorted({0, examples, *(cut for cut in cuts if cut < examples)})
    parts = [feature_sums(features[a:b], reference[a:b], labels[a:b]) for a, b in pairwise(edges)]
    whole = feature_sums(features, reference, labels)
    assert_same(merged(parts), whole)
    assert_same(merged(reversed(parts)), whole)
    assert_same(merged(sums_by_class(features, reference, labels=labels).values()), whole)


def test_merging_is_associative_and_sums_travel():
    parts = [
        feature_sums(draw(n, 5, n), draw(n, 5, n + 50), torch.arange(n) % 2) for n in (3, 7, 4)
    ]
    one, two, three = (pickle.loads(pickle.dumps(part)) for part in parts)
    assert_same(merge(merge(one, two), three), merge(one, merge(two, three)))
    assert merge(one, two).examples == 10


def test_an_array_is_taken_in_blocks(monkeypatch):
    features, reference, labels = draw(50, 4, 0), draw(50, 4, 1), torch.arange(50) % 3
    whole = feature_sums(features, reference, labels)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert_same(feature_sums(features, reference, labels), whole)
    generator = (feature_sums(features[i : i + 1], reference[i : i + 1]) for i in range(50))
    assert_same(merged(generator), feature_sums(features, reference))


def test_scatter_and_one_snapshot_alone():
    features, reference, labels = draw(30, 5, 0), draw(30, 5, 1), torch.arange(30) % 4
    sums = feature_sums(features, reference, labels)
    hats = [side - side.mean(dim=0) for side in (features, reference)]
    for left, right in ((0, 0), (0, 1), (1, 1)):
        torch.testing.assert_close(sums.scatter(left, right), hats[left].T @ hats[right])
    torch.testing.assert_close(sums.centres, torch.stack([features, reference]).mean(dim=1))
    assert_same(sums.alone(0), feature_sums(features, labels=labels))
    assert_same(sums.alone(1), feature_sums(reference, labels=labels))
    assert sums.examples == 30


def test_digits_survive_a_long_common_part_and_collapsed_classes():
    features = draw(200, 6, 0, 0.0)
    near, far = feature_sums(features), feature_sums(features + 1e6)
    torch.testing.assert_close(far.scatter(), near.scatter(), rtol=1e-6, atol=1e-6)
    labels = torch.arange(200) % 2
    collapsed = 1e-6 * features + 1e3 * torch.eye(2, 6).double()[labels]
    parts = [feature_sums(collapsed[i::3], labels=labels[i::3]) for i in range(3)]
    inner = features - torch.stack([features[i::2].mean(dim=0) for i in (0, 1)])[labels]
    torch.testing.assert_close(
        merged(parts).within[0] / 1e-12, inner.T @ inner, rtol=1e-3, atol=0.05
    )


def test_types_are_summed_in_float64():
    features = draw(300, 8, 3).bfloat16()
    assert_same(feature_sums(features), feature_sums(features.double()), 0)
    assert_same(feature_sums(features.float().numpy()), feature_sums(features.double()), 0)


GOOD = draw(5, 3, 2)
REFUSED = {
    "rows that do not match": (lambda: feature_sums(GOOD, GOOD[:4]), "same examples"),
    "other size": (lambda: feature_sums(GOOD, GOOD[:, :2]), "same backbone size"),
    "NaN in the reference": (lambda: feature_sums(GOOD, GOOD * torch.nan), "reference hold NaN"),
    "a zero row": (lambda: feature_sums(torch.zeros(2, 3)), "2 zero vectors"),
    "labels that do not match": (lambda: feature_sums(GOOD, labels=[0, 1]), "each of 5 rows"),
    "labels with a point": (lambda: sums_by_class(GOOD, labels=GOOD[:, 0]), "integer label"),
    "nothing": (lambda: merged([]), "at least one batch"),
    "sizes": (lambda: merge(feature_sums(GOOD), feature_sums(GOOD[:, :2])), "'size': 3"),
    "a reference on one side": (
        lambda: merge(feature_sums(GOOD), feature_sums(GOOD, GOOD)),
        "'snapshots': 1",
    ),
    "labels on one side": (
        lambda: merge(feature_sums(GOOD), feature_sums(GOOD, labels=[0] * 5)),
        "'labels': False",
    ),
    "overflow": (lambda: feature_sums(1e90 * GOOD), "overflow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    work, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        work()
