"""Frozen layers, the probed head and the best head: simulations, a grid, least squares by scikit-learn, faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from teachers_oracle import projector, randn, world

from lpft_nb.one_step import linear_model_kernels
from lpft_nb.teachers.flow import gradient_flow, start_weights
from lpft_nb.teachers.freezing import (
    best_head_flow,
    frozen_fine_tuned,
    least_frozen_risk,
    probed_head,
    risk_in_and_out,
)
from lpft_nb.teachers.spans import risk, span_of

FEW = settings(deadline=None, max_examples=25)
close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("depth", "frozen"), [(2, 1), (3, 1), (3, 2), (4, 2)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_flow_with_frozen_layers(depth, frozen, sign):
    inputs, _, source, other = world(4, 6, 2)
    target = sign * source + 0.5 * other
    saddle = sign < 0 and depth - frozen > 1
    weights = start_weights(source, depth, generator=generator())
    flow = gradient_flow(
        inputs, inputs @ target, weights, frozen=frozen, time=6.0 if saddle else 60.0
    )
    end = frozen_fine_tuned(span_of(inputs), source, target, free_layers=depth - frozen)
    assert (sign < 0) == ((inputs @ source) @ (inputs @ target) < 0)
    slack = 0.05 if saddle else 1e-5  # zero is approached slowly
    close(flow.end, end, rtol=slack, atol=slack)
    for layer, before in zip(flow.weights[:frozen], weights):
        assert torch.equal(layer, before)


@FEW
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 300), st.floats(0, 2))
def test_the_best_multiple_by_least_squares_and_by_a_grid(examples, dimension, seed, decay):
    inputs, spectrum, source, target = world(examples, dimension, seed, decay=decay)
    theirs = LinearRegression(fit_intercept=False).fit(
        (inputs @ source)[:, None].numpy(), (inputs @ target).numpy()
    )
    end = frozen_fine_tuned(span_of(inputs), source, target)
    close(end, theirs.coef_[0] * source, rtol=1e-6, atol=1e-8)
    least = least_frozen_risk(source, target, spectrum)
    grid = torch.linspace(-5, 5, 4001).double()[:, None] * source
    risks = risk(grid, target, spectrum)
    assert least <= risks.min() * (1 + 1e-9) + 1e-12
    assert least <= risk(end, target, spectrum) * (1 + 1e-9) + 1e-12
    turn = torch.linalg.qr(randn(dimension, dimension, seed=4)).Q
    turned = least_frozen_risk(turn @ source, turn @ target, turn * spectrum @ turn.T)
    close(turned, least)


def test_orthogonal_teachers_learn_nothing_behind_a_frozen_layer():
    source = randn(6)
    target = randn(6, seed=1)
    target = target - source * (source @ target) / (source @ source)
    close(least_frozen_risk(source, target), target.square().sum())
    everything = frozen_fine_tuned(span_of(torch.eye(6)), source, target)
    assert everything.norm() < 1e-12
    close(least_frozen_risk(source, -3 * source), torch.zeros(()).double(), atol=1e-9, rtol=0)


def test_inputs_that_show_nothing_of_the_source_move_nothing():
    source = torch.tensor([0.0, 0.0, 2.0]).double()
    span = span_of([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    close(frozen_fine_tuned(span, source, randn(3)), source)


@FEW
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 300))
def test_the_probed_head_is_the_nearest_least_squares_solution(examples, features, seed):
    inputs, _, _, target = world(examples, 6, seed)
    backbone, start = randn(6, features, seed=seed + 5), randn(features, seed=seed + 6)
    labels, table = inputs @ target, inputs @ backbone
    expected = start + torch.linalg.pinv(table) @ (labels - table @ start)
    close(probed_head(inputs, labels, backbone, start), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_outside_the_span_only_the_head_decides(seed):
    inputs, _, _, target = world(4, 7, seed)
    backbone, head = randn(7, 2, seed=seed + 3) / 2, randn(2, 1, seed=seed + 4)
    flow = gradient_flow(inputs, inputs @ target, [backbone, head], fitted_at=1e-16, tolerance=1e-9)
    span, onto = span_of(inputs), projector(inputs)
    inherited = backbone @ flow.weights[1][:, 0]
    close(flow.end, onto @ target + inherited - onto @ inherited, rtol=1e-5, atol=1e-6)
    inside, outside = risk_in_and_out(span, flow.end, target)
    assert inside < 1e-10
    close(inside + outside, risk(flow.end, target))
    off = span.off(randn(7, seed=9))
    close(flow.weights[0].T @ off, backbone.T @ off)
    part_f = linear_model_kernels(off[None], inputs, backbone.T, head.T)[1]
    assert part_f.abs().max() < 1e-10  # the kernel says the same of one step


def test_a_head_that_fits_makes_fine_tuning_stand_still():
    inputs, _, _, _ = world(5, 7, 3)
    backbone = torch.linalg.qr(randn(7, 2)).Q
    target = backbone @ randn(2, seed=8)
    head = probed_head(inputs, inputs @ target, backbone)
    flow = gradient_flow(inputs, inputs @ target, [backbone, head[:, None]], time=50.0)
    close(flow.end, target)
    close(best_head_flow(inputs, inputs @ target, backbone, time=50.0).end, target)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_head_turns_the_backbone_and_follows_the_reduced_gradient(seed):
    inputs, _, _, target = world(5, 7, seed)
    labels, backbone = inputs @ target, randn(7, 2, seed=seed + 3)
    flow = best_head_flow(inputs, labels, backbone, time=300.0, fitted_at=1e-14, tolerance=1e-9)
    turned, head = flow.weights
    close(turned.T @ turned, backbone.T @ backbone, rtol=1e-5, atol=1e-6)
    assert flow.unseen_drift < 1e-10
    close(head[:, 0], torch.linalg.lstsq(inputs @ turned, labels[:, None]).solution[:, 0])
    assert (flow.losses.diff() <= 1e-12).all()

    def reduced(weights):
        table = inputs @ weights
        return (
            table @ torch.linalg.lstsq(table, labels[:, None]).solution - labels[:, None]
        ).square().mean() / 2

    leaf = backbone.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reduced(leaf), leaf)
    step = best_head_flow(inputs, labels, backbone, time=1e-6)
    moved = (step.weights[0] - backbone) / 1e-6
    close(moved, -gradient, rtol=1e-3, atol=1e-4)


SPAN = span_of(randn(2, 4))
REFUSED = {
    "no free layer": (lambda: frozen_fine_tuned(SPAN, randn(4), randn(4), free_layers=0), "free"),
    "a source of zero": (lambda: least_frozen_risk(torch.zeros(3), randn(3)), "zero"),
    "length": (lambda: frozen_fine_tuned(SPAN, randn(4), randn(3)), "target"),
    "backbone": (lambda: probed_head(randn(2, 4), randn(2), randn(3, 2)), "inputs"),
    "labels": (lambda: best_head_flow(randn(2, 4), randn(3), randn(4, 2)), "labels"),
    "NaN": (lambda: best_head_flow(randn(2, 4), [1.0, math.nan], randn(4, 2)), "labels"),
    "predictor": (lambda: risk_in_and_out(SPAN, randn(3), randn(3)), "predictor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        call()
