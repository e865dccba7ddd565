"""Statistics of kernels and first-order predictions: brute force, closed forms, laws of scale, faults."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.decomposition import (
    block_trace_norms,
    check_kernel,
    check_square,
    class_block_trace_norms,
    class_targets,
    condition_number,
    default_threshold,
    diagonal_excess,
    effective_dimension,
    eigenvalues,
    frobenius_norm,
    ft_ratio,
    kernel_statistics,
    kernel_target_alignment,
    normalised_spectrum,
    numerical_rank,
    residuals,
    singular_values,
)
from lpft_nb.one_step import (
    block_spectral_norms,
    feature_change_bound,
    head_norm_bound,
    linear_model_kernels,
    predict_feature_step,
    predict_step,
)

FEW = settings(deadline=None, max_examples=25)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(examples=5, classes=3, rank=9, seed=0):
    "A kernel (N, C, N, C) of a given rank."
    factor = randn(examples * classes, rank, seed=seed)
    return (factor @ factor.T).reshape(examples, classes, examples, classes)


kernels = st.builds(
    psd, st.integers(2, 6), st.integers(2, 4), st.integers(1, 8), st.integers(0, 10_000)
)


# --- brute force on tiny classifiers


def jacobian(model, batch, output):
    "Derivatives (N, K, parameters) of an output by the parameters of the backbone, by autograd, one number at a time."
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    values = output(batch)
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for value in values.flatten()
    ]
    flat = [
        torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(row, parameters)
            ]
        )
        for row in rows
    ]
    return torch.stack(flat).reshape(*values.shape, -1)


def inner(left, right):
    return torch.einsum("ncp,mdp->ncmd", left, right)


@pytest.fixture(scope="module")
def case(tiny_model):
    "A tiny BERT with its P, F and feature kernel by brute force, five training texts and three new ones."
    model = tiny_model("bert", num_labels=3)
    with torch.no_grad():
        model.head.weight.mul_(10)
    texts = [
        "sparse matrix norm",
        "a graph of trees and nodes",
        "the film was great",
        "draw a random sample",
        "filter the signal wave",
    ]
    train, new = (
        model.tokenize(texts),
        model.tokenize(["dense tensor", "a dull movie", "solve for the value of edge"]),
    )
    features = {}
    for name, batch in (("train", train), ("new", new)):
        features[name] = jacobian(model, batch, lambda b: model.features(**b))
    weight = model.head.weight.detach().clone()
    through_head = {
        name: torch.einsum("ch,nhp->ncp", weight, table) for name, table in features.items()
    }
    with torch.no_grad():
        phi = {"train": model.features(**train), "new": model.features(**new)}
    identity = torch.eye(3, dtype=torch.float64)
    return dict(
        model=model,
        train=train,
        new=new,
        labels=torch.tensor([0, 1, 2, 0, 1]),
        weight=weight,
        P=torch.einsum("nm,cd->ncmd", phi["train"] @ phi["train"].T + 1, identity),
        F=inner(through_head["train"], through_head["train"]),
        P_new=torch.einsum("nm,cd->ncmd", phi["new"] @ phi["train"].T + 1, identity),
        F_new=inner(through_head["new"], through_head["train"]),
        features_new=inner(features["new"], features["train"]),
        phi=phi,
    )


def test_one_step_of_a_transformer_is_first_order(case):
    model, labels = case["model"], case["labels"]
    with torch.no_grad():
        before, features_before = model(**case["new"]).logits, model.features(**case["new"])
        delta = residuals(model(**case["train"]).logits, labels)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rates = np.array([1e-5, 3e-5, 1e-4, 3e-4]) / 10
    errors = {"logits": [], "features": []}
    for rate in rates:
        model.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**case["train"]).logits, labels).backward()
        optimizer.step()
        with torch.no_grad():
            change = model(**case["new"]).logits - before
            moved = model.features(**case["new"]) - features_before
        predicted = predict_step(case["P_new"] + case["F_new"], delta, rate)
        errors["logits"].append((change - predicted).norm().item())
        predicted = predict_feature_step(case["features_new"], case["weight"], delta, rate)
        errors["features"].append((moved - predicted).norm().item())
        assert (
            errors["logits"][-1] < 0.1 * change.norm()
            and errors["features"][-1] < 0.1 * moved.norm()
        )
    model.load_state_dict(state)
    for values in errors.values():
        assert np.polyfit(np.log(rates), np.log(values), 1)[0] == pytest.approx(2, abs=0.1)


def test_bounds_of_the_head_hold_on_a_transformer(case):
    norms = block_spectral_norms(case["features_new"])
    bound = head_norm_bound(case["weight"], norms)
    assert (block_spectral_norms(case["F_new"]) <= bound * (1 + 1e-9)).all()
    with torch.no_grad():
        delta = residuals(case["model"](**case["train"]).logits, case["labels"])
    change = predict_feature_step(case["features_new"], case["weight"], delta, 0.1).norm(dim=1)
    assert (change <= feature_change_bound(case["weight"], norms, delta, 0.1)).all()


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_f_grows_with_the_square_of_the_head(case, scale):
    model = case["model"]
    with torch.no_grad():
        model.head.weight.mul_(scale)
    table = jacobian(model, case["train"], lambda b: model(**b).logits)
    with torch.no_grad():
        model.head.weight.copy_(case["weight"])
    torch.testing.assert_close(
        inner(table, table),
        scale**2 * case["F"],
        rtol=1e-9,
        atol=1e-9 * case["F"].abs().max().item(),
    )


def test_rank_of_a_real_p_is_a_multiple_of_the_classes_and_ranks_agree_with_numpy(case):
    assert numerical_rank(case["P"]) % 3 == 0
    for kernel in (case["P"], case["F"], case["P"] + case["F"]):
        assert numerical_rank(kernel) == np.linalg.matrix_rank(kernel.reshape(15, 15).numpy())


def test_the_binary_probe_halves_the_rank_of_f():
    inputs, direction = randn(6, 9), randn(1, 4, seed=1)
    fitted = torch.cat([-direction / 2, direction / 2])
    free = randn(2, 4, seed=2)
    backbone = randn(4, 9, seed=3)
    assert numerical_rank(linear_model_kernels(inputs, inputs, backbone, fitted)[1]) == 6
    assert numerical_rank(linear_model_kernels(inputs, inputs, backbone, free)[1]) == 12


# --- statistics against loops and other libraries


@FEW
@given(kernels)
def test_spectrum_norm_and_rank(kernel):
    matrix = kernel.reshape(kernel.shape[0] * kernel.shape[1], -1).numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(singular_values(kernel), values, atol=1e-10 * values[0])
    np.testing.assert_allclose(normalised_spectrum(kernel), values / values[0], atol=1e-10)
    assert frobenius_norm(kernel) == pytest.approx(np.linalg.norm(matrix))
    assert numerical_rank(kernel) == np.linalg.matrix_rank(matrix)
    assert numerical_rank(kernel, 0.5) == (values > values[0] / 2).sum()


@FEW
@given(kernels, st.floats(1e-3, 1e3))
def test_laws_of_scale(kernel, scale):
    target = randn(*kernel.shape[:2], seed=1)
    assert kernel_target_alignment(scale * kernel, target) == pytest.approx(
        kernel_target_alignment(kernel, 7 * target), abs=1e-9
    )
    assert effective_dimension(scale * kernel, scale) == pytest.approx(
        effective_dimension(kernel, 1.0), rel=1e-9
    )
    assert numerical_rank(scale * kernel) == numerical_rank(kernel)
    assert -1e-12 <= kernel_target_alignment(kernel, target) <= 1 + 1e-12
    assert 0 <= effective_dimension(kernel, 1e-3) <= numerical_rank(kernel) + 1e-6


def test_rectangular_kernels():
    kernel = randn(3, 2, 5, 2)
    np.testing.assert_allclose(
        singular_values(kernel), np.linalg.svd(kernel.reshape(6, 10).numpy())[1]
    )
    assert default_threshold(kernel) == 10 * torch.finfo(torch.float64).eps
    assert default_threshold(kernel.float()) == 10 * torch.finfo(torch.float32).eps
    assert block_trace_norms(kernel).shape == (3, 5)


def test_ft_ratio_equals_the_double_loop_also_on_new_examples():
    P, F, delta = (
        psd(4, 3, seed=1),
        psd(4, 3, seed=2),
        residuals(randn(4, 3, seed=3), torch.tensor([0, 1, 2, 0])),
    )
    for rows in (range(4), range(2)):
        terms = []
        for n in rows:
            whole = sum((P + F)[n, :, i] @ delta[i] for i in range(4))
            terms.append(
                (sum(F[n, :, i] @ delta[i] for i in range(4)).norm() / whole.norm()).item()
            )
        assert ft_ratio(
            P[rows.start : rows.stop], F[rows.start : rows.stop], delta
        ) == pytest.approx(np.mean(terms), rel=1e-12)


def test_ft_ratio_may_exceed_one():
    delta = residuals(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([1, 1]))
    opposing, identity = torch.tensor([1.0, -2.0]).double(), torch.eye(2).double()
    P = torch.einsum("n,m,cd->ncmd", opposing, opposing, identity)
    F = 1.5 * torch.einsum("nm,cd->ncmd", torch.ones(2, 2).double(), identity)
    assert ft_ratio(P, F, delta) == pytest.approx((1.5 + 0.6) / 2)


def test_residuals_are_the_negative_gradient_and_bounded():
    logits, labels = 20 * randn(50, 4), torch.arange(50) % 4
    leaf = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, labels, reduction="sum").backward()
    delta = residuals(logits, labels)
    torch.testing.assert_close(delta, -leaf.grad)
    assert delta.norm(dim=1).max() <= math.sqrt(2)


def test_block_norms_and_their_class_means():
    kernel, labels = psd(6, 3, seed=4), torch.tensor([0, 0, 1, 1, 2, 2])
    norms = block_trace_norms(kernel)
    by_hand = torch.tensor(
        [[np.linalg.norm(kernel[n, :, m].numpy(), "nuc") for m in range(6)] for n in range(6)]
    )
    torch.testing.assert_close(norms, by_hand)
    table = class_block_trace_norms(kernel, labels)
    assert table[0, 2].item() == pytest.approx(norms[:2, 4:].mean().item())
    assert class_block_trace_norms(kernel[:4], labels[:4], labels)[2].isnan().all()
    off = norms[~torch.eye(6, dtype=torch.bool)].mean()
    assert diagonal_excess(kernel) == pytest.approx((norms.diagonal().mean() / off).item())
    spectral = [[np.linalg.norm(kernel[n, :, m].numpy(), 2) for m in range(6)] for n in range(6)]
    torch.testing.assert_close(block_spectral_norms(kernel), torch.tensor(spectral))


def test_alignment_and_condition_closed_forms():
    target = class_targets(torch.tensor([0, 1, 2]), 3)
    assert target.sum(dim=1).abs().max() < 1e-15
    assert kernel_target_alignment(
        torch.einsum("nc,md->ncmd", target, target), target
    ) == pytest.approx(1)
    identity = torch.eye(9).double().reshape(3, 3, 3, 3)
    assert kernel_target_alignment(identity, target) == pytest.approx(1 / 3)
    diagonal = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]).double()).reshape(2, 2, 2, 2)
    assert condition_number(diagonal) == pytest.approx(8)
    assert effective_dimension(diagonal, 1.0) == pytest.approx(4 / 5 + 2 / 3 + 1 / 2 + 1 / 3)
    assert condition_number(psd(4, 2, rank=3)) == math.inf


def test_statistics_in_one_table(case):
    with torch.no_grad():
        delta = residuals(case["model"](**case["train"]).logits, case["labels"])
    table = kernel_statistics(case["P"], case["F"], delta, case["labels"]).set_index(
        ["kernel", "statistic"]
    )["value"]
    assert not table.index.duplicated().any() and not table.isna().any()
    assert table["P+F", "ft_ratio"] == ft_ratio(case["P"], case["F"], delta)
    assert table["P+F", "frobenius_norm"] == frobenius_norm(case["P"] + case["F"])
    single = kernel_statistics(case["P"].float(), case["F"].float(), delta, case["labels"])
    assert (
        single.set_index(["kernel", "statistic"])["value"]["P+F", "rank_threshold"]
        == 15 * torch.finfo(torch.float32).eps
    )


# --- one step


def test_learning_rate_and_examples_enter_as_in_a_mean_loss():
    kernel, delta = psd(4, 2), randn(4, 2)
    double = torch.cat([kernel, kernel], dim=2)
    torch.testing.assert_close(
        predict_step(double, torch.cat([delta, delta]), 0.1), predict_step(kernel, delta, 0.1)
    )
    torch.testing.assert_close(
        predict_step(kernel, delta, 0.2), 2 * predict_step(kernel, delta, 0.1)
    )


def test_features_off_the_training_span_stay_in_the_linear_model():
    inputs = torch.cat([randn(8, 3), torch.zeros(8, 2).double()], dim=1)
    new = torch.eye(5).double()[3:]
    backbone, weight = randn(4, 5, seed=1), randn(3, 4, seed=2)
    assert linear_model_kernels(new, inputs, backbone, weight)[1].abs().max() == 0
    feature_kernel = torch.einsum("nm,hk->nhmk", new @ inputs.T, torch.eye(4).double())
    delta = residuals(randn(8, 3, seed=3), torch.arange(8) % 3)
    assert predict_feature_step(feature_kernel, weight, delta, 1.0).abs().max() == 0


# --- faults

P, LABELS = psd(4, 3), torch.tensor([0, 1, 2, 0])
DELTA = residuals(randn(4, 3), LABELS)
NAN = P.clone().index_fill_(0, torch.tensor([2]), torch.nan)
REFUSED = {
    "three axes": (lambda: check_kernel(P[0]), r"shape \(N, C, M, C\)"),
    "a matrix": (lambda: check_kernel(P.reshape(12, 12)), "reshape"),
    "classes differ": (lambda: check_kernel(P[:, :2]), r"\(4, 2, 4, 3\)"),
    "integers": (lambda: check_kernel(P.long()), "floating point"),
    "NaN": (lambda: frobenius_norm(NAN), r"NaN.*1 of 4.*\[2\]"),
    "empty": (lambda: check_kernel(P[:0]), "shape"),
    "not the same examples": (lambda: check_square(P[:2]), "same examples"),
    "shuffled": (lambda: check_square(P[[1, 0, 2, 3]]), "not symmetric"),
    "indefinite": (lambda: eigenvalues(-P), "positive semi-definite"),
    "threshold": (lambda: numerical_rank(P, 2.0), "threshold"),
    "zero kernel": (lambda: normalised_spectrum(0 * P), "zero everywhere"),
    "ridge": (lambda: effective_dimension(P, 0.0), "ridge"),
    "logits as residuals": (lambda: ft_ratio(P, P, 5 * randn(4, 3)), "one-hot minus softmax"),
    "labels as residuals": (
        lambda: ft_ratio(P, P, torch.nn.functional.one_hot(LABELS, 3)),
        "one-hot minus softmax",
    ),
    "residuals of other examples": (lambda: ft_ratio(P, P, DELTA[:2]), "one row an example"),
    "P and F differ": (lambda: ft_ratio(P, P[:2], DELTA), "same examples"),
    "nothing to move": (lambda: ft_ratio(P, P, 0 * DELTA), "not defined"),
    "types differ": (lambda: kernel_statistics(P, P.float(), DELTA, LABELS), "one type"),
    "label out of range": (
        lambda: class_block_trace_norms(P, torch.tensor([0, 1, 2, 3])),
        r"0\.\.2",
    ),
    "labels too short": (lambda: class_block_trace_norms(P, LABELS[:3]), "shape"),
    "target shape": (
        lambda: kernel_target_alignment(P, torch.ones(3, 4)),
        "target must have shape",
    ),
    "zero target": (lambda: kernel_target_alignment(P, torch.zeros(4, 3)), "not zero"),
    "one example": (lambda: diagonal_excess(P[:1][:, :, :1]), "two"),
    "learning rate": (lambda: predict_step(P, DELTA, -1.0), "learning_rate"),
    "delta for a step": (lambda: predict_step(P, DELTA[:2], 0.1), "delta"),
    "head of another size": (lambda: predict_feature_step(P, randn(3, 4), DELTA, 0.1), "weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_of_each_type_is_allowed():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        noisy = (P + 0.1 * torch.finfo(dtype).eps * P.norm() * randn(4, 3, 4, 3, seed=9) / 12).to(
            dtype
        )
        matrix = check_square(noisy)
        assert torch.equal(matrix, matrix.T) and matrix.dtype == torch.float64
    with pytest.raises(ValueError, match="not symmetric"):
        check_square(P.bfloat16().double() + 1e-4 * randn(4, 3, 4, 3))
