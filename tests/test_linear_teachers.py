"""The face of the linear world: draws that depend on seed and number alone, risks over draws, faults."""

import math

import pytest
import torch

from lpft_nb import linear_teachers
from lpft_nb.intervals import confidence_interval
from lpft_nb.linear_teachers import Design, draw_worlds, isotropic_mean_risk, sample_risks


def test_a_draw_depends_on_its_number_and_the_seed_only():
    design = Design(6, 3, alpha=0.5, epsilon=0.3, decay=1.0)
    many, one = draw_worlds(design, range(5), seed=3), draw_worlds(design, [4], seed=3)
    other = draw_worlds(design, [4], seed=4)
    for batch, single, different in zip(many, one, other):
        assert torch.equal(batch[4], single[0]) and not torch.equal(single, different)


def test_blocks_change_nothing(monkeypatch):
    design = Design(7, 4, epsilon=1.0)
    whole = sample_risks(design, 10).sort_values(["predictor", "seed"], ignore_index=True)
    monkeypatch.setattr(linear_teachers, "BLOCK", 3 * 7 * 4)
    parts = sample_risks(design, 10).sort_values(["predictor", "seed"], ignore_index=True)
    assert (whole["predictor"] == parts["predictor"]).all()
    torch.testing.assert_close(torch.tensor(whole["value"]), torch.tensor(parts["value"]))
    assert whole.groupby("predictor")["seed"].nunique().eq(10).all()


def test_moments_of_a_design():
    design = Design(20, 5, alpha=-0.5, epsilon=0.7, decay=1.0, source_length=2.0)
    inputs, source, target = draw_worlds(design, range(2000))
    torch.testing.assert_close(source.norm(dim=1), torch.full((2000,), 2.0).double())
    new = (target + 0.5 * source).square().sum(dim=1)
    interval = confidence_interval(new.numpy(), level=0.9999)
    assert interval.low < 0.7**2 < interval.high
    variances = inputs.square().mean(dim=(0, 1))
    torch.testing.assert_close(variances, design.spectrum, rtol=0.1, atol=0)
    assert design.spectrum.mean().item() == pytest.approx(1)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 2.0])
def test_the_law_through_the_face(alpha):
    frame = sample_risks(Design(30, 10, alpha=alpha, epsilon=0.4), 800, seed=1)
    distances = {
        "fine-tuned": math.hypot(alpha - 1, 0.4),
        "from scratch": math.hypot(alpha, 0.4),
    }
    for name, distance in distances.items():
        values = frame[frame["predictor"] == name]["value"].to_numpy()
        interval = confidence_interval(values, level=0.9999)
        assert interval.low < isotropic_mean_risk(10, 30, distance) < interval.high


@pytest.mark.parametrize(
    "fields", [{"dimension": 0}, {"examples": 0}, {"epsilon": -1.0}, {"alpha": math.nan}]
)
def test_refuses_a_design_that_is_none(fields):
    with pytest.raises(ValueError, match="expected"):
        Design(**{"dimension": 3, "examples": 2} | fields)


def test_refuses_no_draws():
    with pytest.raises(ValueError, match="draws"):
        sample_risks(Design(3, 2), 0)
