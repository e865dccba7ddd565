"""The face of the linear world: draws that depend on seed and number alone, risks over draws, faults."""

import math

import pytest
import torch

from lpft_nb import linear_teachers
from lpft_nb.intervals import confidence_interval
from lpft_nb.linear_teachers import (
    Design,
    draw_worlds,
    fit_residual,
    isotropic_mean_risk,
    relu_kernel,
    residual_bound,
    sample_risks,
    start_relu,
    train_relu,
)
from lpft_nb.teachers import relu


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


def test_relu_networks_through_the_face():
    """Pre-train, fine-tune at two distances: the nearer task leaves less error, and the limit says how much."""
    assert relu_kernel is relu.relu_kernel and linear_teachers.ReluNetwork is relu.ReluNetwork
    generator = torch.Generator().manual_seed(0)

    def sphere(*shape):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(values, dim=-1)

    draws, dimension, points = 12, 4, sphere(300, 4)
    seen, inputs = sphere(draws, 40, dimension), sphere(draws, 6, dimension)
    source, away = sphere(draws, dimension), sphere(draws, dimension)
    start = start_relu(512, dimension, (draws,), generator=generator)
    pretrained = train_relu(start, seen, torch.einsum("bnd,bd->bn", seen, source), fitted_at=1e-4)
    risks, terms = {}, {}
    for distance in (0.5, 1.5):
        target = source + distance * away
        labels = torch.einsum("bnd,bd->bn", inputs, target)
        residual = labels - pretrained.network(inputs)
        terms[distance] = residual_bound(inputs, residual)
        tuned = train_relu(pretrained.network, inputs, labels, fitted_at=1e-6).network
        risks[distance] = (tuned(points) - target @ points.T).square().mean(dim=1)
        change = tuned(points) - pretrained.network(points)
        limit = fit_residual(inputs, residual).change(points)
        assert (change - limit).norm() < 0.15 * limit.norm()
    more = confidence_interval((risks[1.5] - risks[0.5]).numpy(), level=0.9999)
    assert more.low > 0 and (terms[1.5] > terms[0.5]).all()


def test_the_list_of_the_face_is_whole():
    """Whatever the face imports under its own name, `from … import *` gives."""
    own = {name for name, value in vars(relu).items() if name in relu.__all__ and callable(value)}
    hidden = {"directions", "angles", "refuse_singular"}
    assert own - hidden <= set(linear_teachers.__all__)


@pytest.mark.parametrize(
    "fields", [{"dimension": 0}, {"examples": 0}, {"epsilon": -1.0}, {"alpha": math.nan}]
)
def test_refuses_a_design_that_is_none(fields):
    with pytest.raises(ValueError, match="expected"):
        Design(**{"dimension": 3, "examples": 2} | fields)


def test_refuses_no_draws():
    with pytest.raises(ValueError, match="draws"):
        sample_risks(Design(3, 2), 0)
