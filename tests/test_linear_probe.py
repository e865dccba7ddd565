"""The linear probe against scikit-learn, brute force, its own invariances, and bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from lpft_nb.linear_probe import (
    FewExamplesWarning,
    ConvergenceError,
    cross_validate,
    fit_logistic,
    fit_probe,
    head_from_probe,
    probe_path,
    stable_learning_rate,
)


def make(count=60, width=5, classes=3, distance=0.7, seed=0, dtype=torch.float64):
    """Noisy clouds, `count` examples with every class about equally often."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    corners = distance * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    features = (
        corners[labels] + torch.randn(count, width, generator=generator, dtype=torch.float64) + 2.0
    )
    return features.to(dtype), labels


def objective(weight, bias, features, labels, penalty):
    """Equation (eq-probe) written out; the ridge term of two classes is ½‖v₁ - v₀‖²."""
    logits = features @ weight.T + (0 if bias is None else bias)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    ridge = (weight[1] - weight[0]).square().sum() if len(weight) == 2 else weight.square().sum()
    return penalty * loss + 0.5 * ridge


def probabilities(fit, features):
    return fit.logits(features).softmax(dim=1)


SHAPES = [(60, 5, 2), (60, 5, 3), (90, 8, 5), (20, 50, 2), (21, 50, 3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("penalty", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("count, width, classes", SHAPES)
def test_objective_and_head_agree_with_scikit_learn(count, width, classes, penalty, bias):
    features, labels = make(count, width, classes)
    fit = fit_logistic(features, labels, penalty, bias=bias)
    oracle = LogisticRegression(C=penalty, tol=1e-10, max_iter=100_000, fit_intercept=bias)
    oracle.fit(features.numpy(), labels.numpy())
    loss = -oracle.predict_log_proba(features.numpy())[np.arange(count), labels].sum()
    theirs = penalty * loss + 0.5 * np.square(oracle.coef_).sum()
    assert fit.objective <= theirs * (1 + 1e-9)
    assert fit.objective == pytest.approx(theirs, rel=1e-6)
    np.testing.assert_allclose(
        probabilities(fit, features), oracle.predict_proba(features.numpy()), atol=1e-3
    )
    assert (fit.bias is None) == (not bias)


@pytest.mark.parametrize("count, width, classes", SHAPES)
def test_against_brute_force(count, width, classes):
    features, labels = make(count, width, classes, seed=1)
    weight = torch.zeros(classes, width, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        value = objective(weight, bias, features, labels, 0.5)
        value.backward()
        return value

    optimiser.step(closure)
    fit = fit_logistic(features, labels, 0.5)
    torch.testing.assert_close(fit.weight, weight.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(fit.bias, bias.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count, width, classes", SHAPES)
def test_gradient_vanishes_and_objective_is_the_stated_one(count, width, classes, bias):
    features, labels = make(count, width, classes, seed=2)
    fit = fit_logistic(features, labels, 3.0, bias=bias)
    heads = [head.clone().requires_grad_() for head in (fit.weight, fit.bias) if head is not None]
    value = objective(heads[0], heads[1] if bias else None, features, labels, 3.0)
    assert fit.objective == pytest.approx(value.item(), rel=1e-12)
    for gradient in torch.autograd.grad(value, heads):
        assert gradient.abs().max() < 1e-6
    assert 0 <= fit.gradient_norm <= 1e-10 and fit.iterations >= 1


def test_two_classes_have_opposite_rows_and_many_sum_to_zero():
    fit = fit_logistic(*make(classes=2), 1.0)
    torch.testing.assert_close(fit.weight[0], -fit.weight[1], atol=0, rtol=0)
    fit = fit_logistic(*make(classes=4), 1.0)
    torch.testing.assert_close(
        fit.weight.sum(dim=0), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0
    )


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 4), exponent=st.floats(-3, 2))
def test_invariances(seed, classes, exponent):
    features, labels = make(40, 6, classes, seed=seed)
    penalty = 10.0**exponent
    fit = fit_logistic(features, labels, penalty)
    generator = torch.Generator().manual_seed(seed)

    order = torch.randperm(40, generator=generator)
    shuffled = fit_logistic(features[order], labels[order], penalty)
    torch.testing.assert_close(shuffled.weight, fit.weight, atol=1e-6, rtol=1e-6)

    names = torch.randperm(classes, generator=generator)
    renamed = fit_logistic(features, names[labels], penalty)
    torch.testing.assert_close(renamed.weight[names], fit.weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        probabilities(renamed, features)[:, names], probabilities(fit, features), atol=1e-6, rtol=0
    )

    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    rotated = fit_logistic(features @ rotation, labels, penalty)
    torch.testing.assert_close(rotated.weight, fit.weight @ rotation, atol=1e-6, rtol=1e-6)

    scaled = fit_logistic(1000 * features, labels, penalty / 1e6)
    torch.testing.assert_close(1000 * scaled.weight, fit.weight, atol=1e-6, rtol=1e-6)

    shifted = fit_logistic(features + 7.0, labels, penalty)
    torch.testing.assert_close(shifted.weight, fit.weight, atol=1e-6, rtol=1e-6)


def test_duplicating_all_examples_halves_the_penalty_value():
    features, labels = make()
    once = fit_logistic(features, labels, 2.0)
    twice = fit_logistic(features.repeat(2, 1), labels.repeat(2), 1.0)
    torch.testing.assert_close(twice.weight, once.weight)


def test_head_norm_grows_and_loss_falls_along_the_penalties():
    features, labels = make(seed=3)
    fits = [fit_logistic(features, labels, penalty) for penalty in np.logspace(-4, 4, 9)]
    norms = [fit.weight.norm().item() for fit in fits]
    losses = [
        torch.nn.functional.cross_entropy(fit.logits(features), labels).item() for fit in fits
    ]
    assert norms == sorted(norms) and losses == sorted(losses, reverse=True)


def test_float32_features_give_the_fit_of_their_float64_values():
    features, labels = make(dtype=torch.float32)
    single, double = (
        fit_logistic(features, labels, 1.0),
        fit_logistic(features.double(), labels, 1.0),
    )
    assert torch.equal(single.weight, double.weight)
    assert single.weight.dtype == single.bias.dtype == torch.float64


def test_bit_identical_when_repeated():
    features, labels = make(200, 30, 3)
    first, second = fit_probe(features, labels), fit_probe(features, labels)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert torch.equal(first.cross_validation.accuracy, second.cross_validation.accuracy)
    paths = [probe_path(features, labels, 5, 0.1, batch_size=16, seed=3) for _ in range(2)]
    assert torch.equal(paths[0].weight, paths[1].weight) and paths[0].history.equals(
        paths[1].history
    )


@pytest.mark.parametrize("column", [1e-20, 1e20])
def test_features_of_extreme_scale(column):
    features, labels = make(classes=2)
    fit = fit_logistic(features * column, labels, 1.0 / column**2)
    plain = fit_logistic(features, labels, 1.0)
    torch.testing.assert_close(fit.weight * column, plain.weight, atol=1e-8, rtol=1e-8)


def test_constant_features_leave_the_class_frequencies():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    fit = fit_logistic(torch.full((6, 4), 3.0), labels, 1.0)
    expected = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64) / 6
    torch.testing.assert_close(probabilities(fit, torch.full((1, 4), 3.0)), expected)
    assert fit.weight.abs().max() == 0


def test_many_classes_and_a_rare_one():
    features, labels = make(400, 30, 12, seed=5)
    labels[labels == 11] = 0
    labels[:6] = 11
    fit = fit_logistic(features, labels, 1e4)
    assert fit.gradient_norm <= 1e-10


def test_no_penalty():
    features, labels = make(200, 3, 3, distance=0.4)
    fit = fit_logistic(features, labels, math.inf)
    weak = fit_logistic(features, labels, 1e9)
    torch.testing.assert_close(fit.weight, weak.weight, atol=1e-6, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(fit.logits(features), labels, reduction="sum").item()
    assert fit.objective == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_separable_without_penalty_is_refused(classes):
    features, labels = make(20, 40, classes)
    with pytest.raises(ConvergenceError, match="separable"):
        fit_logistic(features, labels, math.inf)
    assert fit_logistic(features, labels, 1e6).gradient_norm <= 1e-10


@pytest.mark.parametrize("classes", [2, 3])
def test_the_optimum_of_far_separated_classes_is_exact(classes):
    """Losses of 1e-9 and less: lost in a difference, and in a softplus that ends at 20."""
    features, labels = make(60, 80, classes, seed=3)
    fit = fit_logistic(features * 5000, labels, 1e4)
    assert fit.gradient_norm <= 1e-10 and fit.objective / 1e4 / len(labels) < 1e-7
    logits = fit.logits(features * 5000)
    others = logits - logits.gather(1, labels[:, None])
    residuals = others.exp() / others.exp().sum(dim=1, keepdim=True)
    rows = torch.arange(len(labels))
    residuals[rows, labels] = 0
    residuals[rows, labels] = -residuals.sum(dim=1)
    pull = 1e4 * residuals.T @ (features * 5000)
    weight = fit.weight * (2 if classes == 2 else 1)
    torch.testing.assert_close(weight, -pull, rtol=1e-6, atol=1e-9 * weight.abs().max().item())


def test_cross_validation_judges_optimal_heads():
    features, labels = make(120, 150, 2, distance=0.05, seed=1)
    quick = cross_validate(features * 3000, labels, [1.0, 1e2, 1e4])
    exact = cross_validate(features * 3000, labels, [1.0, 1e2, 1e4], tolerance=1e-9)
    torch.testing.assert_close(quick.accuracy, exact.accuracy, atol=1e-12, rtol=0)


def test_too_few_iterations_are_reported():
    with pytest.raises(ConvergenceError, match="after 1 Newton steps.*standardise"):
        fit_logistic(*make(), 1.0, max_iterations=1)


@pytest.mark.parametrize("classes", [2, 3])
def test_cross_validation_agrees_with_scikit_learn(classes):
    features, labels = make(90, 12, classes, distance=0.3, seed=4)
    grid = np.logspace(-3, 2, 6)
    ours = cross_validate(features, labels, grid, folds=4, seed=7, tolerance=1e-9)
    oracle = LogisticRegressionCV(
        Cs=grid,
        cv=StratifiedKFold(4, shuffle=True, random_state=7),
        scoring="accuracy",
        tol=1e-9,
        max_iter=100_000,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
    ).fit(features.numpy(), labels.numpy())
    np.testing.assert_allclose(
        ours.accuracy.numpy().T, np.squeeze(oracle.scores_), atol=1e-12, rtol=0
    )
    assert ours.best_penalty == pytest.approx(float(oracle.C_))
    fit = fit_probe(features, labels, folds=4, seed=7, penalties=grid)
    assert fit.penalty == ours.best_penalty and fit.cross_validation.seed == 7
    torch.testing.assert_close(
        fit.weight, fit_logistic(features, labels, ours.best_penalty).weight, atol=0, rtol=0
    )


def test_repeats_are_cross_validations_with_other_folds_averaged():
    features, labels = make(90, 12, 3, distance=0.3, seed=4)
    once = cross_validate(features, labels, seed=7)
    often = cross_validate(features, labels, seed=7, repeats=4)
    parts = often.accuracy.split(5, dim=1)
    assert len(parts) == 4 and torch.equal(parts[0], once.accuracy)
    assert len({part.numpy().tobytes() for part in parts}) == 4  # no two draws alike
    best = often.accuracy.mean(dim=1).mul(1e12).round().argmax()
    assert often.best_penalty == often.penalties[best]
    fit = fit_probe(features, labels, seed=7, repeats=4)
    assert fit.penalty == often.best_penalty
    torch.testing.assert_close(fit.cross_validation.accuracy, often.accuracy)
    for repeats in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="repeats must be an integer of at least 1"):
            cross_validate(features, labels, repeats=repeats)


def test_the_end_of_the_grid_is_told():
    features, labels = make(90, 12, 3, distance=0.7, seed=4)
    inside = cross_validate(features, labels, [1e-6, 1e-2, 1e3])
    assert inside.best_penalty == 1e-2 and not inside.at_end
    for grid in ([1e-2, 1e3], [1e-6, 1e-2], [1e-2]):
        assert cross_validate(features, labels, grid).at_end


def test_cross_validation_in_pieces_is_the_same(monkeypatch):
    features, labels = make(60, 5, 3, distance=0.3)
    whole = cross_validate(features, labels, tolerance=1e-9)
    single = [
        cross_validate(features, labels, [penalty], tolerance=1e-9).accuracy
        for penalty in whole.penalties
    ]
    assert torch.equal(whole.accuracy, torch.cat(single))
    assert whole.accuracy.shape == (10, 5) and whole.accuracy.dtype == torch.float64


def test_ties_go_to_the_strongest_penalty_whatever_the_order():
    features, labels = make(60, 5, 2, distance=20.0)  # every penalty is right everywhere
    validation = cross_validate(features, labels, [10.0, 0.1, 1.0])
    assert (validation.accuracy == 1).all() and validation.best_penalty == 0.1


def test_given_penalty_skips_cross_validation():
    fit = fit_probe(*make(), penalty=0.3)
    assert fit.penalty == 0.3 and fit.cross_validation is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_path_converges_to_the_exact_optimum(classes, bias):
    features, labels = make(45, 4, classes)
    exact = fit_logistic(features, labels, 0.5, bias=bias)
    rate = 0.95 * stable_learning_rate(features, classes, bias=bias, penalty=0.5)
    path = probe_path(features, labels, 10_000, rate, bias=bias, penalty=0.5)
    torch.testing.assert_close(path.weight, exact.weight, atol=1e-7, rtol=1e-7)
    if bias:
        torch.testing.assert_close(path.bias, exact.bias, atol=1e-6, rtol=1e-6)


def test_path_from_a_random_head_reaches_the_same_function():
    features, labels = make(45, 4, 2)
    weight = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    exact = fit_logistic(features, labels, 0.5)
    rate = 0.95 * stable_learning_rate(features, 2, penalty=0.5)
    path = probe_path(features, labels, 10_000, rate, weight=weight, penalty=0.5)
    torch.testing.assert_close(
        path.weight[1] - path.weight[0], exact.weight[1] - exact.weight[0], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(path.weight.sum(dim=0), weight.double().sum(dim=0))


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("classes", [2, 3])
def test_path_is_gradient_descent(classes, batch_size):
    """A plain autograd loop takes the same steps and records the same history."""
    features, labels = make(30, 4, classes)
    start = torch.randn(classes, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = probe_path(
        features,
        labels,
        7,
        0.05,
        weight=start,
        bias_init=torch.ones(classes),
        penalty=2.0,
        batch_size=batch_size,
        seed=5,
    )
    weight, bias = (
        start.clone().requires_grad_(),
        torch.ones(classes, dtype=torch.float64, requires_grad=True),
    )
    generator, rows = torch.Generator().manual_seed(5), []
    for epoch in range(8):
        logits = features @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, labels)
        rows.append(
            [
                epoch,
                loss.item(),
                weight.norm().item(),
                (logits.argmax(1) == labels).double().mean().item(),
                (torch.eye(classes)[labels] - logits.softmax(1)).norm(dim=1).mean().item(),
            ]
        )
        order = torch.arange(30) if batch_size is None else torch.randperm(30, generator=generator)
        for part in order.split(batch_size or 30):
            logits = features[part] @ weight.T + bias
            loss = torch.nn.functional.cross_entropy(logits, labels[part])
            loss = loss + objective(weight, bias, features, labels, 0.0) / (2.0 * 30)
            gradients = torch.autograd.grad(loss, [weight, bias])
            if epoch < 7:
                with torch.no_grad():
                    weight -= 0.05 * gradients[0]
                    bias -= 0.05 * gradients[1]
    torch.testing.assert_close(path.weight, weight.detach())
    torch.testing.assert_close(path.bias, bias.detach())
    assert list(path.history.columns) == ["epoch", "loss", "head_norm", "accuracy", "energy"]
    np.testing.assert_allclose(path.history.to_numpy(), rows, rtol=1e-9)


def test_path_descends_below_the_stable_rate():
    features, labels = make(30, 60, 3)
    path = probe_path(features, labels, 200, 0.999 * stable_learning_rate(features, 3))
    assert (path.history.loss.diff().dropna() <= 0).all()
    assert path.history.head_norm.diff().dropna().iloc[-1] > 0


def test_zero_epochs_return_the_start():
    features, labels = make()
    weight = torch.ones(3, 5)
    path = probe_path(features, labels, 0, 0.1, weight=weight)
    assert torch.equal(path.weight, weight.double()) and len(path.history) == 1


@pytest.mark.parametrize("penalty", [0.001, math.inf])
def test_divergence_names_epoch_rate_and_a_safe_rate(penalty):
    features, labels = make()
    safe = stable_learning_rate(features, 3, penalty=penalty)
    with pytest.raises(ConvergenceError, match=rf"epoch \d+ with learning rate .*below {safe:.3g}"):
        probe_path(features, labels, 2000, 1000 * safe, penalty=penalty)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_head_from_probe(classes, bias):
    features, labels = make(classes=classes)
    probe = LogisticRegression(C=10.0, fit_intercept=bias).fit(features.numpy(), labels.numpy())
    weight, bias_vector = head_from_probe(probe)
    assert weight.shape == (classes, 5) and bias_vector.shape == (classes,)
    ours = (features @ weight.T + bias_vector).softmax(dim=1).numpy()
    np.testing.assert_allclose(ours, probe.predict_proba(features.numpy()), atol=1e-6)


class OldMultinomial:
    """The removed two-class multinomial option: probability σ(2d)."""

    classes_ = np.arange(2)
    coef_, intercept_ = np.array([[0.7, -1.2, 0.1]]), np.array([0.4])

    def predict_proba(self, features):
        distance = features @ self.coef_[0] + self.intercept_[0]
        one = 1 / (1 + np.exp(-2 * distance))
        return np.stack([1 - one, one], axis=1)


def test_head_from_an_old_multinomial_probe_keeps_its_logits():
    weight, bias = head_from_probe(OldMultinomial())
    points = np.random.default_rng(0).normal(size=(50, 3))
    ours = (torch.from_numpy(points) @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(ours, OldMultinomial().predict_proba(points), atol=1e-6)
    assert weight.norm().item() == pytest.approx(np.sqrt(2) * np.linalg.norm(OldMultinomial.coef_))


def test_head_from_one_versus_rest_or_an_unfitted_probe_is_refused():
    class OneVersusRest(LogisticRegression):
        def predict_proba(self, features):
            scores = 1 / (1 + np.exp(-self.decision_function(features)))
            return scores / scores.sum(axis=1, keepdims=True)

    features, labels = make()
    with pytest.raises(ValueError, match="one-versus-rest"):
        head_from_probe(OneVersusRest().fit(features.numpy(), labels.numpy()))
    with pytest.raises(ValueError, match="fitted"):
        head_from_probe(LogisticRegression())


FITS = [
    lambda features, labels, **options: fit_logistic(features, labels, 1.0, **options),
    cross_validate,
    fit_probe,
    lambda features, labels, **options: probe_path(features, labels, 2, 0.1, **options),
]


@pytest.mark.parametrize(
    "fit", FITS, ids=["fit_logistic", "cross_validate", "fit_probe", "probe_path"]
)
def test_bad_arrays_are_refused(fit):
    features, labels = make()
    broken = features.clone()
    broken[7, 2] = math.nan
    cases = [
        (broken, labels, {}, "row 7"),
        (features.int(), labels, {}, "floating point"),
        (features[0], labels, {}, r"\(N, h\)"),
        (features[:0], labels[:0], {}, r"\(N, h\)"),
        (features, labels[:-1], {}, "one a feature row"),
        (features, labels.double(), {}, "integers"),
        (features, labels + 1, {}, "no training example"),
        (features, labels - 1, {}, "found -1"),
        (features, labels, {"num_classes": 2}, r"0\.\.1, found 0\.\.2"),
        (features, labels, {"num_classes": 5}, r"\[3, 4\]"),
        (features, torch.zeros_like(labels), {}, "two classes"),
    ]
    for bad_features, bad_labels, options, message in cases:
        with pytest.raises(ValueError, match=message):
            fit(bad_features, bad_labels, **options)


@pytest.mark.parametrize("smallest", [2, 3, 4, 5, 9])
def test_there_are_as_many_folds_as_the_smallest_class_has_examples(smallest):
    """At most five; where it is fewer, a warning says so."""
    features, _ = make()
    labels = torch.tensor([0] * (len(features) - 20 - smallest) + [1] * 20 + [2] * smallest)
    expected = min(5, smallest)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = cross_validate(features, labels)
    assert found.accuracy.shape[1] == expected
    assert [one.category for one in heard] == [FewExamplesWarning] * (smallest < 5)
    assert not heard or f"smallest class has {smallest} of {len(labels)}" in str(heard[0].message)
    named = cross_validate(features, labels, folds=expected)
    assert torch.equal(named.accuracy, found.accuracy)


def test_a_class_of_one_example_leaves_the_penalty_at_one():
    features, _ = make()
    labels = torch.tensor([0] * 30 + [1] * (len(features) - 31) + [2])
    with pytest.warns(FewExamplesWarning, match="no cross-validation, penalty 1"):
        fit = fit_probe(features, labels)
    assert fit.penalty == 1.0 and fit.cross_validation is None
    torch.testing.assert_close(fit.weight, fit_logistic(features, labels, 1.0).weight)


def test_bad_settings_are_refused():
    features, labels = make()
    for penalty in (0.0, -1.0, math.nan, "1", None, True):
        with pytest.raises(ValueError, match="scikit-learn's C"):
            fit_logistic(features, labels, penalty)
    for penalties in ([], [0.0, 1.0], [math.inf], [math.nan]):
        with pytest.raises(ValueError, match="finite numbers > 0"):
            cross_validate(features, labels, penalties)
    for folds in (1, 2.5, True):
        with pytest.raises(ValueError, match="at least 2"):
            cross_validate(features, labels, folds=folds)
    with pytest.raises(ValueError, match="class 2 has 3 examples, fewer than the 5 folds"):
        cross_validate(features, torch.tensor([0] * 30 + [1] * 27 + [2] * 3), folds=5)
    with (
        pytest.warns(FewExamplesWarning),
        pytest.raises(ValueError, match="class 2 has 1 examples, fewer than the 2 folds"),
    ):
        cross_validate(features, torch.tensor([0] * 30 + [1] * 29 + [2]))
    for options, message in [
        ({"epochs": -1}, "epochs"),
        ({"epochs": 2.0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"weight": torch.zeros(2, 5)}, "weight"),
        ({"bias_init": torch.full((3,), math.nan)}, "bias_init"),
        ({"bias": False, "bias_init": torch.zeros(3)}, "bias=False"),
    ]:
        with pytest.raises(ValueError, match=message):
            probe_path(features, labels, **{"epochs": 2, "learning_rate": 0.1, **options})
