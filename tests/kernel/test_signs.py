"""Kernels of signs: against signs of brute-force gradients, to the last bit; laws, budgets, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lpft_nb.kernel.budget as budget
from conftest import build_tiny_model
from kernel_oracle import OTHERS, TEXTS, distance, quick, random_factors
from lpft_nb.kernel.contractions import Workspace
from lpft_nb.kernel.gradient_factors import KernelError, Rows, Vectors, dense
from lpft_nb.kernel.signs import Sizes, add_sign_products, cutoffs_of, sizes_of
from lpft_nb.tangent_kernel import TangentKernel, flipped, label_of
from test_contractions import random_rows

SIGNED = ("signgd", "asymmetric_signgd")


def gradients_by_tensor(model, batch):
    "The gradient of every logit by every trainable tensor, (N·C, size) each; every example alone."
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in named}
    for n in range(len(batch["input_ids"])):
        logits = model(**{key: table[n : n + 1] for key, table in batch.items()}).logits[0]
        for logit in logits:
            found = torch.autograd.grad(
                logit, list(named.values()), retain_graph=True, allow_unused=True
            )
            for (name, parameter), gradient in zip(named.items(), found):
                rows[name].append(
                    torch.zeros_like(parameter).flatten()
                    if gradient is None
                    else gradient.flatten()
                )
    return {name: torch.stack(found) for name, found in rows.items()}


def signs_by_hand(tables, threshold):
    "Equation (eq-sign-threshold), gradient by gradient."
    backbone = [name for name in tables if name.startswith("backbone.")]
    signs = {name: torch.zeros_like(table) for name, table in tables.items()}
    for r in range(len(next(iter(tables.values())))):
        overall = max((float(tables[name][r].abs().max()) for name in backbone), default=0.0)
        for name, table in tables.items():
            largest = float(table[r].abs().max())
            if name in backbone and largest <= threshold * overall:
                continue
            kept = table[r].abs() > threshold * largest
            signs[name][r, kept] = table[r, kept].sign()
    return signs


def by_hand(model, formula, sides, threshold=1e-6):
    "Each tensor's kernel, (N, C, M, C), by brute force."
    tables = [gradients_by_tensor(model, side) for side in sides]
    left, right = tables[0], signs_by_hand(tables[-1], threshold)
    left = signs_by_hand(left, threshold) if formula == "signgd" else left
    c = model.head.out_features
    return {
        name: (left[name] @ right[name].T).view(len(left[name]) // c, c, len(right[name]) // c, c)
        for name in left
    }


def total(kernels, part=""):
    return sum(kernel for name, kernel in kernels.items() if name.startswith(part))


@pytest.mark.parametrize("formula", SIGNED)
def test_every_architecture(architecture, formula):
    model = build_tiny_model(architecture)
    a, b = model.tokenize(TEXTS[:3]), model.tokenize(OTHERS[:2])
    for sides in ([a], [a, b]):
        expected = by_hand(model, formula, sides)
        kernel = quick(model, *sides, formula=formula, by="module")
        assert kernel.total.dtype == torch.float64
        for got, part in ((kernel.pretrain_effective, "head"), (kernel.ft_effective, "backbone")):
            assert distance(got, total(expected, part)) < 1e-9, part
        for label, share in kernel.shares.items():
            wanted = [
                one
                for name, one in expected.items()
                if name.startswith("backbone.")
                and label_of(name.removeprefix("backbone."), "module") == label
            ]
            assert distance(share, sum(wanted)) < 1e-9, label


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_signs_are_exact_to_the_last_bit_also_in_float32(name):
    model = build_tiny_model(name)
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    exact = quick(model, a, b, formula="signgd")
    assert torch.equal(exact.total, total(by_hand(model, "signgd", [a, b])))
    single = quick(model.float(), a, b, formula="signgd").total
    assert torch.equal(single, single.round())
    # a sign in doubt differs in float32, a few in ten thousand
    assert float((single - exact.total).abs().max()) < 1e-2 * float(exact.total.max())


def test_the_type_of_signs():
    model = build_tiny_model("bert", dtype=torch.float32)
    a = model.tokenize(TEXTS[:2])
    for formula in SIGNED:
        assert quick(model, a, formula=formula).total.dtype == torch.float64
    assert quick(model, a).total.dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("formula", SIGNED)
def test_other_thresholds(formula, threshold):
    model = build_tiny_model("bert", spread=0.3)
    a = model.tokenize(TEXTS[:3])
    kernel = quick(model, a, formula=formula, threshold=threshold)
    assert distance(kernel.total, total(by_hand(model, formula, [a], threshold))) < (
        1e-9 if threshold else 1e-2  # without a threshold the signs of rounding are anyone's
    )


def test_the_share_taken_away_names_the_biases_of_keys_and_nothing_else():
    model = build_tiny_model("bert", dtype=torch.float32)
    a = model.tokenize(TEXTS)
    description = quick(model, a, formula="signgd").description
    keys = {name for name, _ in model.backbone.named_parameters() if name.endswith("key.bias")}
    assert {name for name, share in description["zeroed"].items() if share == 1} == keys
    assert 0 < description["zeroed_share"] < 0.02
    assert "zeroed" not in quick(model, a).description


def test_a_share_is_a_count():
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS[:2])
    tables = gradients_by_tensor(model, a)
    signs = signs_by_hand(tables, 0.2)
    names = [name for name in tables if name.startswith("backbone.")]
    lost = sum(int(((tables[name] != 0) & (signs[name] == 0)).sum()) for name in names)
    share = lost / sum(int((tables[name] != 0).sum()) for name in names)
    found = quick(model, a, formula="signgd", threshold=0.2).description["zeroed_share"]
    assert found == pytest.approx(share, rel=1e-3)  # a rounded zero of autograd may count


# --- laws (paper C, C7) --------------------------------------------------------------------------------------------


def test_laws_of_the_sign_kernel():
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS)
    kernel = quick(model, a, formula="signgd").total
    matrix = kernel.reshape(15, 15)
    assert torch.equal(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-9 * float(matrix.trace())
    signs = signs_by_hand(gradients_by_tensor(model, a), 1e-6)
    counts = sum(table.abs().sum(dim=1) for table in signs.values())
    assert torch.equal(matrix.diagonal(), counts)
    assert float(matrix.abs().max()) <= sum(p.numel() for p in model.parameters())


def test_laws_of_the_asymmetric_kernel():
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    kernel = quick(model, a, formula="asymmetric_signgd").total
    matrix = kernel.reshape(15, 15)
    assert distance(matrix, matrix.T) > 1e-3
    lengths = sum(t.abs().sum(dim=1) for t in gradients_by_tensor(model, a).values())
    torch.testing.assert_close(matrix.diagonal(), lengths, rtol=1e-4, atol=0)
    # |<g, s>| is at most the sum of |g|, which is on the diagonal
    assert (matrix.abs() <= matrix.diagonal()[:, None] * (1 + 1e-4)).all()
    other = flipped(quick(model, a, b, formula="asymmetric_signgd").total)
    tables = [gradients_by_tensor(model, side) for side in (b, a)]
    signs = signs_by_hand(tables[0], 1e-6)
    expected = sum(signs[name] @ tables[1][name].T for name in signs)
    assert other.shape == (3, 3, 5, 3)
    assert distance(other.reshape(9, 15), expected) < 1e-9


@settings(deadline=None, max_examples=2)
@given(power=st.integers(-8, 8), index=st.integers(0, 2))
def test_a_scaled_head_scales_the_backbones_part_once_or_not_at_all(power, index):
    model = build_tiny_model("bert", seed=index)
    a = model.tokenize(TEXTS[:3])
    before = [quick(model, a, formula=formula).ft_effective for formula in SIGNED]
    with torch.no_grad():
        model.head.weight.mul_(2.0**power)
    after = [quick(model, a, formula=formula).ft_effective for formula in SIGNED]
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1], 2.0**power * before[1], rtol=1e-12, atol=0)


def test_a_class_that_is_negated_turns_the_signs_of_its_rows():
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS[:3])
    before = quick(model, a, formula="signgd").ft_effective
    with torch.no_grad():
        model.head.weight[1].mul_(-1)
    turn = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    after = quick(model, a, formula="signgd").ft_effective
    assert torch.equal(after, before * turn[:, None, None] * turn)


# --- the same whatever the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", SIGNED)
@pytest.mark.parametrize("two_sides", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3)])
def test_blocks_of_examples(monkeypatch, formula, two_sides, sizes):
    model = build_tiny_model("t5")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS) if two_sides else None
    large = quick(model, a, b, formula=formula)
    monkeypatch.setattr(budget, "block_sizes", lambda parts, sides, room: list(sizes[: len(sides)]))
    small = quick(model, a, b, formula=formula)
    assert small.plan.block[0] == sizes[0]
    torch.testing.assert_close(small.total, large.total, rtol=1e-12, atol=1e-12)
    assert small.description["zeroed"] == large.description["zeroed"]


@pytest.mark.parametrize("formula", SIGNED)
def test_small_budgets(formula):
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS * 3)
    large, passes = quick(model, a, formula=formula, by="layer"), set()
    for memory in (700_000, 500_000):
        try:
            small = quick(model, a, formula=formula, by="layer", memory=memory)
        except KernelError:
            break
        passes.add(len(small.plan.passes))
        assert small.plan.peak_bytes <= memory
        for label, share in small.shares.items():
            torch.testing.assert_close(share, large.shares[label], rtol=1e-12, atol=1e-12)
    assert max(passes) > 1


def test_a_part_that_only_some_examples_use():
    from kernel_oracle import Expert

    model = build_tiny_model("bert")
    name = "encoder.layer.0.intermediate.dense"
    inner = model.backbone.get_submodule(name)
    model.backbone.set_submodule(name, Expert(inner, inner.out_features))
    model.eval()
    a = model.tokenize(TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "CHUNK", 1)
        patch.setattr(budget, "block_sizes", lambda *given: [1])
        kernel = quick(model, a, formula="signgd")
    assert torch.equal(kernel.total, total(by_hand(model, "signgd", [a])))


def test_going_on_after_a_cut_gives_the_same_signs(tmp_path, monkeypatch):
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS)
    monkeypatch.setattr(budget, "block_sizes", lambda *given: [2])
    monkeypatch.setattr(budget, "packed", lambda parts, *given: [parts[:2], parts[2:]])
    whole, calls = quick(model, a, formula="signgd"), []

    def cut(module, arguments, keywords):
        calls.append(1)
        if len(calls) == stop:
            raise RuntimeError("cut")

    stop = 0
    hook = model.backbone.register_forward_pre_hook(cut, with_kwargs=True)
    again = quick(model, a, formula="signgd", directory=tmp_path)
    stop = len(calls) - 2  # the last one is the features'
    calls.clear()
    with pytest.raises(RuntimeError, match="cut"):
        quick(model, a, formula="signgd", directory=tmp_path)
    stop = 0
    resumed = quick(model, a, formula="signgd", directory=tmp_path)
    hook.remove()
    done = {name for part in again.plan.passes[0] for name in part}
    left = {name for one_pass in resumed.plan.passes for part in one_pass for name in part}
    assert done and not done & left
    assert torch.equal(resumed.total, whole.total)
    assert resumed.description["zeroed"] == again.description["zeroed"]


def test_saved_and_loaded(tmp_path):
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS[:2])
    kernel = quick(model, a, formula="asymmetric_signgd")
    back = TangentKernel.load(kernel.save(tmp_path / "kernel.safetensors"), model, a)
    assert torch.equal(back.total, kernel.total)
    assert back.description == kernel.description
    assert back.description["formula"] == "asymmetric_signgd"


def test_frozen_parts_count_for_nothing():
    model = build_tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    a = model.tokenize(TEXTS[:3])
    assert torch.equal(
        quick(model, a, formula="signgd").total, total(by_hand(model, "signgd", [a]))
    )
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    kernel = quick(model, a, formula="signgd")
    assert torch.equal(kernel.total, total(by_hand(model, "signgd", [a])))
    assert kernel.description["zeroed_share"] == 0


# --- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 3000, 10**6])
@pytest.mark.parametrize("signed_left", [False, True])
@pytest.mark.parametrize("two_sides", [False, True])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_products_of_every_kind(room, signed_left, two_sides, seed):
    if not signed_left and not two_sides:
        return  # an asymmetric kernel always has two sides
    kinds = {
        torch.Size((5, 4)): [
            [random_factors(seed + i, n, 2, t, 5, 4) for i, (n, t) in enumerate(side)]
            for side in ([(3, 2), (1, 3)], [(2, 4)])
        ],
        torch.Size((6, 3)): [
            [random_rows(seed, 3, 2, 4, 6, 3)],
            [random_rows(seed + 1, 2, 2, 3, 6, 3)],
        ],
        torch.Size((7,)): [
            [Vectors(torch.randn(n, 2, 7, dtype=torch.float64)) for n in side]
            for side in ((3, 1), (2,))
        ],
    }
    for shape, sides in kinds.items():
        left, right = sides if two_sides else (sides[0], None)
        tables = [torch.cat([dense(one, shape).flatten(0, 1) for one in side]) for side in sides]
        limits = [0.5 * table.abs().amax(dim=1) for table in tables]
        signs = [
            table.sign() * (table.abs() > limit[:, None]) for table, limit in zip(tables, limits)
        ]
        start = torch.randn(len(tables[0]), len(tables[-1] if two_sides else tables[0])).double()
        out = start.clone()
        cutoffs = (limits[0] if signed_left else None, limits[1] if two_sides else limits[0])
        add_sign_products(left, right, out, cutoffs=cutoffs, workspace=Workspace(room))
        expected = (
            start + (signs if signed_left else tables)[0] @ (signs[1] if two_sides else signs[0]).T
        )
        if not two_sides:
            out, expected = out.triu(), expected.triu()
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("room", [1, 10**6])
def test_sizes_of_every_kind(room):
    for pieces, shape in (
        ([random_factors(0, 3, 2, 4, 5, 4), random_factors(1, 2, 2, 1, 5, 4)], (5, 4)),
        ([random_rows(0, 3, 2, 4, 6, 3), random_rows(1, 1, 2, 2, 6, 3)], (6, 3)),
        ([Vectors(torch.randn(3, 2, 7, dtype=torch.float64))], (7,)),
    ):
        table = torch.cat([dense(one, torch.Size(shape)) for one in pieces])
        found = sizes_of(pieces, 0.4, Workspace(room))
        largest = table.abs().amax(dim=2)
        torch.testing.assert_close(found.largest, largest)
        assert torch.equal(found.nonzero, (table != 0).sum(dim=2))
        small = (table != 0) & (table.abs() <= 0.4 * largest[:, :, None])
        assert torch.equal(found.small, small.sum(dim=2))


def test_more_ones_than_float32_can_count():
    out = torch.full((1, 1), 2.0**24, dtype=torch.float64)
    one = [Vectors(torch.ones(1, 1, 1))]
    cutoff = torch.zeros(1)
    for _ in range(3):
        add_sign_products(one, None, out, cutoffs=(cutoff, cutoff), workspace=Workspace(100))
    assert out.item() == 2**24 + 3


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(formula="sign"), "formula.*sign.*signgd"),
        (dict(formula="signgd", threshold=-1e-6), "0 <= threshold < 1"),
        (dict(formula="signgd", threshold=1.0), "0 <= threshold < 1"),
        (dict(formula="signgd", threshold=float("nan")), "0 <= threshold < 1"),
        (dict(formula="signgd", relative_error=0.1), "projection keeps no signs"),
    ],
)
def test_refused_requests(options, message):
    model = build_tiny_model("bert")
    with pytest.raises(KernelError, match=message):
        quick(model, model.tokenize(TEXTS[:2]), **options)


def test_a_gradient_that_is_not_a_number_has_no_sign():
    model = build_tiny_model("modernbert")
    model.backbone.set_attn_implementation("eager")  # padding that attends to nothing: 0 / 0
    with pytest.raises(KernelError, match="NaN"):
        quick(model, model.tokenize(TEXTS), formula="signgd")
    sizes = Sizes(*(torch.full((1, 1), float("nan")) for _ in range(3)))
    with pytest.raises(KernelError, match="NaN"):
        cutoffs_of({"weight": sizes}, 1e-6)


def test_features_that_are_not_numbers_have_no_sign():
    class Broken(nn.Module):
        def forward(self, x):
            return x * float("nan")

    model = build_tiny_model("bert")
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    from lpft_nb.kernel.signs import sign_features

    with pytest.raises(KernelError, match="NaN"):
        sign_features(Broken()(torch.ones(2, 3)), 1e-6)


def test_a_table_row_that_cancels_has_no_sign():
    table = [Rows(torch.tensor([[3, 3]]), torch.tensor([[[[1.0], [-1.0]]]]))]
    out = torch.zeros(1, 1, dtype=torch.float64)
    cutoff = torch.zeros(1)
    add_sign_products(table, None, out, cutoffs=(cutoff, cutoff), workspace=Workspace(100))
    assert out.item() == 0
