"""Feature statistics: loops over pairs as oracles, what rotations and scales do, and refused input."""

import math

import numpy as np
import pytest
import torch
from feature_oracle import draw, scatters
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.features import (
    describe,
    feature_statistics,
    feature_sums,
    layer_sums,
    linear_cka,
    mean_cosine,
    merged,
    principal_angles,
    separation_statistics,
    statistics_table,
    unit_rows,
)

FEW = settings(deadline=None, max_examples=40)


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
            "dot_to_reference": np.mean([a @ b for a, b in zip(new, old, strict=True)]),
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


@FEW
@given(st.integers(30, 60), st.integers(1, 6), st.integers(2, 4), st.integers(0, 10_000))
def test_separation_equals_the_matrices_written_out(examples, size, classes, seed):
    features, labels = draw(examples, size, seed), torch.arange(examples) % classes
    between, within = scatters(features, labels)
    found = separation_statistics(features, labels)
    assert found["fisher_ratio"] == pytest.approx(np.trace(np.linalg.pinv(within) @ between))
    shrunk = 0.9 * within + 0.1 * np.trace(within) / size * np.eye(size)
    assert found["fisher_ratio_shrunk"] == pytest.approx(np.trace(np.linalg.solve(shrunk, between)))


def test_separation_of_two_classes_on_a_line_is_known():
    features = torch.tensor([[1.0], [3.0], [7.0], [9.0]])
    assert separation_statistics(features, [0, 0, 1, 1]) == {
        "fisher_ratio": pytest.approx(9.0),  # means 2 and 8: 9 between, 1 within
        "fisher_ratio_shrunk": pytest.approx(9.0),
    }
    assert separation_statistics(features, [5, 5, 8, 8])["fisher_ratio"] == pytest.approx(9.0)


def test_separation_of_few_wide_examples_is_that_of_their_span():
    features, labels = draw(12, 40, seed=3), torch.arange(12) % 3
    between, within = scatters(features, labels)
    found = separation_statistics(features, labels)
    expected = np.trace(np.linalg.pinv(within, rcond=1e-12, hermitian=True) @ between)
    assert found["fisher_ratio"] == pytest.approx(expected, rel=1e-6)
    turn = torch.linalg.qr(draw(40, 40, seed=4)).Q
    turned = separation_statistics(0.01 * features @ turn + 5, labels)
    assert turned["fisher_ratio_shrunk"] == pytest.approx(found["fisher_ratio_shrunk"], rel=1e-6)
    points = torch.eye(3)[labels] + 1
    assert separation_statistics(points, labels)["fisher_ratio"] == np.inf


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 0, 0, 0], "at least two classes"),
        ([0, 1, 2, 3], "two examples of one"),
        ([0, 1, 0], "label for each of 4 rows"),
        ([0.0, 1.0, 0.0, 1.0], "integer label"),
    ],
)
def test_separation_refuses(labels, message):
    with pytest.raises(ValueError, match=message):
        separation_statistics(draw(4, 3, seed=0), labels)


def test_sums_know_what_arrays_know():
    features, reference, labels = draw(60, 12, 0), draw(60, 12, 1), torch.arange(60) % 3
    parts = (feature_sums(features[i::5], reference[i::5], labels[i::5]) for i in range(5))
    found = describe(merged(parts))
    at_hand = feature_statistics(features, reference) | separation_statistics(features, labels)
    assert {name: found.values[name] for name in at_hand} == pytest.approx(at_hand, rel=1e-9)
    assert found.examples == 60 and found.undefined == {}
    sums = feature_sums(features, reference)
    assert found.values["linear_cka"] == pytest.approx(linear_cka(sums))
    assert found.values["largest_principal_angle"] == pytest.approx(
        principal_angles(sums)[-1].item()
    )
    before = describe(sums.alone(1)).values
    assert before["mean_cosine"] == pytest.approx(mean_cosine(reference))
    assert "feature_change" not in before


def test_what_sums_do_not_have_is_named():
    found = describe(feature_sums(draw(3, 4, 0), draw(3, 4, 1)))
    assert set(found.undefined) == {
        "fisher_ratio",
        "fisher_ratio_shrunk",
        "linear_cka",
        "mean_principal_angle",
        "largest_principal_angle",
    }
    assert "no labels" in found.undefined["fisher_ratio"]
    assert "four examples" in found.undefined["linear_cka"]
    assert not set(found.values) & set(found.undefined)
    assert all(math.isfinite(value) for value in found.values.values())


def test_layers_and_classes_in_one_table():
    features, labels = draw(40, 12, 0), torch.arange(40) % 2
    after = {layer: features + layer for layer in (0, 1, 2)}
    sums = layer_sums(after, dict.fromkeys(after, features), labels=labels)
    assert list(sums) == [(layer, group) for layer in after for group in ("all", 0, 1)]
    table = statistics_table(sums, ["layer", "class"])
    assert list(table.columns) == ["layer", "class", "examples", "metric", "value", "reason"]
    moved = table[table["metric"] == "feature_change"].set_index(["layer", "class"])
    for (layer, group), row in moved.iterrows():
        assert row["value"] == pytest.approx(layer * 12**0.5)
        assert row["examples"] == (40 if group == "all" else 20)
    whole = separation_statistics(features, labels)["fisher_ratio"]
    separated = table[table["metric"] == "fisher_ratio"].set_index(["layer", "class"])
    assert separated.loc[(0, "all"), "value"] == pytest.approx(whole)
    alone = separated.loc[(0, 1)]
    assert math.isnan(alone["value"]) and "two classes" in alone["reason"]


def test_tables_refuse_what_does_not_belong_together():
    features, labels = draw(8, 3, 0), [0, 1] * 4
    with pytest.raises(ValueError, match="same layers"):
        layer_sums({0: features}, {1: features}, labels=labels)
    with pytest.raises(ValueError, match="2 parts"):
        statistics_table({("test",): feature_sums(features)}, ["split", "layer"])
    with pytest.raises(ValueError, match="no sums"):
        statistics_table({}, ["layer"])


# what happens to each statistic when both snapshots are multiplied by s: it is multiplied by s to this power
POWERS = {
    "mean_cosine": 0,
    "mean_dot": 2,
    "mean_norm": 1,
    "effective_rank": 0,
    "fisher_ratio": 0,
    "fisher_ratio_shrunk": 0,
    "feature_change": 1,
    "feature_change_relative": 0,
    "mean_cosine_to_reference": 0,
    "dot_to_reference": 2,
    "linear_cka": 0,
    "procrustes_distance": 0,
    "mean_principal_angle": 0,
    "largest_principal_angle": 0,
}
BLIND_TO_SHIFTS = set(POWERS) - {
    "mean_cosine",
    "mean_dot",
    "mean_norm",
    "feature_change_relative",
    "mean_cosine_to_reference",
    "dot_to_reference",
}


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_scale_turn_and_shift_of_both_snapshots(seed, scale):
    features, reference, labels = draw(60, 12, seed), draw(60, 12, seed + 1), torch.arange(60) % 3
    spread = torch.arange(1.0, 13).double()  # no two directions vary alike
    features, reference = features * spread, (reference + features) * spread
    turn = torch.linalg.qr(draw(12, 12, seed + 2, 0.0)).Q
    values = lambda *sides: describe(feature_sums(*sides, labels)).values
    plain = values(features, reference)
    assert set(plain) == set(POWERS)
    scaled = values(scale * features, scale * reference)
    assert scaled == pytest.approx(
        {name: value * scale ** POWERS[name] for name, value in plain.items()}, rel=1e-6
    )
    assert values(features @ turn, reference @ turn) == pytest.approx(plain, rel=1e-6)
    shifted = values(features + 3, reference + 3)
    for name, value in plain.items():
        assert (shifted[name] == pytest.approx(value, rel=1e-6)) == (name in BLIND_TO_SHIFTS), name
