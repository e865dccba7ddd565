"""The linearised model: parameter-space training as oracle, closed forms, first order against real networks, faults."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from lpft_nb.decomposition import residuals
from lpft_nb.linearized import LinearizedModel, descend, integrate, relaxation

EXAMPLES, CLASSES, WIDTH = 9, 3, 40
LABELS = torch.arange(EXAMPLES) % CLASSES
ONE_HOT = torch.nn.functional.one_hot(LABELS, CLASSES).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LEFT, RIGHT = randn(EXAMPLES, CLASSES, WIDTH), randn(4, CLASSES, WIDTH, seed=1)
KERNEL = torch.einsum("ncp,mdp->ncmd", LEFT, LEFT)
CROSS = torch.einsum("ncp,mdp->ncmd", RIGHT, LEFT)
START, NEW_START = randn(EXAMPLES, CLASSES, seed=2), randn(4, CLASSES, seed=3)


def in_parameter_space(rates, gradient, ridge=0.0, batches=None):
    "Train f0 + J Δθ by gradient steps on Δθ; returns the logits of the new examples."
    moved = torch.zeros(WIDTH, dtype=torch.float64)
    batches = batches or [torch.arange(EXAMPLES)] * len(rates)
    for rate, batch in zip(rates, batches):
        now = START + LEFT @ moved
        slope = torch.einsum("ncp,nc->p", LEFT[batch], gradient(now)[batch]) + ridge * moved
        moved = moved - rate / len(batch) * slope
    return NEW_START + RIGHT @ moved


def cross_entropy_gradient(now):
    return now.softmax(dim=1) - ONE_HOT


def squared_gradient(now):
    return now - ONE_HOT


# --- against parameter space


def test_steps_on_cross_entropy():
    rates = [0.3, 0.1, 0.05, 0.2] * 10
    model = LinearizedModel(START, KERNEL).descend(LABELS, rates)
    torch.testing.assert_close(
        model.predict(NEW_START, CROSS),
        in_parameter_space(rates, cross_entropy_gradient),
        rtol=1e-9,
        atol=1e-11,
    )


def test_steps_on_batches():
    batches = [
        torch.tensor([0, 5]),
        torch.tensor([8, 1, 2]),
        torch.tensor([4, 4]),
    ] * 3  # one example twice
    rates = [0.2] * 9
    model = LinearizedModel(START, KERNEL).descend(LABELS, rates, batches)
    expected = in_parameter_space(rates, cross_entropy_gradient, batches=batches)
    torch.testing.assert_close(model.predict(NEW_START, CROSS), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("time", [0.05, 1.0])
def test_flow_is_the_limit_of_small_steps(time):
    flow = LinearizedModel(START, KERNEL).flow(LABELS, time).predict(NEW_START, CROSS)
    errors = []
    for steps in (500, 1000):
        errors.append(
            (in_parameter_space([time / steps] * steps, cross_entropy_gradient) - flow)
            .norm()
            .item()
        )
    assert errors[1] < 1e-2 and errors[0] / errors[1] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_squared_loss_over_time_is_the_limit_of_small_steps(ridge):
    closed = (
        LinearizedModel(START, KERNEL)
        .fit_squared(LABELS, ridge=ridge, time=0.3)
        .predict(NEW_START, CROSS)
    )
    errors = []
    for steps in (1000, 2000):
        errors.append(
            (in_parameter_space([0.3 / steps] * steps, squared_gradient, ridge) - closed)
            .norm()
            .item()
        )
    assert errors[1] < 1e-2 and errors[0] / errors[1] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_squared_loss_at_the_end_is_least_squares(ridge):
    jacobian, target = LEFT.reshape(-1, WIDTH), (ONE_HOT - START).flatten()
    moved = jacobian.T @ torch.linalg.solve(
        jacobian @ jacobian.T + ridge * torch.eye(27).double(), target
    )
    model = LinearizedModel(START, KERNEL).fit_squared(LABELS, ridge=ridge)
    torch.testing.assert_close(
        model.predict(NEW_START, CROSS), NEW_START + RIGHT @ moved, rtol=1e-7, atol=1e-8
    )


def test_a_singular_kernel_gives_the_solution_of_smallest_norm():
    thin = LEFT[:, :, :5]
    kernel = torch.einsum("ncp,mdp->ncmd", thin, thin)
    expected = np.linalg.lstsq(
        thin.reshape(-1, 5).numpy(), (ONE_HOT - START).flatten().numpy(), rcond=None
    )[0]
    for table in (kernel, kernel.float()):
        fitted = LinearizedModel(START, table).fit_squared(LABELS).predict(START, table)
        torch.testing.assert_close(
            fitted, START + thin @ torch.from_numpy(expected), rtol=1e-3, atol=1e-3
        )


# --- closed forms


def test_relaxation_is_the_matrix_exponential():
    values = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    for value, found in zip(values, relaxation(values, 0.2, 5.0, 2)):
        # d/dt (a, 1) = ((1 - λ a) / N, 0)
        system = np.array([[-(value.item() + 0.2), 1.0], [0.0, 0.0]]) / 2
        assert found.item() == pytest.approx((expm(5.0 * system) @ np.array([0.0, 1.0]))[0])
    torch.testing.assert_close(
        relaxation(values, 0.0, math.inf, 2, 1e-12), torch.tensor([1 / 3, 2.0, 0.0]).double()
    )
    assert relaxation(values, 0.0, 0.0, 2).abs().max() == 0


def test_one_step_is_the_one_step_prediction():
    from lpft_nb.one_step import predict_step

    model = LinearizedModel(START, KERNEL).descend(LABELS, [0.1])
    expected = NEW_START + predict_step(CROSS, residuals(START, LABELS), 0.1)
    torch.testing.assert_close(model.predict(NEW_START, CROSS), expected)


def test_a_stiff_kernel_is_followed():
    stiff = 1e6 * KERNEL
    model = LinearizedModel(START, stiff).flow(LABELS, 10.0)
    fitted = model.predict(START, stiff)
    assert (fitted.argmax(dim=1) == LABELS).all()
    loss = torch.nn.functional.cross_entropy(fitted, LABELS).item()
    earlier = LinearizedModel(START, stiff).flow(LABELS, 1.0).predict(START, stiff)
    assert 0 <= loss < torch.nn.functional.cross_entropy(earlier, LABELS).item()


def test_residuals_sum_to_zero_and_the_mean_logit_of_p_stays():
    gram = torch.eye(EXAMPLES).double() + 1
    kernel = torch.einsum("nm,cd->ncmd", gram, torch.eye(CLASSES).double())
    moved = LinearizedModel(START, kernel).flow(LABELS, 3.0).predict(START, kernel)
    torch.testing.assert_close(moved.mean(dim=1), START.mean(dim=1), rtol=1e-6, atol=1e-6)


def test_time_zero_changes_nothing():
    for model in (
        LinearizedModel(START, KERNEL).fit_squared(LABELS, time=0.0),
        LinearizedModel(START, KERNEL).descend(LABELS, []),
    ):
        torch.testing.assert_close(model.predict(NEW_START, CROSS), NEW_START)


def test_half_the_time_twice_from_where_it_stopped():
    matrix = KERNEL.reshape(27, 27)
    first = integrate(START, matrix, LABELS, 0.2, 1e-10)
    halfway = START + (matrix @ first.flatten()).reshape(START.shape)
    second = integrate(halfway, matrix, LABELS, 0.2, 1e-10)
    torch.testing.assert_close(
        first + second, integrate(START, matrix, LABELS, 0.4, 1e-10), rtol=1e-6, atol=1e-8
    )


# --- a real transformer


def gradient_descent(model, batch, labels, rate, steps):
    "Plain full-batch gradient descent on the mean cross-entropy, in place."
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()


def test_predicts_gradient_descent_of_a_transformer_to_first_order(tiny_model):
    from lpft_nb.tangent_kernel import tangent_kernel

    model = tiny_model("bert", num_labels=3)
    train = model.tokenize(
        [
            "sparse matrix norm",
            "a graph of trees",
            "the film was great",
            "random sample",
            "filter the wave",
            "a cat sat",
        ]
    )
    new, labels = (
        model.tokenize(["dense tensor", "a dull movie", "solve the value"]),
        torch.arange(6) % 3,
    )
    kernel = tangent_kernel(model, train, quiet=True).total
    cross = tangent_kernel(model, new, train, quiet=True).total
    with torch.no_grad():
        start, new_start = model(**train).logits, model(**new).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    errors, time = [], 2e-3
    for shrink in (1.0, 0.5, 0.25):
        model.load_state_dict(state)
        gradient_descent(model, train, labels, shrink * time / 10, 10)
        with torch.no_grad():
            real = model(**new).logits
        predicted = (
            LinearizedModel(start, kernel)
            .descend(labels, [shrink * time / 10] * 10)
            .predict(new_start, cross)
        )
        errors.append(((real - predicted).norm() / (real - new_start).norm()).item())
    assert errors[0] < 0.2
    slope = np.polyfit(np.log([1.0, 0.5, 0.25]), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.2)  # the relative error is of first order in the time


# --- faults

MODEL = LinearizedModel(START, KERNEL)
REFUSED = {
    "probabilities": (
        lambda: LinearizedModel(START.softmax(dim=1), KERNEL),
        "look like probabilities",
    ),
    "NaN logits": (lambda: LinearizedModel(START * math.nan, KERNEL), "NaN"),
    "cross kernel for training": (lambda: LinearizedModel(NEW_START, CROSS), "same examples"),
    "logits of other examples": (
        lambda: LinearizedModel(NEW_START, KERNEL),
        "same examples and classes",
    ),
    "labels out of range": (
        lambda: LinearizedModel(START, KERNEL).fit_squared(LABELS + 1),
        r"0\.\.2",
    ),
    "labels too short": (lambda: LinearizedModel(START, KERNEL).flow(LABELS[:3], 1.0), "shape"),
    "negative ridge": (
        lambda: LinearizedModel(START, KERNEL).fit_squared(LABELS, ridge=-1.0),
        "negative",
    ),
    "NaN time": (lambda: LinearizedModel(START, KERNEL).fit_squared(LABELS, time=math.nan), "time"),
    "endless flow": (lambda: LinearizedModel(START, KERNEL).flow(LABELS, math.inf), "finite"),
    "batches and rates": (
        lambda: LinearizedModel(START, KERNEL).descend(LABELS, [0.1], []),
        "each step needs",
    ),
    "kernel of other examples": (
        lambda: (
            LinearizedModel(START, KERNEL).fit_squared(LABELS).predict(NEW_START, CROSS[:, :, :5])
        ),
        "kernel_cross",
    ),
    "logits of the wrong side": (
        lambda: LinearizedModel(START, KERNEL).fit_squared(LABELS).predict(START, CROSS),
        "as the left side",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_to_predict_before_training():
    with pytest.raises(RuntimeError, match="not trained yet"):
        MODEL.predict(NEW_START, CROSS)


def test_the_start_is_not_changed_by_training():
    logits = START.clone()
    descend(logits, KERNEL.reshape(27, 27), LABELS, [1.0] * 3)
    assert torch.equal(logits, START)
