"""Kernel machines: scikit-learn and direct solves as oracles, leaving out by fitting again, laws of scale, faults."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.svm import SVC, SVR

from lpft_nb.kernel_machines import (
    PENALTIES,
    SOLVERS,
    IllConditionedKernel,
    build_problem,
    choose_penalty,
    class_accuracy,
    factor,
    fit_kernel_machine,
    kernel_regression,
    leave_one_out_errors,
    per_logit_accuracy,
    solve_least_squares,
    solve_logistic,
    stratified_folds,
    system_condition,
)

EXAMPLES, CLASSES = 24, 3
LABELS = torch.arange(EXAMPLES) % CLASSES


def factors(examples=EXAMPLES, width=40, seed=0, labels=LABELS):
    "Gradients of C logits for each example: noise, and a part that knows the label."
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(examples, CLASSES, width, generator=generator, dtype=torch.float64)
    own = torch.nn.functional.one_hot(labels, CLASSES).double()
    table[:, :, :CLASSES] += 3 * own[:, None, :] * torch.eye(CLASSES).double()
    return table


LEFT, NEW_LABELS = factors(), torch.arange(10) % CLASSES
RIGHT = factors(10, seed=1, labels=NEW_LABELS)
KERNEL = torch.einsum("ncp,mdp->ncmd", LEFT, LEFT)
CROSS = torch.einsum("ncp,mdp->ncmd", RIGHT, LEFT)
TARGETS = 2 * torch.nn.functional.one_hot(LABELS, CLASSES).double() - 1


def matrices(kernel=KERNEL, cross=CROSS):
    "The kernel and the cross kernel as NumPy matrices, over the mean eigenvalue."
    scale = kernel.reshape(len(kernel) * CLASSES, -1).trace() / (len(kernel) * CLASSES)
    return (kernel.reshape(len(kernel) * CLASSES, -1) / scale).numpy(), (
        cross.reshape(len(cross) * CLASSES, -1) / scale
    ).numpy()


# --- solvers against other implementations


@pytest.mark.parametrize("penalty", [0.05, 1.0, 50.0])
def test_least_squares_solves_its_normal_equations(penalty):
    matrix, cross = matrices()
    mean = 2 / CLASSES - 1
    alpha = np.linalg.solve(
        matrix + np.eye(len(matrix)) / penalty, (TARGETS - mean).flatten().numpy()
    )
    scores = fit_kernel_machine(KERNEL, LABELS, "least_squares", penalty).scores(CROSS)
    np.testing.assert_allclose(scores.flatten(), mean + cross @ alpha, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("penalty", [0.05, 1.0, 50.0])
def test_logistic_equals_scikit_learn_on_the_feature_vectors(penalty):
    matrix, cross = matrices()
    generating = np.linalg.cholesky(matrix + 1e-12 * np.eye(len(matrix)))
    theirs = LogisticRegression(C=penalty, tol=1e-10, max_iter=50_000, l1_ratio=0.0).fit(
        generating, (TARGETS > 0).flatten()
    )
    weight = np.linalg.solve(generating.T, theirs.coef_[0])
    scores = fit_kernel_machine(KERNEL, LABELS, "logistic", penalty).scores(CROSS)
    np.testing.assert_allclose(
        scores.flatten(), theirs.intercept_ + cross @ weight, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("estimator", [SVC, SVR])
@pytest.mark.parametrize("penalty", [0.05, 10.0])
def test_support_vectors_equal_scikit_learn(estimator, penalty):
    matrix, cross = matrices()
    theirs = estimator(C=penalty, kernel="precomputed").fit(matrix, TARGETS.flatten())
    expected = theirs.decision_function(cross) if estimator is SVC else theirs.predict(cross)
    scores = fit_kernel_machine(KERNEL, LABELS, estimator.__name__.lower(), penalty).scores(CROSS)
    np.testing.assert_allclose(scores.flatten(), expected, rtol=1e-8, atol=1e-9)


def test_rows_is_the_papers_procedure_to_the_letter():
    rows, cross = (
        KERNEL.reshape(EXAMPLES * CLASSES, -1).numpy(),
        CROSS.reshape(-1, EXAMPLES * CLASSES).numpy(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paper = LogisticRegressionCV(max_iter=10_000, random_state=0).fit(
            rows, (TARGETS > 0).flatten()
        )
    machine = fit_kernel_machine(KERNEL, LABELS, "rows")
    answers = (machine.scores(CROSS) > 0).flatten().numpy()
    assert machine.penalty == pytest.approx(float(np.ravel(paper.C_)[0]))
    assert (answers == paper.predict(cross)).all()
    assert per_logit_accuracy(machine.scores(CROSS), NEW_LABELS) == pytest.approx(
        paper.score(cross, torch.nn.functional.one_hot(NEW_LABELS, CLASSES).bool().flatten())
    )


def test_the_logistic_optimum_has_no_gradient_in_the_kernels_own_form():
    problem = build_problem(KERNEL, LABELS)
    alpha, intercept = solve_logistic(problem, 3.0)
    alpha, intercept = (
        alpha.requires_grad_(),
        torch.tensor(intercept, dtype=torch.float64, requires_grad=True),
    )
    answers = (problem.targets.flatten() > 0).double()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        problem.matrix @ alpha + intercept, answers, reduction="sum"
    )
    objective = 3.0 * losses + alpha @ problem.matrix @ alpha / 2
    assert all(
        gradient.abs().max() < 1e-5
        for gradient in torch.autograd.grad(objective, [alpha, intercept])
    )


# --- leaving out


@pytest.mark.parametrize("penalty", [0.1, 30.0])
def test_leave_one_out_is_fitting_again(penalty):
    problem = build_problem(KERNEL, LABELS)
    errors = leave_one_out_errors(problem, penalty)
    table = problem.matrix.reshape(EXAMPLES, CLASSES, EXAMPLES, CLASSES)
    for n in (0, 11, 23):
        kept = torch.arange(EXAMPLES) != n
        matrix = table[kept][:, :, kept].reshape((EXAMPLES - 1) * CLASSES, -1)
        alpha = torch.linalg.solve(
            matrix + torch.eye(len(matrix)).double() / penalty,
            (TARGETS - problem.mean_target)[kept].flatten(),
        )
        score = problem.mean_target + table[n][:, kept].reshape(CLASSES, -1) @ alpha
        torch.testing.assert_close(errors[n], TARGETS[n] - score)


def test_cross_validation_is_fitting_again_and_never_sees_the_held_out_labels():
    labels = LABELS[
        torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(5))
    ]  # nothing to learn, much to leak
    table = choose_penalty(
        build_problem(KERNEL, labels), "svc", penalties=(0.1, 100.0), folds=4, seed=0
    ).set_index("penalty")["score"]
    scores = []
    for held_out in stratified_folds(labels, 4, seed=0):
        kept = [n for n in range(EXAMPLES) if n not in held_out.tolist()]
        machine = fit_kernel_machine(KERNEL[kept][:, :, kept], labels[kept], "svc", 100.0)
        scores.append(
            per_logit_accuracy(machine.scores(KERNEL[held_out][:, :, kept]), labels[held_out])
        )
    assert table[100.0] == pytest.approx(np.mean(scores)) and table[100.0] < 0.8


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_choice_is_the_strongest_of_the_best(solver):
    machine = fit_kernel_machine(KERNEL, LABELS, solver, folds=4)
    best = machine.validation["score"].max()
    assert (
        machine.penalty
        == machine.validation["penalty"][machine.validation["score"] >= best - 1e-12].min()
    )
    assert set(machine.validation["penalty"]) == set(PENALTIES)


def test_folds_hold_out_examples_not_pairs():
    folds = stratified_folds(LABELS, 4, seed=3)
    assert torch.equal(torch.cat(folds).sort().values, torch.arange(EXAMPLES))
    assert all(torch.equal(LABELS[fold].bincount(), torch.tensor([2, 2, 2])) for fold in folds)


# --- laws


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_unit_of_the_kernel_does_not_matter(solver):
    small = fit_kernel_machine(KERNEL, LABELS, solver, 1.0).scores(CROSS)
    large = fit_kernel_machine(1e7 * KERNEL, LABELS, solver, 1.0).scores(1e7 * CROSS)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", ["least_squares", "logistic"])
def test_the_order_of_examples_does_not_matter(solver):
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(0))
    plain = fit_kernel_machine(KERNEL, LABELS, solver, 1.0).scores(CROSS)
    moved = fit_kernel_machine(KERNEL[order][:, :, order], LABELS[order], solver, 1.0).scores(
        CROSS[:, :, order]
    )
    torch.testing.assert_close(plain, moved, rtol=1e-5, atol=1e-7)


def test_every_machine_learns_and_scores_lie_on_the_lattice():
    parts = [
        kernel_regression({"K": KERNEL}, LABELS, {"K": CROSS}, NEW_LABELS, solver)
        for solver in (*SOLVERS, "rows")
    ]
    table = pd.concat(parts)
    values = (
        table[(table.metric == "per_logit_accuracy") & (table.split == "test")].value * 10 * CLASSES
    )
    np.testing.assert_allclose(values, values.round(), atol=1e-9)
    assert (table[(table.metric == "class_accuracy") & (table.split == "train")].value > 0.8).all()


def test_no_penalty_interpolates_with_the_smallest_norm():
    problem = build_problem(KERNEL[:8][:, :, :8], LABELS[:8])
    alpha, intercept = solve_least_squares(problem, math.inf)
    torch.testing.assert_close(
        (problem.matrix @ alpha + intercept).reshape(8, CLASSES),
        problem.targets,
        rtol=1e-6,
        atol=1e-6,
    )
    singular = build_problem(KERNEL, LABELS)  # 72 questions, rank 40
    centred = (singular.targets - singular.mean_target).flatten().numpy()
    torch.testing.assert_close(
        solve_least_squares(singular, math.inf)[0],
        torch.from_numpy(np.linalg.pinv(singular.matrix.numpy(), rcond=1e-10) @ centred),
        rtol=1e-6,
        atol=1e-6,
    )


def test_kernels_in_float32_are_not_fitted_to_their_rounding():
    single = build_problem(KERNEL.float(), LABELS)
    assert factor(single)[0].shape[1] == factor(build_problem(KERNEL, LABELS))[0].shape[1] == 40
    for solver in SOLVERS:
        double = fit_kernel_machine(KERNEL, LABELS, solver, folds=4).scores(CROSS)
        torch.testing.assert_close(
            fit_kernel_machine(KERNEL.float(), LABELS, solver, folds=4).scores(CROSS),
            double,
            rtol=1e-2,
            atol=1e-3,
        )


def test_accuracies():
    never = -torch.ones(9, 3)
    assert per_logit_accuracy(never, torch.arange(9) % 3) == pytest.approx(2 / 3)
    assert class_accuracy(never, torch.arange(9) % 3) == pytest.approx(1 / 3)  # ties go to class 0
    assert per_logit_accuracy(torch.tensor([[0.0, 1.0], [-1.0, 2.0]]), torch.tensor([1, 0])) == 0.5


# --- conditioning and faults


def test_conditioning_is_reported_by_name():
    with pytest.warns(
        IllConditionedKernel, match="P of CB: condition number inf with solver least_squares"
    ):
        machine = fit_kernel_machine(KERNEL, LABELS, penalty=math.inf, name="P of CB")
    assert math.isinf(machine.condition_number)
    problem = build_problem(KERNEL, LABELS)
    expected = np.linalg.cond(problem.matrix.numpy() + np.eye(72) / 10)
    assert system_condition(problem, "least_squares", 10.0) == pytest.approx(expected, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_kernel_machine(KERNEL, LABELS, penalty=10.0)


def test_support_vectors_that_do_not_converge_say_so(monkeypatch):
    monkeypatch.setattr("lpft_nb.kernel_solvers.SUPPORT_VECTOR_STEPS", 3)
    with pytest.warns(IllConditionedKernel, match="did not converge in 3 steps"):
        fit_kernel_machine(KERNEL, LABELS, "svc", 100.0)


MACHINE = fit_kernel_machine(KERNEL, LABELS, penalty=1.0)
REFUSED = {
    "unknown solver": (
        lambda: fit_kernel_machine(KERNEL, LABELS, "least-squares"),
        "did you mean 'least_squares'",
    ),
    "wrong axes": (
        lambda: fit_kernel_machine(KERNEL.reshape(72, 72), LABELS),
        r"shape \(N, C, M, C\)",
    ),
    "cross kernel for training": (lambda: fit_kernel_machine(CROSS, NEW_LABELS), "same examples"),
    "asymmetric": (lambda: fit_kernel_machine(KERNEL.flip(0), LABELS), "not symmetric"),
    "indefinite": (lambda: fit_kernel_machine(-KERNEL, LABELS), "positive semi-definite"),
    "NaN": (lambda: fit_kernel_machine(KERNEL * math.nan, LABELS), "NaN"),
    "zero": (lambda: fit_kernel_machine(0 * KERNEL, LABELS), "zero everywhere"),
    "label out of range": (lambda: fit_kernel_machine(KERNEL, LABELS + 1), r"0\.\.2"),
    "too few labels": (lambda: fit_kernel_machine(KERNEL, LABELS[:5]), "shape"),
    "one class": (lambda: fit_kernel_machine(KERNEL, 0 * LABELS), "two classes"),
    "penalty": (lambda: fit_kernel_machine(KERNEL, LABELS, penalty=0.0), "penalty must be > 0"),
    "penalty of rows": (
        lambda: fit_kernel_machine(KERNEL, LABELS, "rows", penalty=1.0),
        "rows chooses its own",
    ),
    "folds": (lambda: fit_kernel_machine(KERNEL, LABELS, "svc", folds=9), r"2\.\.8"),
    "exchanged sides": (lambda: MACHINE.scores(CROSS.permute(2, 3, 0, 1)), "exchanged"),
    "other training examples": (lambda: MACHINE.scores(CROSS[:, :, :5]), "kernel_cross must be"),
    "NaN in the cross kernel": (lambda: MACHINE.scores(CROSS * math.nan), "kernel_cross holds NaN"),
    "scores of one axis": (lambda: class_accuracy(torch.zeros(4), LABELS[:4]), "shape"),
    "NaN scores": (lambda: class_accuracy(torch.full((4, 3), math.nan), LABELS[:4]), "NaN"),
    "names differ": (
        lambda: kernel_regression({"P": KERNEL}, LABELS, {"F": CROSS}, NEW_LABELS),
        "same kernels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
