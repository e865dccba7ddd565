"""Deep linear networks: the closed form against the flow of all layers, the equation's root, the saddle, faults."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from teachers_oracle import projector, randn, world

from lpft_nb.teachers.deep import (
    SaddleError,
    check_depth,
    deep_fine_tuned,
    meets_saddle,
    squared_ratio,
)
from lpft_nb.teachers.flow import gradient_flow, product, start_weights
from lpft_nb.teachers.regression import fine_tuned
from lpft_nb.teachers.spans import span_of

FEW = settings(deadline=None, max_examples=25)
close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- oracles


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(2, 6),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from(["free", "multiple", "negative multiple", "orthogonal"]),
    st.integers(0, 300),
)
def test_the_flow_of_all_layers_ends_at_the_closed_form(
    depth, examples, dimension, repeat, decay, kind, seed
):
    inputs, _, source, target = world(examples, dimension, seed, repeat=repeat, decay=decay)
    target = {
        "free": target,
        "multiple": 0.6 * source,
        "negative multiple": -0.7 * source,
        "orthogonal": target - source * (source @ target) / (source @ source),
    }[kind]
    span = span_of(inputs)
    seen = span.values[span.values > 0]
    assume(seen[-1] > 0.35 * seen[0])
    assume(depth == 1 or span.onto(target).norm() > 0.1)
    # a path that comes near the saddle is slow, and its own tests follow it
    assume(depth == 1 or "negative" not in kind or span.off(source).norm() > 0.3 * source.norm())
    start = start_weights(source, depth, width=2, generator=generator(seed))
    close(product(start), source)
    flow = gradient_flow(inputs, inputs @ target, start, fitted_at=1e-14, tolerance=1e-9)
    end = deep_fine_tuned(span, source, target, depth=depth)
    close(flow.end, end, rtol=1e-4, atol=1e-4)
    assert flow.balance_drift < 1e-6 and flow.unseen_drift < 1e-10


@pytest.mark.parametrize("depth", [2, 3])
def test_a_negative_multiple_is_reached_where_something_keeps_the_path_from_zero(depth):
    inputs, _, source, _ = world(3, 6, 11)
    span, target = span_of(inputs), -0.7 * source
    flow = gradient_flow(
        inputs, inputs @ target, start_weights(source, depth, generator=generator())
    )
    close(flow.end, deep_fine_tuned(span, source, target, depth=depth), rtol=1e-5, atol=1e-6)


@FEW
@given(st.floats(0, 1e6), st.floats(0, 1), st.integers(1, 2000))
def test_the_root_solves_its_equation(seen, kept, depth):
    root = squared_ratio(*torch.tensor([seen, kept], dtype=torch.float64), depth).item()
    assert math.isfinite(root) and root >= 0
    assert root == pytest.approx(seen + kept * root ** (1 - 1 / depth), rel=1e-8, abs=1e-300)
    assert root >= seen * (1 - 1e-9)


def test_known_roots():
    ones = torch.tensor([0.0, 0.5, 1.0, 4.0]).double()
    close(squared_ratio(ones, torch.zeros(4).double(), 5), ones)  # nothing is kept
    close(squared_ratio(1 - ones[:3], ones[:3], 9), torch.ones(3).double())  # z = 1
    a, b = torch.tensor([0.3, 0.8], dtype=torch.float64)
    close(squared_ratio(a, b, 2), ((b + (b**2 + 4 * a).sqrt()) / 2) ** 2)
    close(squared_ratio(torch.zeros(()).double(), b, 7), b**7)


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_a_bent_path_into_the_saddle_is_found(depth):
    rates, goal = np.array([2.0, 0.7, 0.3]), np.array([0.5, -1.0, 0.8])
    unit = -rates * goal / np.linalg.norm(rates * goal)

    def backwards(_, state):
        direction = state[1:] / np.linalg.norm(state[1:])
        gradient = rates * (math.exp(state[0]) * direction - goal)
        along = direction @ gradient
        return np.concatenate([[depth * along], gradient - along * direction])

    def long_enough(_, state):
        return state[0] - math.log(1.5)

    long_enough.terminal = True
    run = solve_ivp(
        backwards,
        (0, 1e3),
        [math.log(1e-9), *unit],
        rtol=1e-12,
        atol=1e-14,
        method="DOP853",
        events=long_enough,
    )
    assert len(run.t_events[0])
    source = torch.from_numpy(math.exp(run.y[0, -1]) * run.y[1:, -1])
    source = 1.5 * source / source.norm()
    cosine = source.numpy() @ goal / (1.5 * np.linalg.norm(goal))
    assert cosine > -0.999  # no ray
    inputs = torch.from_numpy(np.diag(np.sqrt(3 * rates)))
    span, target = span_of(inputs), torch.from_numpy(goal)
    assert meets_saddle(span, source, target, depth=depth)
    with pytest.raises(SaddleError, match="saddle"):
        deep_fine_tuned(span, source, target, depth=depth)
    beside = source + 1e-2 * randn(3, seed=5)
    assert not meets_saddle(span, beside, target, depth=depth)
    close(deep_fine_tuned(span, beside, target, depth=depth), target)


@pytest.mark.parametrize("depth", [2, 4, math.inf])
def test_the_straight_path_into_the_saddle_is_refused_and_named(depth):
    isotropic, source = span_of(randn(4, 4).svd().U), randn(4, seed=3)
    with pytest.raises(SaddleError, match="saddle"):
        deep_fine_tuned(isotropic, source, -0.5 * source, depth=depth)
    close(deep_fine_tuned(isotropic, source, 0.2 * source, depth=depth), 0.2 * source)
    one = span_of(randn(1, 4, seed=1))
    within = one.onto(source)
    with pytest.raises(SaddleError, match="draw"):
        deep_fine_tuned(one, within, -2 * within, depth=depth)
    draws = torch.stack([source, source])
    with pytest.raises(SaddleError, match=r"\(1,\)"):
        deep_fine_tuned(isotropic, draws, torch.stack([0.5 * source, -0.5 * source]), depth=depth)


def test_one_layer_passes_through_zero():
    source = randn(3)
    close(deep_fine_tuned(span_of(torch.eye(3)), source, -0.5 * source, depth=1), -0.5 * source)


def test_the_simulation_stays_at_the_saddle_while_rounding_is_small():
    source = randn(3, seed=2)
    inputs = 3**0.5 * torch.eye(3).double()
    start = start_weights(source, 2, generator=generator())
    flow = gradient_flow(inputs, inputs @ (-0.5 * source), start, time=20.0)
    assert flow.shortest < 1e-4 * source.norm()
    close(flow.losses[-1], (0.5 * source).square().sum() / 2, rtol=1e-3, atol=0)


# --- properties


@FEW
@given(st.integers(1, 5), st.integers(6, 9), st.integers(0, 300), st.booleans())
def test_depth_one_and_the_limit(examples, dimension, seed, repeat):
    inputs, _, source, target = world(examples, dimension, seed, repeat=repeat)
    span, onto = span_of(inputs), projector(inputs)
    close(deep_fine_tuned(span, source, target, depth=1), fine_tuned(span, source, target))
    limit = deep_fine_tuned(span, source, target, depth=math.inf)
    seen = (onto @ target).norm() / (onto @ source).norm()
    close(limit, onto @ target + seen * (source - onto @ source))
    if (onto @ source).norm() > 0.2 * source.norm():
        close(deep_fine_tuned(span, source, target, depth=10**6), limit, rtol=1e-3, atol=1e-3)


@FEW
@given(
    st.integers(1, 5), st.integers(6, 9), st.integers(1, 8), st.floats(0.1, 10), st.integers(0, 99)
)
def test_scaling_laws(examples, dimension, depth, factor, seed):
    inputs, _, source, target = world(examples, dimension, seed)
    span = span_of(inputs)
    end = deep_fine_tuned(span, source, target, depth=depth)
    close(deep_fine_tuned(span, factor * source, factor * target, depth=depth), factor * end)
    close(inputs @ end, inputs @ target)
    limit = deep_fine_tuned(span, source, target, depth=math.inf)
    close(deep_fine_tuned(span, factor * source, target, depth=math.inf), limit)
    close(deep_fine_tuned(span, source, factor * source, depth=math.inf), factor * source)


def test_a_target_of_the_source_is_left_alone_at_every_depth():
    inputs, _, source, _ = world(3, 7, 0)
    for depth in (1, 2, 9, 1000, math.inf):
        close(deep_fine_tuned(span_of(inputs), source, source, depth=depth), source)


def test_a_batch_of_draws_is_each_by_itself():
    inputs, source, target = randn(4, 3, 6), randn(4, 6, seed=1), randn(4, 6, seed=2)
    batch = deep_fine_tuned(span_of(inputs), source, target, depth=3)
    for index in range(4):
        one = deep_fine_tuned(span_of(inputs[index]), source[index], target[index], depth=3)
        close(batch[index], one)


@pytest.mark.parametrize("error", [0.0, 1e-13])
def test_a_start_that_fits_to_rounding_is_the_end(error):
    inputs, _, source, _ = world(4, 6, 5)
    weights = start_weights(source, 2, generator=generator())
    flow = gradient_flow(inputs, (1 + error) * (inputs @ source), weights, time=20.0)
    assert flow.times.tolist() == [0.0] and flow.balance_drift == flow.unseen_drift == 0
    for layer, before in zip(flow.weights, weights):
        assert torch.equal(layer, before)
    moved = gradient_flow(inputs, 1.01 * (inputs @ source), weights, fitted_at=1e-8)
    assert len(moved.times) > 1 and moved.losses[-1] < 1e-7 * moved.losses[0]


def test_conserved_quantities_of_unbalanced_starts():
    inputs, _, source, target = world(3, 5, 8)
    start = start_weights(source, 3, generator=generator(), scales=(2.0, 0.25, 2.0))
    close(product(start), source)
    flow = gradient_flow(inputs, inputs @ target, start, fitted_at=1e-14, tolerance=1e-9)
    assert flow.balance_drift < 1e-7 and flow.unseen_drift < 1e-11 and flow.losses[-1] < 1e-12
    assert (flow.end - deep_fine_tuned(span_of(inputs), source, target, depth=3)).norm() > 0.01
    balanced = start_weights(source, 3, generator=generator())
    for left, right in pairwise(balanced):
        close(left.T @ left, right @ right.T)


# --- faults

SPAN = span_of(randn(2, 4))
REFUSED = {
    "half a layer": (lambda: check_depth(1.5), "depth"),
    "no layer": (lambda: deep_fine_tuned(SPAN, randn(4), randn(4), depth=0), "depth"),
    "NaN layers": (lambda: check_depth(math.nan), "depth"),
    "a source of zero": (
        lambda: deep_fine_tuned(SPAN, torch.zeros(4), randn(4), depth=2),
        "zero is the saddle",
    ),
    "no limit": (
        lambda: deep_fine_tuned(SPAN, SPAN.off(randn(4, seed=5)), randn(4, seed=1), depth=math.inf),
        "no limit",
    ),
    "length": (lambda: deep_fine_tuned(SPAN, randn(3), randn(4), depth=2), "source"),
    "scales": (
        lambda: start_weights(randn(4), 2, generator=generator(), scales=(2.0, 2.0)),
        "product 1",
    ),
    "start at zero": (lambda: start_weights(torch.zeros(4), 2, generator=generator()), "saddle"),
    "all frozen": (
        lambda: gradient_flow(
            randn(2, 4), randn(2), start_weights(randn(4), 2, generator=generator()), frozen=2
        ),
        "frozen",
    ),
    "labels": (
        lambda: gradient_flow(
            randn(2, 4), randn(3), start_weights(randn(4), 2, generator=generator())
        ),
        "labels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        call()
