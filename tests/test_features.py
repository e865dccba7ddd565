"""Feature statistics: loops over pairs as oracles, what rotations and scales do, and refused input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.features import feature_statistics, mean_cosine, unit_rows

FEW = settings(deadline=None, max_examples=40)


def draw(examples, size, seed, offset=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, size, generator=generator, dtype=torch.float64) + offset


clouds = st.builds(
    draw,
    st.integers(2, 25),
    st.integers(1, 9),
    st.integers(0, 10_000),
    st.sampled_from([0.1, 1.0, 30.0]),
)


@FEW
@given(clouds)
def test_mean_cosine_equals_the_loop_over_pairs(features):
    rows = features.numpy()
    pairs = [
        rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
        for i in range(len(rows))
        for j in range(len(rows))
        if i != j
    ]
    assert mean_cosine(features) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert -1 / (len(rows) - 1) - 1e-12 <= mean_cosine(features) <= 1 + 1e-12


@FEW
@given(clouds, st.integers(0, 10_000))
def test_change_equals_the_loop_over_rows(features, seed):
    reference = draw(*features.shape, seed)
    ours = feature_statistics(features, reference)
    new, old = features.numpy(), reference.numpy()
    distances = [np.linalg.norm(a - b) for a, b in zip(new, old, strict=True)]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(new, old, strict=True)]
    assert ours == pytest.approx(
        {
            "mean_cosine": mean_cosine(features),
            "mean_norm": np.mean([np.linalg.norm(a) for a in new]),
            "feature_change": np.mean(distances),
            "feature_change_relative": np.mean(
                [d / np.linalg.norm(b) for d, b in zip(distances, old, strict=True)]
            ),
            "mean_cosine_to_reference": np.mean(cosines),
        },
        abs=1e-10,
    )


def test_closed_forms():
    assert mean_cosine(torch.eye(4).double()) == pytest.approx(0, abs=1e-15)
    assert mean_cosine(torch.tensor([[1.0], [-1.0]]).double()) == pytest.approx(-1)
    assert mean_cosine(torch.ones(5, 3).double()) == pytest.approx(1)
    still = feature_statistics(torch.eye(3), torch.eye(3))
    assert (
        still["feature_change"],
        still["feature_change_relative"],
        still["mean_cosine_to_reference"],
    ) == (0, 0, 1)


@FEW
@given(clouds, st.floats(1e-3, 1e3), st.integers(0, 10_000))
def test_rotation_scale_and_order(features, scale, seed):
    rows, size = features.shape
    turn = torch.linalg.qr(draw(size, size, seed, 0.0)).Q
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    plain = feature_statistics(features)
    other = feature_statistics((scale * features @ turn)[order])
    assert other["mean_cosine"] == pytest.approx(plain["mean_cosine"], abs=1e-11)
    assert other["mean_norm"] == pytest.approx(scale * plain["mean_norm"], rel=1e-11)
    reference = draw(rows, size, seed + 1)
    change = feature_statistics(features, reference)
    both = feature_statistics(scale * features @ turn, scale * reference @ turn)
    assert both["feature_change"] == pytest.approx(scale * change["feature_change"], rel=1e-10)
    assert both["feature_change_relative"] == pytest.approx(
        change["feature_change_relative"], rel=1e-10
    )


def test_the_reference_is_the_denominator():
    ours = feature_statistics(3 * torch.eye(2), torch.eye(2))
    assert (ours["feature_change"], ours["feature_change_relative"]) == (2, 2)
    assert (ours["mean_norm"], ours["mean_cosine_to_reference"]) == (3, 1)


def test_narrow_cones_keep_their_digits():
    features = draw(2000, 64, 0, offset=0.0)
    features[:, 0] += 1e5
    units = unit_rows(features)
    gram = (units @ units.T).fill_diagonal_(0)
    assert 1 - mean_cosine(features) == pytest.approx(
        1 - gram.sum().item() / (2000 * 1999), rel=1e-3
    )


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_very_short_and_very_long_rows(scale):
    features = draw(10, 4, 0)
    assert mean_cosine(scale * features) == pytest.approx(mean_cosine(features), abs=1e-12)


def test_half_precision_is_summed_in_float64():
    features = draw(500, 16, 1).bfloat16()
    assert feature_statistics(features) == feature_statistics(features.double())
    assert feature_statistics(features.float().numpy()) == feature_statistics(features.double())


GOOD = draw(5, 3, 2)
BAD_ROW = torch.tensor([1])
REFUSED = {
    "zero vector": (
        GOOD.clone().index_fill_(0, BAD_ROW, 0),
        None,
        r"features hold 1 zero vectors.*\[1\]",
    ),
    "NaN": (GOOD.clone().index_fill_(0, BAD_ROW, torch.nan), None, r"NaN.*1 of 5 rows.*\[1\]"),
    "infinity": (GOOD.clone().index_fill_(0, BAD_ROW, torch.inf), None, "infinity"),
    "one example": (GOOD[:1], None, "at least two examples"),
    "no example": (GOOD[:0], None, r"shape \(N, h\)"),
    "one dimension": (GOOD[0], None, r"shape \(N, h\)"),
    "token features": (GOOD[None], None, r"shape \(N, h\)"),
    "row count": (GOOD, GOOD[:4], "same examples"),
    "one reference for all": (GOOD, GOOD[:1], "same examples"),
    "other size": (GOOD, GOOD[:, :2], "same backbone size"),
    "NaN reference": (GOOD, GOOD.clone().index_fill_(0, BAD_ROW, torch.nan), "reference hold NaN"),
    "zero reference": (GOOD, GOOD.clone().index_fill_(0, BAD_ROW, 0), "reference hold 1 zero"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    features, reference, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        feature_statistics(features, reference)
