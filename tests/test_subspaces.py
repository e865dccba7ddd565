"""Kernels of random subspaces against real projections and closed forms; distances after the best scale."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lpft_nb.subspaces import (
    draw_subspace_kernel,
    kernel_distance,
    kernel_rank,
    subspace_error,
)


def kernel_of(seed, examples=3, classes=2, parameters=40):
    """A positive definite kernel and the gradients behind it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(examples * classes, parameters, generator=generator, dtype=torch.float64)
    rows = rows * torch.logspace(0, -1, examples * classes, dtype=torch.float64)[:, None]
    return (rows @ rows.T).reshape(examples, classes, examples, classes), rows


@pytest.mark.parametrize("dimension", [1, 3, 50])
def test_draws_have_the_moments_of_real_projections(dimension):
    kernel, rows = kernel_of(0)
    exact, draws = rows @ rows.T, 3000
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(
        draws, rows.shape[1], dimension, generator=generator, dtype=torch.float64
    )
    projected = rows @ directions / dimension**0.5
    projected = projected @ projected.mT
    drawn = torch.stack([draw_subspace_kernel(kernel, dimension, generator) for _ in range(draws)])
    drawn = drawn.reshape(projected.shape)
    variance = (exact.diagonal()[:, None] * exact.diagonal() + exact.square()) / dimension
    for sample in (projected, drawn):
        assert ((sample.mean(0) - exact).abs() / (variance / draws).sqrt()).max() < 4.5
        ratio = (sample - exact).square().mean(0) / variance
        assert ratio.min() > 0.75 and ratio.max() < 1.35
        error = (sample - exact).square().sum((1, 2)).mean().sqrt() / exact.norm()
        assert error.item() == pytest.approx(subspace_error(kernel, dimension), rel=0.05)
    thirds = [  # beyond the second moment: of the first diagonal entry
        ((sample[:, 0, 0] / exact[0, 0] - 1) ** 3).mean().item() for sample in (projected, drawn)
    ]
    assert thirds[1] == pytest.approx(8 / dimension**2, rel=0.5, abs=0.02)
    assert thirds[0] == pytest.approx(8 / dimension**2, rel=0.5, abs=0.02)


def test_a_draw_repeats_and_does_not_depend_on_threads_of_the_generator():
    kernel, _ = kernel_of(3)
    draws = [draw_subspace_kernel(kernel, 7, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == kernel.shape and draws[0].dtype == torch.float64


@given(seed=st.integers(0, 50), dimension=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_a_draw_is_symmetric_semidefinite_and_of_at_most_so_many_directions(seed, dimension):
    kernel, _ = kernel_of(seed)
    matrix = draw_subspace_kernel(kernel, dimension, torch.Generator().manual_seed(seed))
    matrix = matrix.reshape(6, 6)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=0)
    values = torch.linalg.eigvalsh(matrix)
    assert values[0] > -1e-12 * values[-1]
    assert (values > 1e-12 * values[-1]).sum() <= dimension


def test_directions_that_the_kernel_lacks_stay_empty():
    kernel, _ = kernel_of(0)
    singular = kernel.clone().reshape(6, 6)
    singular[2], singular[:, 2] = 0, 0
    drawn = draw_subspace_kernel(
        singular.reshape(kernel.shape), 30, torch.Generator().manual_seed(0)
    )
    assert drawn.reshape(6, 6)[2].abs().max() < 1e-7 * drawn.abs().max()


def test_many_directions_in_blocks_give_the_kernel_back():
    kernel, _ = kernel_of(2)
    drawn = draw_subspace_kernel(kernel, 2**20, torch.Generator().manual_seed(0))
    assert ((drawn - kernel).norm() / kernel.norm()).item() < 5 * subspace_error(kernel, 2**20)


def test_effective_rank_counts_equal_directions():
    identity = 3 * torch.eye(6, dtype=torch.float64).reshape(3, 2, 3, 2)
    assert kernel_rank(identity) == pytest.approx(6)
    one = torch.arange(1.0, 7).outer(torch.arange(1.0, 7)).reshape(3, 2, 3, 2)
    assert kernel_rank(one) == pytest.approx(1)
    assert subspace_error(one, 200) == pytest.approx(0.1)
    assert subspace_error(identity, 7) == pytest.approx(1)


def test_the_distance_is_that_at_the_best_scale():
    first, second = kernel_of(0)[0], kernel_of(1)[0]
    loss = lambda scale: ((scale * first - second).norm() / second.norm()).item()
    best = minimize_scalar(loss, bounds=(0, 10), method="bounded", options={"xatol": 1e-9})
    found = kernel_distance(first, second)
    assert found == pytest.approx(best.fun, rel=1e-6)
    cosine = ((first * second).sum() / first.norm() / second.norm()).item()
    assert found == pytest.approx(math.sqrt(1 - cosine**2))
    assert found == pytest.approx(kernel_distance(second, first))  # a sine has no sides
    assert kernel_distance(1e-6 * first, second) == pytest.approx(found)
    assert kernel_distance(first, 5 * first) < 1e-12


def test_no_negative_scale_makes_an_opposite_kernel_near():
    kernel = kernel_of(0)[0]
    assert kernel_distance(-kernel, kernel) == 1


def test_what_is_no_kernel_is_refused():
    kernel, generator = kernel_of(0)[0], torch.Generator()
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            draw_subspace_kernel(kernel, wrong, generator)
        with pytest.raises(ValueError, match="at least 1"):
            subspace_error(kernel, wrong)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        draw_subspace_kernel(-kernel, 3, generator)
    with pytest.raises(ValueError, match="not zero"):
        kernel_rank(0 * kernel)
    with pytest.raises(ValueError, match="not zero"):
        kernel_distance(0 * kernel, kernel)
    with pytest.raises(ValueError, match="one shape"):
        kernel_distance(kernel, kernel[:2, :, :2])
    with pytest.raises(ValueError):
        kernel_distance(kernel[:2], kernel[:2])
    with pytest.raises(ValueError):
        draw_subspace_kernel(kernel * float("nan"), 3, generator)
