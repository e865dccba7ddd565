"""LoRA's kernel: autograd on the linear model and on a tiny transformer, exact moments of the projection, the bound, the slope."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.lora_kernel import (
    expected_error,
    failure_bound,
    log_log_slope,
    lora_model_kernels,
    lora_scale,
    projection_errors,
)
from lpft_nb.one_step import linear_model_kernels

FEW = settings(deadline=None, max_examples=20)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inner(left, right):
    return torch.einsum("ncp,mdp->ncmd", left, right)


@FEW
@given(st.integers(1, 6), st.integers(2, 4), st.integers(1, 5), st.integers(0, 1000))
def test_the_linear_model_by_autograd(rank, classes, size, seed):
    left, right, backbone = (
        randn(4, 7, seed=seed),
        randn(3, 7, seed=seed + 1),
        randn(size, 7, seed=seed + 2),
    )
    head, down = randn(classes, size, seed=seed + 3), randn(rank, 7, seed=seed + 4)
    start = {
        "up": torch.zeros(size, rank).double(),
        "down": down,
        "head": head,
        "bias": torch.zeros(classes).double(),
    }

    def jacobian(points):
        def logits(w):
            return points @ (backbone + w["up"] @ w["down"]).T @ w["head"].T + w["bias"]

        return {name: table.flatten(2) for name, table in torch.func.jacrev(logits)(start).items()}

    a, b = jacobian(left), jacobian(right)
    P, F = lora_model_kernels(left, right, backbone, head, down)
    torch.testing.assert_close(P, inner(a["head"], b["head"]) + inner(a["bias"], b["bias"]))
    torch.testing.assert_close(F, inner(a["up"], b["up"]) + inner(a["down"], b["down"]))
    assert torch.equal(P, linear_model_kernels(left, right, backbone, head)[0])


def test_an_orthogonal_projection_of_full_rank_is_full_fine_tuning():
    points, backbone, head = randn(5, 6), randn(3, 6, seed=1), randn(2, 3, seed=2)
    turn = torch.linalg.qr(randn(6, 6, seed=3)).Q
    for ours, theirs in zip(
        lora_model_kernels(points, points, backbone, head, turn),
        linear_model_kernels(points, points, backbone, head),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("deviation", [0.05, 1.0, 3.0])
def test_moments_of_the_projection_are_exact_whatever_the_variance(deviation):
    points = randn(3, 10)
    errors = projection_errors(points, points, 8, 4000, torch.Generator().manual_seed(1), deviation)
    exact = expected_error(points, points, 8)
    torch.testing.assert_close(errors.square().mean(dim=0).sqrt(), exact, rtol=0.12, atol=0)
    assert (errors.mean(dim=0).abs() < 4.5 * exact / math.sqrt(4000)).all()


@pytest.mark.parametrize("rank", [64, 256])
def test_the_clean_bound_holds(rank):
    points = randn(6, 30)
    points /= points.norm(dim=1, keepdim=True)
    errors = projection_errors(points, points, rank, 300, torch.Generator().manual_seed(2))
    for epsilon in (0.2, 0.4, 0.6):
        assert (errors.abs() > epsilon).double().mean(dim=0).max() <= failure_bound(epsilon, rank)


def test_bound_closed_forms():
    assert failure_bound(0.5, 1) == 1
    assert failure_bound(0.5, 1000) == pytest.approx(4 * math.exp(-31.25))


def test_slope_of_a_power_and_of_random_adapters():
    ranks = [2, 4, 8, 16, 32, 64, 128, 256]
    assert log_log_slope(ranks, [3 * rank**-0.7 for rank in ranks]) == pytest.approx((-0.7,) * 3)
    points, generator = randn(8, 40), torch.Generator().manual_seed(0)
    errors = [
        projection_errors(points, points, rank, 400, generator).square().mean().sqrt()
        for rank in ranks
    ]
    slope, low, high = log_log_slope(ranks, errors)
    assert low < slope < high and slope == pytest.approx(-0.5, abs=0.05)


# --- a tiny transformer, by brute force


def backbone_jacobian(model, batch, names):
    "Derivatives (N, C, parameters) of the logits by the named parameters, one number at a time."
    parameters = [
        parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in names)
    ]
    logits = model(**batch).logits
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in logits.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).reshape(
        *logits.shape, -1
    )


def test_adapters_of_a_transformer_see_query_and_value_through_a_projection(tiny_model):
    from lpft_nb.models.lora import add_lora

    batch = tiny_model("bert").tokenize(
        ["sparse matrix norm", "a graph of trees", "the film was great"]
    )
    full = backbone_jacobian(tiny_model("bert"), batch, ["query.weight", "value.weight"])
    target, rank, draws = inner(full, full), 32, []
    for seed in range(30):
        model = tiny_model("bert")
        add_lora(model, r=rank, alpha=2 * rank, seed=seed)
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        table = backbone_jacobian(model, batch, ["lora_"])
        draws.append(inner(table, table) / lora_scale(rank, 2 * rank, 16))
    draws = torch.stack(draws)
    spread = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - target).abs() <= 5 * spread + 1e-12).all()  # unbiased
    assert (draws.mean(dim=0) - target).norm() < 0.1 * target.norm()


def test_the_engine_agrees_on_adapters_and_on_two_matrices(tiny_model):
    from lpft_nb.models.lora import add_lora
    from lpft_nb.stages import set_trainable
    from lpft_nb.tangent_kernel import tangent_kernel

    model = tiny_model("bert")
    batch = model.tokenize(["sparse matrix norm", "a graph of trees", "the film was great"])
    whole = tangent_kernel(model, batch, quiet=True)
    set_trainable(model, ("head.*", "*query.weight", "*value.weight"))
    table = backbone_jacobian(model, batch, ["query.weight", "value.weight"])
    torch.testing.assert_close(
        tangent_kernel(model, batch, quiet=True).ft_effective,
        inner(table, table),
        rtol=1e-9,
        atol=1e-15,
    )
    add_lora(model, r=4, alpha=4)
    set_trainable(model, ("head.*", "*lora_*"))
    adapted = tangent_kernel(model.eval(), batch, quiet=True)
    table = backbone_jacobian(model, batch, ["lora_"])
    torch.testing.assert_close(adapted.ft_effective, inner(table, table), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(
        adapted.pretrain_effective, whole.pretrain_effective, rtol=1e-12, atol=1e-12
    )


def test_scale_is_the_variance_of_the_default_initialisation():
    weight = torch.empty(4000, 50)
    torch.nn.init.kaiming_uniform_(
        weight, a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    assert lora_scale(8, 16, 50) == pytest.approx((16 / 8) ** 2 * 8 * weight.var().item(), rel=0.02)


REFUSED = {
    "rank": lambda: projection_errors(randn(2, 3), randn(2, 3), 0, 1, torch.Generator()),
    "deviation": lambda: projection_errors(randn(2, 3), randn(2, 3), 1, 1, torch.Generator(), 0.0),
    "epsilon": lambda: failure_bound(1.0, 8),
    "two ranks": lambda: log_log_slope([1, 2], [1, 2]),
    "an error of zero": lambda: log_log_slope([1, 2, 4], [1, 0, 2]),
    "lengths": lambda: log_log_slope([1, 2, 4], np.ones(4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    with pytest.raises(ValueError):
        REFUSED[name]()
