"""ReLU networks and their kernel: sampling, autograd, other people's kernel regression, very wide nets, faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from sklearn.kernel_ridge import KernelRidge
from teachers_oracle import projector, randn

from lpft_nb.teachers.relu import (
    ReluNetwork,
    fit_residual,
    kernel_spread,
    network_kernel,
    relu_kernel,
    residual_bound,
    sphere_bound,
    start_relu,
    train_relu,
)

FEW = settings(deadline=None, max_examples=25)
close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def units(*shape, seed=0):
    return torch.nn.functional.normalize(randn(*shape, seed=seed), dim=-1)


def frames(count, dimension, seed=0):
    """Points of the sphere in random orthonormal frames, count times dimension of them."""
    signs = randn(count, 1, dimension, seed=seed + 1).sign()  # the decomposition fixes some
    return (torch.linalg.qr(randn(count, dimension, dimension, seed=seed)).Q * signs).flatten(0, 1)


def by_arc_cosine(inputs, others):
    """The kernel as the papers write it, entry by entry, for inputs of any length."""
    table = np.empty((len(inputs), len(others)))
    for i, x in enumerate(inputs.numpy()):
        for j, z in enumerate(others.numpy()):
            cosine = x @ z / np.linalg.norm(x) / np.linalg.norm(z)
            table[i, j] = x @ z * (math.pi - math.acos(min(1.0, max(-1.0, cosine)))) / math.tau
    return torch.from_numpy(table)


# --- the kernel in the limit


def test_the_kernel_against_random_neurons():
    inputs, others = randn(4, 5) * torch.tensor([[0.1], [1.0], [2.0], [5.0]]), randn(3, 5, seed=1)
    neurons = randn(300_000, 5, seed=2)
    on, also = ((points @ neurons.T > 0).double() for points in (inputs, others))
    sampled = (inputs @ others.T) * (on @ also.T) / len(neurons)
    slack = 5 * (inputs @ others.T).abs() * 0.5 / len(neurons) ** 0.5
    assert ((relu_kernel(inputs, others) - sampled).abs() < slack).all()


@pytest.mark.parametrize(
    ("degrees", "value"), [(0, 1 / 2), (60, 1 / 6), (90, 0), (120, -1 / 12), (180, 0)]
)
def test_known_values(degrees, value):
    angle = math.radians(degrees)
    kernel = relu_kernel([[1.0, 0.0]], [[math.cos(angle), math.sin(angle)]])
    assert kernel.item() == pytest.approx(value, rel=0, abs=1e-15)


@pytest.mark.parametrize("angle", [1e-4, 1e-7, 1e-10])
def test_small_angles_keep_their_digits(angle):
    kernel = relu_kernel([[1.0, 0.0]], [[math.cos(angle), math.sin(angle)]])
    lost = (0.5 - kernel[0, 0].item()) / (angle / math.tau)
    assert lost == pytest.approx(1, rel=4 * angle + 1e-15 / angle)


@FEW
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 500), st.floats(0.01, 50))
def test_properties_of_the_kernel(examples, dimension, seed, factor):
    inputs = randn(examples, dimension, seed=seed)
    others = randn(3, dimension, seed=seed + 1)
    kernel, cross = relu_kernel(inputs), relu_kernel(inputs, others)
    close(cross, by_arc_cosine(inputs, others), rtol=1e-6, atol=1e-7)
    close(kernel, kernel.T)
    close(kernel.diagonal(), inputs.square().sum(dim=1) / 2)
    assert torch.linalg.eigvalsh(kernel)[0] > -1e-12 * kernel.trace()
    turn = torch.linalg.qr(randn(dimension, dimension, seed=seed + 2)).Q
    close(relu_kernel(inputs @ turn, others @ turn), cross)
    close(relu_kernel(factor * inputs, others / factor), cross)
    close(relu_kernel(factor * inputs), factor**2 * kernel)
    close(cross - relu_kernel(inputs, -others), inputs @ others.T / 2)  # on for one of x', -x'
    less_linear = kernel - inputs @ inputs.T / 4
    assert torch.linalg.eigvalsh(less_linear)[0] > -1e-12 * kernel.trace()
    stacked = relu_kernel(torch.stack([inputs, 2 * inputs]), others)
    close(stacked, torch.stack([cross, 2 * cross]))


# --- networks of finite width


@FEW
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 500))
def test_the_finite_kernel_is_that_of_autograd(examples, dimension, width, seed):
    inputs, others = randn(examples, dimension, seed=seed), randn(2, dimension, seed=seed + 1)
    network = ReluNetwork(randn(width, dimension, seed=seed + 2), randn(width, seed=seed + 3))

    def answers(weights, points):
        return (points @ weights.T).relu() @ network.head / width**0.5

    close(network(inputs), answers(network.weights, inputs))
    left, right = (
        torch.func.jacrev(answers)(network.weights, points).flatten(1)
        for points in (inputs, others)
    )
    close(network_kernel(network, inputs, others), left @ right.T)
    close(network_kernel(network, inputs), left @ left.T)


@pytest.mark.parametrize("paired", [True, False])
def test_mean_and_spread_of_random_networks(paired):
    inputs = randn(3, 4)
    networks = start_relu(12, 4, (20_000,), generator=generator(), paired=paired)
    away = network_kernel(networks, inputs) - relu_kernel(inputs)
    exact = kernel_spread(inputs, 6 if paired else 12)
    assert (away.mean(dim=0).abs() < 5 * exact / 20_000**0.5).all()
    close(away.square().mean(dim=0).sqrt(), exact, rtol=0.04, atol=0)


def test_starts():
    inputs = randn(6, 3)
    paired = start_relu(10, 3, (4,), generator=generator())
    assert paired.width == 10 and paired.dimension == 3 and paired(inputs).shape == (4, 6)
    assert paired(inputs).abs().max() < 1e-15
    single = start_relu(7, 3, (2000,), generator=generator(), paired=False)
    assert set(single.head.unique().tolist()) == {-1.0, 1.0} and abs(single.head.mean()) < 0.05
    close(single.weights.var(), torch.ones(()).double(), rtol=0.05, atol=0)
    squares = single(inputs).square().mean(dim=0)  # E relu(w'x)^2 = |x|^2 / 2
    close(squares, inputs.square().sum(dim=1) / 2, rtol=0.15, atol=0)


def test_training_takes_the_steps_of_autograd():
    networks = start_relu(8, 3, (2,), generator=generator(), paired=False)
    inputs, labels = randn(2, 5, 3), randn(2, 5, seed=1)
    run = train_relu(networks, inputs, labels, steps=4, learning_rate=0.1, fitted_at=0)
    own = train_relu(networks, inputs, labels, steps=1, fitted_at=0)
    for index in range(2):
        weights = networks.weights[index].clone().requires_grad_()
        for step in range(5):
            hidden = (inputs[index] @ weights.T).relu()
            errors = hidden @ networks.head[index] / 8**0.5 - labels[index]
            loss = errors.square().sum() / 2
            close(run.losses[step, index], loss.detach())
            (gradient,) = torch.autograd.grad(loss, weights)
            if step == 0:
                top = torch.linalg.eigvalsh(network_kernel(networks, inputs)[index])[-1]
                close(own.network.weights[index], (weights - gradient / top).detach())
            if step < 4:
                weights = (weights - 0.1 * gradient).detach().requires_grad_()
        close(run.network.weights[index], weights.detach())
    close(run.network.head, networks.head)
    close(run.left_over, run.losses[-1] / run.losses[0])


def test_training_stops_when_the_slowest_draw_is_fitted():
    networks = start_relu(64, 4, (3,), generator=generator())
    inputs, labels = randn(3, 5, 4), randn(3, 5, seed=1)
    run = train_relu(networks, inputs, labels, fitted_at=1e-6)
    assert run.left_over.max() <= 1e-6 < (run.losses[-2] / run.losses[0]).max()
    nothing = train_relu(run.network, inputs, run.network(inputs))
    assert len(nothing.losses) == 1 and (nothing.left_over == 0).all()
    assert torch.equal(nothing.network.weights, run.network.weights)


# --- where training ends


@FEW
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 500))
def test_kernel_regression_by_scikit_learn(examples, dimension, seed):
    inputs, points = randn(examples, dimension, seed=seed), randn(4, dimension, seed=seed + 1)
    residual = randn(examples, seed=seed + 2)
    fit = fit_residual(inputs, residual)
    kernel = by_arc_cosine(inputs, inputs)
    ridge = KernelRidge(kernel="precomputed", alpha=1e-10).fit(kernel.numpy(), residual.numpy())
    theirs = torch.from_numpy(ridge.predict(by_arc_cosine(points, inputs).numpy()))
    close(fit.change(points), theirs, rtol=1e-3, atol=1e-4)
    close(fit.change(inputs), residual, rtol=1e-6, atol=1e-6)
    close(fit.squared_norm, residual @ torch.linalg.solve(relu_kernel(inputs), residual))
    close(fit_residual(inputs, -2 * residual).change(points), -2 * fit.change(points))
    fewer = fit_residual(inputs[1:], residual[1:]).squared_norm if examples > 1 else 0.0
    assert fewer <= fit.squared_norm * (1 + 1e-9)


@pytest.mark.parametrize("time", [0.1, 1.0, 30.0])
def test_a_finite_time_by_the_matrix_exponential(time):
    inputs, points, residual = randn(5, 3), randn(4, 3, seed=1), randn(5, seed=2)
    kernel = relu_kernel(inputs)
    left = torch.from_numpy(expm(-time * kernel.numpy())) @ residual
    fit = fit_residual(inputs, residual, time=time)
    close(fit.change(inputs), residual - left)
    weights = torch.linalg.solve(kernel, residual - left)
    close(fit.change(points), relu_kernel(points, inputs) @ weights)
    close(fit.squared_norm, weights @ kernel @ weights)
    end = fit_residual(inputs, residual)
    close(fit_residual(inputs, residual, time=1e5).change(points), end.change(points))


def test_a_batch_of_fits_is_each_by_itself():
    inputs, residual, points = randn(3, 5, 4), randn(3, 5, seed=1), randn(6, 4, seed=2)
    fit = fit_residual(inputs, residual)
    for index in range(3):
        one = fit_residual(inputs[index], residual[index])
        close(fit.change(points)[index], one.change(points))
        close(fit.squared_norm[index], one.squared_norm)
    shared = fit_residual(inputs[0], residual)
    close(shared.change(points)[1], fit_residual(inputs[0], residual[1]).change(points))


def test_a_very_wide_network_ends_at_the_limit():
    inputs, labels, points = units(5, 3), randn(5, seed=1), units(200, 3, seed=2)
    limit, away = fit_residual(inputs, labels).change(points), {}
    for width in (2**9, 2**15):
        network = start_relu(width, 3, generator=generator(3))
        run = train_relu(network, inputs, labels, fitted_at=1e-12)
        away[width] = ((run.network(points) - limit).norm() / limit.norm()).item()
    assert away[2**15] < 0.02 and away[2**15] < away[2**9] / 3  # the law says a ratio of 8
    rate, steps = 0.02, 30
    some = train_relu(network, inputs, labels, steps=steps, learning_rate=rate, fitted_at=0)
    early = fit_residual(inputs, labels, time=rate * steps).change(points)
    assert (some.network(points) - early).norm() < 0.05 * early.norm()
    assert (early - limit).norm() > 0.3 * limit.norm()


def test_fine_tuning_learns_the_residual():
    many, inputs, points = units(60, 3), units(6, 3, seed=1), units(200, 3, seed=2)
    source, target = units(3, seed=3), 1.5 * units(3, seed=4)
    network = start_relu(2**13, 3, generator=generator())
    pretrained = train_relu(network, many, many @ source, fitted_at=1e-5).network
    assert (pretrained(points) - points @ source).norm() < 0.05 * (points @ source).norm()
    tuned = train_relu(pretrained, inputs, inputs @ target, fitted_at=1e-8).network
    change = tuned(points) - pretrained(points)
    residual = inputs @ target - pretrained(inputs)
    fit = fit_residual(inputs, residual).change(points)
    assert (change - fit).norm() < 0.05 * fit.norm()
    whole = fit_residual(inputs, inputs @ target).change(points)
    assert (change - whole).norm() > 0.3 * whole.norm()


# --- bounds


def test_the_residuals_term_by_hand():
    inputs, residual = units(6, 4), randn(6, seed=1)
    inverse = np.linalg.inv(by_arc_cosine(inputs, inputs).numpy())
    square = residual.numpy() @ inverse @ residual.numpy()
    assert residual_bound(inputs, residual).item() == pytest.approx(math.sqrt(2 * square / 6))


@FEW
@given(
    st.integers(1, 9),
    st.integers(2, 6),
    st.integers(0, 500),
    st.sampled_from([0.1, 1.0, math.inf]),
)
def test_what_a_linear_difference_promises(examples, dimension, seed, time):
    inputs, difference = units(examples, dimension, seed=seed), randn(dimension, seed=seed + 1)
    residual = inputs @ difference
    end = fit_residual(inputs, residual)
    onto = (projector(inputs) @ difference).square().sum()
    assert end.squared_norm <= 4 * onto * (1 + 1e-7)
    half = frames(300, dimension, seed + 2)
    points = torch.cat([half, -half])  # linear means are exact
    fit = fit_residual(inputs, residual, time=time)
    error = (fit.change(points) - points @ difference).square().mean()
    bound = sphere_bound(fit, difference.norm())
    assert error <= bound * (1 + 1e-3)
    kernel = relu_kernel(inputs)
    kept = expm(-time * kernel.numpy()) if math.isfinite(time) else np.zeros(kernel.shape)
    learned = residual - torch.from_numpy(kept) @ residual
    weights = torch.linalg.solve(kernel, learned)
    left = 4 * difference.square().sum() - 2 * weights @ residual + weights @ kernel @ weights
    close(bound, left.clamp(min=0) / (4 * dimension), rtol=1e-5, atol=1e-8)
    close(
        sphere_bound(end, difference.norm()),
        (difference.square().sum() - end.squared_norm / 4) / dimension,
    )
    hardly = fit_residual(inputs, residual, time=1e-9)
    close(sphere_bound(hardly, difference.norm()), difference.square().sum() / dimension)


@pytest.mark.parametrize("dimension", [2, 3, 6])
def test_the_largest_eigenvalue_on_the_sphere(dimension):
    points = frames(1500 // dimension, dimension)
    top = torch.linalg.eigvalsh(relu_kernel(points))[-1] / len(points)
    assert top.item() == pytest.approx(1 / (4 * dimension), rel=0.03)


# --- degenerate and wrong input


def test_parallel_inputs_may_be_learned_for_a_finite_time():
    inputs, residual = torch.tensor([[1.0, 0.5], [1.0, 0.5], [-2.0, 1.0]]), [1.0, 3.0, -1.0]
    fit = fit_residual(inputs, residual, time=1e6)
    close(fit.change(inputs[:1]), torch.tensor([2.0]).double(), rtol=1e-5, atol=0)


def test_one_pair_of_opposites_is_no_obstacle():
    fit = fit_residual([[1.0, 2.0], [-1.0, -2.0]], [1.0, 5.0])
    close(fit.change([[2.0, 4.0], [-1.0, -2.0]]), torch.tensor([2.0, 5.0]).double())


NET = start_relu(4, 2, generator=generator())
TURNED = [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
OPPOSITES = [*TURNED, *([-2 * x, -2 * y] for x, y in TURNED)]
REFUSED = {
    "a zero input": (lambda: relu_kernel([[1.0, 0.0], [0.0, 0.0]]), "row 1 is zero"),
    "NaN": (lambda: relu_kernel([[1.0, math.nan]]), "NaN"),
    "no inputs": (lambda: relu_kernel(torch.zeros(0, 3)), "inputs.*shape"),
    "no examples to fit": (lambda: fit_residual(torch.zeros(0, 3), []), "inputs.*shape"),
    "flat inputs": (lambda: relu_kernel([1.0, 2.0]), "dimensions"),
    "other length": (lambda: relu_kernel(randn(2, 3), randn(2, 2)), "others"),
    "parallel": (
        lambda: fit_residual([[1.0, 2.0], [0.0, 1.0], [3.0, 6.0]], randn(3)),
        "inputs 0 and 2 are parallel",
    ),
    "parallel in a batch": (
        lambda: fit_residual(torch.stack([randn(3, 2), randn(1, 2).repeat(3, 1)]), randn(2, 3)),
        "are parallel",
    ),
    "opposites": (lambda: fit_residual(OPPOSITES, randn(6)), "opposites"),
    "residual": (lambda: fit_residual(randn(3, 2), randn(2)), "residual: expected 3"),
    "residual NaN": (lambda: fit_residual(randn(1, 2), [math.nan]), "residual"),
    "time zero": (lambda: fit_residual(randn(2, 2), randn(2), time=0.0), "time"),
    "time NaN": (lambda: fit_residual(randn(2, 2), randn(2), time=math.nan), "time"),
    "length": (lambda: residual_bound([[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0]), "length one.* 1 to 2"),
    "distance": (lambda: sphere_bound(fit_residual([[1.0, 0.0]], [1.0]), 0.2), "distance"),
    "one dimension": (lambda: sphere_bound(fit_residual([[1.0]], [1.0]), 1.0), "two dimensions"),
    "no neurons": (lambda: kernel_spread(randn(2, 2), 0), "neurons"),
    "width": (lambda: start_relu(0, 2, generator=generator(), paired=False), "width"),
    "odd pairs": (lambda: start_relu(3, 2, generator=generator()), "even"),
    "head": (lambda: ReluNetwork(randn(3, 2), randn(2)), "head: expected one"),
    "weights": (lambda: ReluNetwork(torch.full((1, 2), math.nan), randn(1)), "weights"),
    "network inputs": (lambda: NET(randn(2, 3)), "inputs: expected 2"),
    "kernel inputs": (lambda: network_kernel(NET, randn(2, 3)), "inputs: expected 2"),
    "kernel others": (lambda: network_kernel(NET, randn(2, 2), randn(2, 3)), "others"),
    "labels": (lambda: train_relu(NET, randn(3, 2), randn(2)), "labels: expected 3"),
    "rate": (lambda: train_relu(NET, randn(3, 2), randn(3), learning_rate=50.0), "learning_rate <"),
    "rate zero": (lambda: train_relu(NET, randn(3, 2), randn(3), learning_rate=0.0), "learning"),
    "steps": (lambda: train_relu(NET, randn(3, 2), randn(3), steps=-1), "steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        call()


def test_descent_that_runs_away_is_refused():
    """The neuron sees the short input only; pushed over, it sees the long one at a rate that is too large."""
    network = ReluNetwork(torch.tensor([[1.0, 0.0]]), torch.ones(1))
    inputs = torch.tensor([[0.1, 0.0], [-1.0, 0.0]])
    with pytest.raises(ValueError, match="diverged from loss"):
        train_relu(network, inputs, [-1.0, -1.0], steps=20)
