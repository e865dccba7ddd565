"""Energy: loops and autograd as oracles, what shifts and orders do, the factors of a real step, refused input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.decomposition import residuals
from lpft_nb.energy import (
    class_energies,
    energies,
    energy,
    feature_motion,
    smoothed_energy,
    squared_energies,
    step_factors,
)
from lpft_nb.linear_probe import fit_logistic

FEW = settings(deadline=None, max_examples=30)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(examples, classes, seed, scale=2.0):
    """Logits and labels, every class present."""
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return scale * randn(examples, classes, seed=seed) - 1, (torch.arange(examples) % classes)[
        order
    ]


cases = st.builds(
    drawn,
    st.integers(6, 25),
    st.integers(2, 6),
    st.integers(0, 10_000),
    st.sampled_from([0.1, 2.0, 30.0]),
)


@FEW
@given(cases)
def test_energy_is_the_length_of_the_gradient_by_the_logits(case):
    logits, labels = case
    moving = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(moving, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, moving)
    torch.testing.assert_close(energies(logits, labels), gradient.norm(dim=1), rtol=1e-9, atol=1e-9)
    assert energy(logits, labels) == pytest.approx(gradient.norm(dim=1).mean().item(), abs=1e-12)


@FEW
@given(cases)
def test_class_means_equal_the_loop(case):
    logits, labels = case
    lengths = energies(logits, labels).numpy()
    expected = [lengths[labels.numpy() == label].mean() for label in range(logits.shape[1])]
    np.testing.assert_allclose(class_energies(logits, labels), expected, rtol=1e-12)


@FEW
@given(cases, st.floats(-50, 50), st.integers(0, 1000))
def test_shifts_orders_and_names_of_classes_change_nothing(case, shift, seed):
    logits, labels = case
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    names = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    renamed = torch.empty_like(logits)
    renamed[:, names] = logits
    for other, same in (((logits + shift)[order], labels[order]), (renamed, names[labels])):
        assert energy(other, same) == pytest.approx(energy(logits, labels), abs=1e-9)


@FEW
@given(cases)
def test_energy_lies_between_what_the_right_class_lacks(case):
    logits, labels = case
    lack = 1 - logits.softmax(dim=1)[torch.arange(len(labels)), labels]
    classes = logits.shape[1]
    lengths = energies(logits, labels)
    assert (lengths <= math.sqrt(2) * lack + 1e-12).all()
    assert (lengths >= math.sqrt(classes / (classes - 1)) * lack - 1e-12).all()


def test_closed_forms():
    assert energy(torch.zeros(2, 5), [0, 3]) == pytest.approx(math.sqrt(1 - 1 / 5))
    assert energy(torch.tensor([[2.0, 2.0 + math.log(3)]]), [1]) == pytest.approx(
        math.sqrt(2) * 0.25
    )
    sure = torch.tensor([[0.0, 800.0]])
    assert energies(sure, [1]).item() == 0 and energies(sure, [0]).item() == pytest.approx(2**0.5)
    assert squared_energies(torch.tensor([[1.0, 1.0], [0.5, 0.0]]), [0, 0]).tolist() == [1, 0.5]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
def test_a_head_that_predicts_smoothed_targets_has_the_smoothed_energy(classes, smoothing):
    targets = (1 - smoothing) * torch.eye(classes).double() + smoothing / classes
    logits = targets.clamp(min=1e-300).log()
    assert energy(logits, range(classes)) == pytest.approx(
        smoothed_energy(smoothing, classes), abs=1e-12
    )


def test_smoothed_targets_that_are_fitted_leave_that_energy_and_others_more():
    """h = 20: sixteen examples are in general position, two hundred are not; the head solves the smoothed problem."""
    found = {}
    for examples in (16, 200):
        features, labels = randn(examples, 20), torch.arange(examples) % 3
        targets = 0.9 * torch.nn.functional.one_hot(labels, 3).double() + 0.1 / 3
        head = torch.zeros(3, 21, dtype=torch.float64, requires_grad=True)
        matrix = torch.cat([features, torch.ones(examples, 1, dtype=torch.float64)], dim=1)
        steps = torch.optim.LBFGS(
            [head], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )

        def loss(steps=steps, head=head, matrix=matrix, targets=targets):
            steps.zero_grad()
            value = -((matrix @ head.T).log_softmax(dim=1) * targets).sum(dim=1).mean()
            value.backward()
            return value

        steps.step(loss)
        found[examples] = energy((matrix @ head.T).detach(), labels)
    assert found[16] == pytest.approx(smoothed_energy(0.1, 3), abs=1e-5)
    assert found[200] > 3 * smoothed_energy(0.1, 3)


def test_a_stronger_penalty_of_the_probe_leaves_more_energy():
    features, labels = randn(60, 8), torch.arange(60) % 3
    left = [
        energy(fit_logistic(features, labels, penalty).logits(features), labels)
        for penalty in (1e-3, 1e-2, 0.1, 1.0, 10.0)
    ]
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(math.sqrt(2 / 3), abs=0.02)


# --- motion


@FEW
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
def test_motion_equals_the_loop_over_rows(rows, size, seed):
    after, before = randn(rows, size, seed=seed).numpy(), randn(rows, size, seed=seed + 1).numpy()
    pairs = list(zip(after, before, strict=True))
    lengths = np.linalg.norm
    assert feature_motion(after, before) == pytest.approx(
        {
            "distance": np.mean([lengths(a - b) for a, b in pairs]),
            "cosine_distance": 1 - np.mean([a @ b / lengths(a) / lengths(b) for a, b in pairs]),
            "dot_product": np.mean([a @ b for a, b in pairs]),
            "norm": np.mean([lengths(a) for a, _ in pairs]),
        },
        abs=1e-12,
    )


# --- the first step


def tanh_network(seed, *, new=0):
    """A tanh layer: its features as a function of its weights, and the kernel of the features by autograd."""
    inputs, layer = randn(9 + new, 4, seed=seed), randn(5, 4, seed=seed + 1) / 2
    features = lambda matrix: torch.tanh(inputs @ matrix.T)
    jacobian = torch.func.jacrev(features)(layer).flatten(2)
    return features, layer, torch.einsum("nhp,mkp->nhmk", jacobian, jacobian[:9])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("new", [0, 3])
def test_factors_multiply_to_the_summands_and_sum_to_the_step(seed, new):
    features, layer, kernel = tanh_network(seed, new=new)
    head, labels = randn(3, 5, seed=seed + 2), torch.arange(9) % 3
    delta = residuals(features(layer)[:9] @ head.T, labels)
    parts = step_factors(kernel, head, delta=delta, learning_rate=0.3)
    for n in range(9 + new):
        total = torch.zeros(5, dtype=torch.float64)
        for i in range(9):
            wish = head.T @ delta[i]
            summand = 0.3 / 9 * kernel[n, :, i] @ wish
            total += summand
            assert parts.lengths[n, i].item() == pytest.approx(summand.norm().item(), rel=1e-10)
            assert parts.direction[i].item() == pytest.approx(
                (wish.norm() / delta[i].norm()).item()
            )
        torch.testing.assert_close(parts.change[n], total, rtol=1e-10, atol=1e-14)
        assert parts.coherence[n].item() == pytest.approx(
            (total.norm() / parts.lengths[n].sum()).item()
        )
    assert parts.energy.tolist() == pytest.approx(delta.norm(dim=1).tolist())
    assert parts.change.norm(dim=1).max() <= parts.bound


@pytest.mark.parametrize("seed", range(3))
def test_the_real_first_step_is_met_to_first_order(seed):
    features, layer, kernel = tanh_network(seed)
    head, labels = randn(3, 5, seed=seed + 2), torch.arange(9) % 3
    delta = residuals(features(layer) @ head.T, labels)
    errors = []
    for rate in (1e-3, 1e-4):
        moving = layer.clone().requires_grad_()
        torch.nn.functional.cross_entropy(features(moving) @ head.T, labels).backward()
        real = features(layer - rate * moving.grad) - features(layer)
        predicted = step_factors(kernel, head, delta=delta, learning_rate=rate).change
        errors.append(((real - predicted).norm() / real.norm()).item())
    assert errors[1] < 1e-3 and errors[0] / errors[1] == pytest.approx(10, rel=0.05)


@FEW
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 1000))
def test_each_factor_scales_with_its_own_array(head_scale, kernel_scale, seed):
    _, _, kernel = tanh_network(seed)
    head, delta = randn(2, 5, seed=seed), residuals(randn(9, 2, seed=seed), [0, 1, 0] * 3)
    plain = step_factors(kernel, head, delta=delta, learning_rate=0.1)
    scaled = step_factors(kernel_scale * kernel, head_scale * head, delta=delta, learning_rate=0.1)
    torch.testing.assert_close(scaled.kernel, kernel_scale * plain.kernel)
    torch.testing.assert_close(scaled.direction, head_scale * plain.direction)
    assert torch.equal(scaled.energy, plain.energy)
    torch.testing.assert_close(scaled.coherence, plain.coherence)


def test_the_linear_backbone_moves_all_its_features_along_the_head():
    """φ = B x: the kernel is <x, x'> times the identity, so it turns nothing and its factor is |<x, x'>|."""
    inputs, head = randn(6, 4), randn(3, 5, seed=1)
    kernel = torch.einsum("nm,hk->nhmk", inputs @ inputs.T, torch.eye(5).double())
    delta = residuals(randn(6, 3, seed=2), [0, 1, 2] * 2)
    parts = step_factors(kernel, head, delta=delta, learning_rate=1.0)
    torch.testing.assert_close(parts.kernel, (inputs @ inputs.T).abs())


def test_an_example_without_energy_adds_nothing():
    kernel, delta = tanh_network(0)[2], residuals(randn(9, 2), [0, 1, 0] * 3)
    delta[4] = 0
    parts = step_factors(kernel, randn(2, 5), delta=delta, learning_rate=0.1)
    assert parts.direction[4] == 0 and (parts.lengths[:, 4] == 0).all()
    assert parts.lengths.isfinite().all() and parts.change.isfinite().all()


GOOD = randn(5, 3)
REFUSED = {
    "probabilities": (lambda: energy(GOOD.softmax(dim=1), [0, 1, 2, 0, 1]), "look like probab"),
    "NaN": (lambda: energy(GOOD * torch.nan, [0] * 5), "NaN or infinity"),
    "label": (lambda: energy(GOOD, [0, 1, 2, 3, 1]), r"labels must lie in 0\.\.2"),
    "a label short": (lambda: energy(GOOD, [0, 1, 2, 1]), r"shape \(5,\)"),
    "no example": (lambda: energy(GOOD[:0], []), "empty"),
    "empty class": (lambda: class_energies(GOOD, [0, 0, 2, 2, 0]), r"classes \[1\].*no example"),
    "squared NaN": (lambda: squared_energies(GOOD * torch.inf, [0] * 5), "NaN or infinity"),
    "squared shape": (lambda: squared_energies(GOOD[0], [0]), "C ≥ 2"),
    "squared label": (lambda: squared_energies(GOOD, [0, 1, 2, 3, 1]), "labels must lie"),
    "smoothing": (lambda: smoothed_energy(-0.1, 3), r"share in \[0, 1\]"),
    "smoothing NaN": (lambda: smoothed_energy(math.nan, 3), r"share in \[0, 1\]"),
    "one class": (lambda: smoothed_energy(0.1, 1), "at least 2"),
    "other size": (lambda: feature_motion(GOOD, GOOD[:, :2]), "same backbone size"),
    "zero row": (lambda: feature_motion(GOOD, 0 * GOOD), "reference hold 5 zero"),
    "head of another size": (
        lambda: step_factors(tanh_network(0)[2], GOOD, delta=GOOD, learning_rate=1.0),
        r"weight must be \(C, h\)",
    ),
    "delta of other examples": (
        lambda: step_factors(tanh_network(0)[2], randn(3, 5), delta=GOOD, learning_rate=1.0),
        r"shape \(9, 3\)",
    ),
    "rate": (
        lambda: step_factors(
            tanh_network(0)[2], randn(3, 5), delta=randn(9, 3), learning_rate=-1.0
        ),
        "learning_rate must be",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
