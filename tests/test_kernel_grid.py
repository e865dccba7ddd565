"""Grids of kernel solvers: direct solves and scikit-learn as oracles, laws of scale, choices, faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.svm import SVC, SVR

from lpft_nb.kernel_grid import (
    GAMMAS,
    GRID_SOLVERS,
    MIXES,
    REGULARISATIONS,
    SCALES,
    Candidate,
    Examples,
    accuracies,
    all_scores,
    asymmetric_grid,
    fit_on_development,
    grid_of,
    least_squares_grid,
)
from lpft_nb.kernel_machines import (
    PENALTIES,
    SUPPORT_VECTOR_STEPS,
    build_problem,
    fit_kernel_machine,
)

N, M, C, W = 12, 9, 3, 50
LABELS, NEW_LABELS = torch.arange(N) % C, torch.arange(M) % C


def gradients(count, labels, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(count, C, W, generator=generator, dtype=torch.float64)
    own = torch.nn.functional.one_hot(labels, C).double()
    table[:, :, :C] += 3 * own[:, None, :] * torch.eye(C).double()
    return table


LEFT, RIGHT = gradients(N, LABELS, 0), gradients(M, NEW_LABELS, 1)
START, NEW_START = (5 * torch.randn(k, C, dtype=torch.float64) for k in (N, M))
TARGET = torch.nn.functional.one_hot(LABELS, C).double()


def product(left, right):
    return torch.einsum("ncw,mdw->ncmd", left, right)


KERNEL, CROSS = product(LEFT, LEFT), product(RIGHT, LEFT)
ASYMMETRIC = product(LEFT, LEFT.sign())
NEW = Examples(
    product(RIGHT, LEFT.sign()),
    NEW_LABELS,
    flipped=product(RIGHT.sign(), LEFT),
)


def matrix(kernel):
    return kernel.reshape(kernel.shape[0] * C, -1)


def test_least_squares_solves_its_system_at_every_point():
    grid = least_squares_grid(KERNEL, LABELS, START)
    norm = torch.linalg.matrix_norm(matrix(KERNEL), 2)
    assert [(one.settings["regularisation"], one.settings["scale"]) for one in grid] == [
        (ridge, scale) for ridge in REGULARISATIONS for scale in SCALES
    ]
    scores = all_scores(grid, Examples(CROSS, logits=NEW_START))
    for one, found in zip(grid, scores):
        ridge, scale = one.settings["regularisation"], one.settings["scale"]
        shifted = matrix(KERNEL) + ridge * norm * torch.eye(N * C).double()
        alpha = torch.linalg.lstsq(shifted, (TARGET - START / scale).flatten()).solution
        torch.testing.assert_close(one.coefficients.flatten(), alpha, rtol=1e-6, atol=1e-9)
        expected = (matrix(CROSS) @ alpha).reshape(M, C) + NEW_START / scale
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert one.condition == pytest.approx(float(torch.linalg.cond(shifted)), rel=1e-6)


def test_least_squares_equals_scikit_learns_ridge_on_the_gradients():
    "Without an intercept: the weights of Ridge on N·C rows of gradients."
    rows, new = LEFT.reshape(N * C, -1).numpy(), RIGHT.reshape(M * C, -1).numpy()
    norm = float(torch.linalg.matrix_norm(matrix(KERNEL), 2))
    for one in least_squares_grid(KERNEL, LABELS):
        ridge = one.settings["regularisation"]
        if ridge > 0:
            theirs = Ridge(alpha=ridge * norm, fit_intercept=False, solver="cholesky")
            expected = theirs.fit(rows, TARGET.flatten().numpy()).predict(new)
            found = all_scores([one], Examples(CROSS))[0].flatten().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


def test_no_ridge_on_a_singular_kernel_takes_the_smallest_coefficients():
    small = LEFT.clone()
    small[:, :, 6:] = 0  # rank six at most
    kernel = product(small, small)
    one = least_squares_grid(kernel, LABELS)[-1]
    expected = torch.linalg.pinv(matrix(kernel), hermitian=True) @ TARGET.flatten()
    torch.testing.assert_close(one.coefficients.flatten(), expected, rtol=1e-6, atol=1e-8)


def test_without_a_start_there_is_one_scale():
    grid = least_squares_grid(KERNEL, LABELS)
    assert {one.settings["scale"] for one in grid} == {math.inf}
    with_start = least_squares_grid(KERNEL, LABELS, START)
    for plain, other in zip(grid, with_start[:: len(SCALES)]):
        torch.testing.assert_close(plain.coefficients, other.coefficients)


def test_a_start_that_is_right_already_needs_no_kernel():
    grid = least_squares_grid(KERNEL, LABELS, 10 * TARGET)
    done = [one for one in grid if one.settings["scale"] == 10]
    assert max(float(one.coefficients.abs().max()) for one in done) < 1e-12


def test_the_asymmetric_machine_solves_its_system_at_every_point():
    y = (2 * TARGET - 1).flatten()
    h = y[:, None] * matrix(ASYMMETRIC) * y
    size, identity = torch.linalg.matrix_norm(h, 2), torch.eye(N * C, dtype=torch.float64)
    grid = asymmetric_grid(ASYMMETRIC, LABELS)
    scores = all_scores(grid, NEW)
    assert len(grid) == len(GAMMAS) * len(MIXES)
    for one, found in zip(grid, scores):
        gamma, mix = one.settings["gamma"], one.settings["mix"]
        system = torch.cat(
            [
                torch.cat([identity / gamma, h.T / size], dim=1),
                torch.cat([h / size, identity / gamma], dim=1),
            ]
        )
        both = torch.linalg.solve(system, torch.ones(2 * N * C, dtype=torch.float64)) / size
        alpha, beta = (y * part for part in both.split(N * C))
        expected = mix * matrix(NEW.kernel) @ alpha + (1 - mix) * matrix(NEW.flipped) @ beta
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-8)
        assert one.condition == pytest.approx(float(torch.linalg.cond(system)), rel=1e-6)


def test_a_symmetric_kernel_makes_both_machines_one():
    for one in asymmetric_grid(KERNEL, LABELS):
        mix = one.settings["mix"]
        if 0 < mix < 1:
            torch.testing.assert_close(
                one.coefficients / mix, one.mirrored / (1 - mix), rtol=1e-6, atol=1e-9
            )


@settings(deadline=None, max_examples=10)
@given(power=st.integers(-12, 12))
def test_a_scaled_kernel_gives_the_same_scores(power):
    factor = 2.0**power
    plain, scaled = (
        all_scores(least_squares_grid(f * KERNEL, LABELS), Examples(f * CROSS)) for f in (1, factor)
    )
    torch.testing.assert_close(plain, scaled, rtol=1e-8, atol=1e-8)
    both = [
        all_scores(
            asymmetric_grid(f * ASYMMETRIC, LABELS),
            Examples(f * NEW.kernel, flipped=f * NEW.flipped),
        )
        for f in (1, factor)
    ]
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_training_examples_does_not_matter(seed):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    for kernel, examples, build in (
        (KERNEL, Examples(CROSS), least_squares_grid),
        (ASYMMETRIC, NEW, asymmetric_grid),
    ):
        moved = Examples(
            examples.kernel[:, :, order],
            flipped=None if examples.flipped is None else examples.flipped[:, :, order],
        )
        other = build(kernel[order][:, :, order], LABELS[order])
        torch.testing.assert_close(
            all_scores(other, moved),
            all_scores(build(kernel, LABELS), examples),
            rtol=1e-6,
            atol=1e-7,
        )


@pytest.mark.parametrize("estimator", [SVC, SVR])
def test_support_vectors_equal_scikit_learn(estimator):
    "On the very matrix that the solver sees: libsvm stops at a tolerance, and rounding moves where."
    problem, targets = build_problem(KERNEL, LABELS), (2 * TARGET - 1).flatten().numpy()
    cross = (matrix(CROSS) / problem.scale).numpy()
    for one in grid_of(estimator.__name__.lower(), KERNEL, LABELS):
        machine = estimator(
            C=one.settings["penalty"], kernel="precomputed", max_iter=SUPPORT_VECTOR_STEPS
        )
        machine.fit(problem.matrix.numpy(), targets)
        expected = machine.decision_function(cross) if estimator is SVC else machine.predict(cross)
        found = all_scores([one], Examples(CROSS))[0].flatten()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_penalties_are_those_of_one_machine_each():
    for one, penalty in zip(grid_of("logistic", KERNEL, LABELS), PENALTIES, strict=True):
        alone = fit_kernel_machine(KERNEL, LABELS, "logistic", penalty)
        torch.testing.assert_close(all_scores([one], Examples(CROSS))[0], alone.scores(CROSS))


@pytest.mark.parametrize("solver", GRID_SOLVERS)
def test_the_first_of_the_best_points_is_chosen(solver):
    kernel, examples = (
        (ASYMMETRIC, NEW) if solver == "asymmetric" else (KERNEL, Examples(CROSS, NEW_LABELS))
    )
    fit = fit_on_development(kernel, LABELS, examples, solver=solver)
    best = int(fit.table["accuracy"].argmax())
    assert fit.chosen.settings == dict(fit.table.iloc[best][list(fit.chosen.settings)])
    assert fit.accuracy(examples) == fit.table["accuracy"].max() > 1 / C
    assert fit.scores(examples).shape == (M, C)
    assert len(fit.table) == len(grid_of(solver, kernel, LABELS))


def test_equal_scores_go_to_the_first_class():
    examples = Examples(CROSS, torch.zeros(M, dtype=torch.long))
    assert accuracies(torch.zeros(1, M, C, dtype=torch.float64), examples) == [1.0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fit_on_development(KERNEL, LABELS, Examples(CROSS)), "needs the examples' labels"),
        (
            lambda: fit_on_development(
                KERNEL, LABELS, Examples(CROSS, NEW_LABELS), logits_train=START
            ),
            "give them for the new examples too",
        ),
        (
            lambda: fit_on_development(
                ASYMMETRIC, LABELS, Examples(CROSS, NEW_LABELS), solver="asymmetric"
            ),
            "needs flipped",
        ),
        (
            lambda: fit_on_development(ASYMMETRIC, LABELS, NEW),
            "not symmetric",
        ),
        (
            lambda: fit_on_development(KERNEL, LABELS, Examples(CROSS.permute(2, 3, 0, 1), LABELS)),
            "are the two sides exchanged",
        ),
        (lambda: grid_of("lstsq", KERNEL, LABELS), "solver.*lstsq"),
        (lambda: grid_of("svc", KERNEL, LABELS, logits_train=START), "only least_squares"),
        (lambda: asymmetric_grid(CROSS, LABELS), "same examples on both sides"),
        (lambda: asymmetric_grid(0 * KERNEL, LABELS), "zero everywhere"),
        (lambda: least_squares_grid(0 * KERNEL, LABELS), "zero everywhere"),
        (lambda: least_squares_grid(KERNEL, LABELS[:-1]), "labels"),
        (lambda: least_squares_grid(KERNEL, LABELS, START[:-1]), "label|logits"),
        (
            lambda: accuracies(
                torch.full((1, M, C), float("nan")).double(), Examples(CROSS, NEW_LABELS)
            ),
            "NaN or infinity",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_candidate_that_is_constant():
    one = Candidate({}, torch.zeros(N, C, dtype=torch.float64), intercept=2.0)
    assert all_scores([one], Examples(CROSS)).unique().item() == 2.0
