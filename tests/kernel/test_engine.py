"""The parts of the kernel engine: factors, contractions, projection, plan, result."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build_tiny_model
from kernel_oracle import OTHERS, TEXTS, distance
from lpft_nb.store.cache import write_tensors
from lpft_nb.kernel.contractions import (
    Workspace,
    add_by_tokens,
    add_by_writing_out,
    add_gram,
    add_inner_products,
    examples_at_once,
)
from lpft_nb.kernel.gradient_factors import (
    Factors,
    KernelError,
    Rows,
    Vectors,
    cropped,
    dense,
    explicit_gradients,
    gradient_pieces,
    keep_active,
    kernel_parameters,
)
from lpft_nb.kernel.plan import probe, probe_batch
from lpft_nb.kernel.result import TangentKernel, as_matrix, block, model_hash, trace_over_classes
from lpft_nb.models.lora import add_lora
from lpft_nb.kernel.projection import Projection, dimension_for
from lpft_nb.tangent_kernel import tangent_kernel


def quick(*arguments, **options):
    return tangent_kernel(*arguments, quiet=True, **options)


def random_factors(seed, n, c, t, height, width):
    g = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(n, t, width, generator=g, dtype=torch.float64),
        torch.randn(n, c, t, height, generator=g, dtype=torch.float64),
    )


def random_rows(seed, n, c, t, vocabulary, width, dead=0.2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, vocabulary, (n, t), generator=g)
    cotangent = torch.randn(n, c, t, width, generator=g, dtype=torch.float64)
    return Rows(ids, cotangent * (torch.rand(n, 1, t, 1, generator=g) > dead))


def written(pieces, shape):
    return torch.cat([dense(piece, shape).flatten(0, 1) for piece in pieces])


def check_products(left, right, shape, run):
    a = written(left, shape)
    b = a if right is None else written(right, shape)
    start = torch.randn(len(a), len(b), dtype=torch.float64)
    out = start.clone()
    run(left, right, out)
    expected = start + a @ b.T
    if right is None:
        out, expected = out.triu(), expected.triu()
    torch.testing.assert_close(out, expected)


# --- contractions --------------------------------------------------------------------------------------------------


def with_room(add, size):
    return lambda left, right, out: add(left, right, out, Workspace(size))


WAYS = {
    "tokens": with_room(add_by_tokens, 10**6),
    "token by token": with_room(add_by_tokens, 1),
    "written": with_room(add_by_writing_out, 10**6),
    "row by row": with_room(add_by_writing_out, 1),
    "cheaper": with_room(add_inner_products, 10**6),
}


@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("two_sides", [False, True])
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_matrices(run, two_sides, data):
    c, height, width = (data.draw(st.integers(1, 5)) for _ in range(3))
    sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3)
    sides = [
        [random_factors(i, n, c, t, height, width) for i, (n, t) in enumerate(data.draw(sizes))]
        for _ in range(1 + two_sides)
    ]
    check_products(sides[0], sides[1] if two_sides else None, torch.Size([height, width]), run)


@pytest.mark.parametrize("two_sides", [False, True])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_table_rows(two_sides, data):
    c, vocabulary, width = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 3)),
    )
    sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=2)
    sides = [
        [
            random_rows(7 * s + i, n, c, t, vocabulary, width)
            for i, (n, t) in enumerate(data.draw(sizes))
        ]
        for s in range(1 + two_sides)
    ]
    check_products(
        sides[0],
        sides[1] if two_sides else None,
        torch.Size([vocabulary, width]),
        lambda l, r, o: add_inner_products(l, r, o, 0),
    )


def test_table_rows_that_never_meet_and_that_are_all_zero():
    left, right = random_rows(0, 2, 2, 3, 4, 3, dead=0), random_rows(1, 2, 2, 3, 4, 3, dead=0)
    left.ids, right.ids = (
        torch.tensor([[0, 0, 1], [1, 1, 1]]),
        torch.tensor([[2, 3, 2], [-1, -1, -1]]),
    )
    check_products(
        [left], [right], torch.Size([4, 3]), lambda l, r, o: add_inner_products(l, r, o, 0)
    )
    empty = Rows(left.ids, torch.zeros_like(left.cotangent))
    for sides in (([empty], None), ([empty], [right]), ([left], [empty])):
        check_products(*sides, torch.Size([4, 3]), lambda l, r, o: add_inner_products(l, r, o, 0))


@pytest.mark.parametrize("rows", [1, 95, 97, 200, 333])
def test_half_a_gram_matrix(rows):
    table, out = (
        torch.randn(rows, 7, dtype=torch.float64),
        torch.zeros(rows + 2, rows + 3, dtype=torch.float64),
    )
    add_gram(table, None, out[1:-1, 1:-2])
    torch.testing.assert_close(out[1:-1, 1:-2].triu(), (table @ table.T).triu())
    assert not out[0].any() and not out[-1].any() and not out[:, 0].any() and not out[:, -2:].any()


def test_vectors():
    left = [Vectors(torch.randn(n, 2, 5, dtype=torch.float64)) for n in (3, 1)]
    for right in (None, left[:1]):
        check_products(left, right, torch.Size([5]), lambda l, r, o: add_inner_products(l, r, o, 0))


@pytest.mark.parametrize("two_sides", [False, True])
def test_products_through_tokens_stay_within_the_workspace(two_sides):
    left, right = (
        [random_factors(0, 60, 3, 7, 4, 5)],
        [random_factors(1, 50, 3, 9, 4, 5)] if two_sides else None,
    )
    workspace = Workspace(400_000)
    add_by_tokens(
        left, right, torch.zeros(180, 150 if two_sides else 180, dtype=torch.float64), workspace
    )
    assert workspace.space.numel() * 8 == 400_000
    assert examples_at_once(left, right, workspace) == 4
    assert examples_at_once(left, right, Workspace(10**9)) == (207 if two_sides else 4)


def test_active_tokens_lose_nothing():
    found = random_factors(0, 3, 2, 5, 4, 3)
    found.cotangent[0, :, 1:] = 0
    found.cotangent[1, :, [0, 2, 4]] = 0
    found.cotangent[2] = 0
    kept = Factors(*keep_active(found.given, found.cotangent))
    assert kept.given.shape[1] == 2
    torch.testing.assert_close(dense(kept, torch.Size([4, 3])), dense(found, torch.Size([4, 3])))


# --- factors -------------------------------------------------------------------------------------------------------


def test_pieces_are_autograds_gradients(architecture):
    model = build_tiny_model(architecture)
    batch = model.tokenize(TEXTS[:3])
    probed = probe(model, batch)
    parameters = kernel_parameters(model)
    assert set(probed.rules) == set(parameters)
    structured = {name: rule for name, rule in probed.rules.items() if rule != "explicit"}
    pieces, exact = (
        gradient_pieces(model, batch, structured),
        explicit_gradients(model, batch, list(structured)),
    )
    largest = max(found.gradient.norm() for found in exact.values())
    for name in structured:
        got = dense(pieces[name], parameters[name].shape)
        assert float((got - exact[name].gradient).norm()) <= 1e-9 * float(
            exact[name].gradient.norm() + 1e-3 * largest
        ), name


def test_few_parameters_need_plain_autograd(architecture):
    allowed = {
        "mpnet": ("relative_attention_bias",),
        "t5": ("relative_attention_bias",),
        "deberta-v2": ("encoder.LayerNorm", "query_proj", "key_proj", "rel_embeddings"),
    }.get(architecture, ())
    model = build_tiny_model(architecture)
    reasons = probe(model, model.tokenize(TEXTS)).reasons
    assert all(any(part in name for part in allowed) for name in reasons), reasons


@pytest.mark.parametrize("tokens, examples", [(1, 2), (2, 3), (5, 2)])
def test_probe_batch_has_not_as_many_examples_as_tokens(tokens, examples):
    batch = {
        "input_ids": torch.ones(6, 7, dtype=torch.long),
        "attention_mask": torch.zeros(6, 7, dtype=torch.long),
    }
    batch["attention_mask"][:, 0] = 1
    batch["attention_mask"][4, :tokens] = 1
    found = probe_batch(batch)
    assert (
        found["input_ids"].shape == (examples, tokens)
        and found["attention_mask"][0].sum() == tokens
    )


def test_cropping_moves_left_padding():
    batch = {
        "input_ids": torch.tensor([[9, 9, 3, 4, 9], [9, 9, 9, 5, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]),
    }
    found = cropped(batch)
    assert (
        found["attention_mask"].tolist() == [[1, 1], [1, 0]]
        and found["input_ids"][:, 0].tolist() == [3, 5]
        and found["input_ids"][0, 1] == 4
    )


# --- projection ----------------------------------------------------------------------------------------------------


def test_projection_is_unbiased_and_its_variance_falls():
    found = random_factors(0, 2, 2, 3, 12, 12)
    exact = dense(found, torch.Size([12, 12])).flatten(0, 1)
    exact = exact @ exact.T
    grams = {k: [] for k in (8, 32)}
    for k in grams:
        for seed in range(600):
            z = Projection(k, seed)("w", found).gradient.flatten(0, 1)
            grams[k].append(z @ z.T)
        table = torch.stack(grams[k])
        error = (table.mean(0) - exact).abs() / (table.std(0) / 600**0.5)
        assert float(error.max()) < 4.5
    ratio = torch.stack(grams[8]).var(0).sum() / torch.stack(grams[32]).var(0).sum()
    assert 3 < float(ratio) < 5.5


def test_projection_does_not_depend_on_the_split_of_a_batch():
    found = random_factors(1, 4, 3, 5, 20, 20)
    whole = Projection(64, 3)("layer", found).gradient
    parts = [
        Projection(64, 3)("layer", Factors(found.given[i], found.cotangent[i])).gradient
        for i in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(Projection(64, 4)("layer", found).gradient, whole)
    assert not torch.allclose(Projection(64, 3)("other", found).gradient, whole)
    assert Projection(400, 3)("layer", found) is found


@pytest.mark.parametrize("requested", [0.5, 0.1])
def test_projected_kernel_reaches_the_error_asked_for(requested):
    model = build_tiny_model("bert", backbone=dict(hidden_size=32, intermediate_size=128))
    a, b = model.tokenize(TEXTS * 2), model.tokenize(OTHERS)
    for sides in ((a,), (a, b)):
        exact, near = quick(model, *sides), quick(model, *sides, relative_error=requested)
        assert 0 <= near.relative_error <= requested and exact.relative_error is None
        assert distance(near.ft_effective, exact.ft_effective) <= 1.5 * requested
        torch.testing.assert_close(near.gram, exact.gram)
        again = quick(model, *sides, relative_error=requested, memory="3MB", by="group")
        torch.testing.assert_close(again.ft_effective, near.ft_effective)


def test_projection_of_a_kernel_that_is_zero():
    model = build_tiny_model("bert")
    with torch.no_grad():
        model.head.weight.zero_()
    found = quick(model, model.tokenize(TEXTS), relative_error=0.1)
    assert not found.ft_effective.any() and found.relative_error == 0
    model.backbone.requires_grad_(False)
    assert not quick(model, model.tokenize(TEXTS), relative_error=0.1).ft_effective.any()


def test_dimension():
    assert dimension_for(0.1, 0.0, 1.0) == 64 and dimension_for(0.1, 5.0, 0.0) == 64
    assert dimension_for(0.05, 10.0, 2.0) >= 4 * dimension_for(0.1, 10.0, 2.0) - 4 * 64
    for wrong in (0, 1, -1, float("nan")):
        with pytest.raises(KernelError, match="between 0 and 1"):
            dimension_for(wrong, 1.0, 1.0)


# --- result --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel():
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    return model, a, b, quick(model, a, b, by="layer")


def test_views(kernel):
    total = kernel[3].total
    matrix = as_matrix(total)
    assert matrix.shape == (15, 9) and matrix[4 * 3 + 1, 2 * 3 + 2] == total[4, 1, 2, 2]
    torch.testing.assert_close(trace_over_classes(total), sum(block(total, c, c) for c in range(3)))
    assert torch.equal(block(total, 0, 2), total[:, 0, :, 2])
    for row, column in ((3, 0), (0, -1)):
        with pytest.raises(KernelError, match="classes"):
            block(total, row, column)
    for wrong in (total[0], total[:, :2], torch.zeros(3, 3)):
        for view in (as_matrix, trace_over_classes):
            with pytest.raises(KernelError, match="axes"):
                view(wrong)


def test_round_trip_and_refusals(kernel, tmp_path):
    model, a, b, found = kernel
    path = found.save(tmp_path / "kernel.safetensors")
    back = TangentKernel.load(path, model, a, b)
    assert set(back.shares) == set(found.shares)
    for label in found.shares:
        assert torch.equal(back.shares[label], found.shares[label])
    assert (
        torch.equal(back.gram, found.gram)
        and torch.equal(back.pretrain_effective, found.pretrain_effective)
        and back.relative_error is None
    )
    torch.testing.assert_close(back.total, found.total)
    wider = {name: torch.nn.functional.pad(table, (0, 3)) for name, table in a.items()}
    TangentKernel.load(path, model, wider, b)  # padding is no part of an example
    moved = {name: table[[1, 0, 2, 3, 4]] for name, table in a.items()}
    for sides, message in (
        ((moved, b), "left"),
        ((b, b), "left"),
        ((a, a), "right"),
        ((a,), "right"),
        ((a, {n: t[:2] for n, t in b.items()}), "right"),
    ):
        with pytest.raises(
            KernelError,
            match=f"kernel.safetensors was computed for other examples on the {message}",
        ):
            TangentKernel.load(path, model, *sides)
    with pytest.raises(KernelError, match="another model"):
        TangentKernel.load(path, build_tiny_model("bert", seed=1), a, b)


def other_trainable(model):
    model.backbone.embeddings.requires_grad_(False)


def other_weight(model):
    model.head.bias.data[0] += 1


@pytest.mark.parametrize("change", [other_trainable, other_weight])
def test_a_changed_model_is_another_one(kernel, change):
    model = copy.deepcopy(kernel[0])
    assert model_hash(model) == model_hash(kernel[0])
    change(model)
    assert model_hash(model) != model_hash(kernel[0])


def test_models_with_the_same_weights_and_another_function_are_told_apart():
    base = model_hash(build_tiny_model("bert"))
    for change in (dict(num_attention_heads=4), dict(hidden_act="relu"), dict(layer_norm_eps=0.1)):
        assert model_hash(build_tiny_model("bert", backbone=change)) != base
    assert model_hash(build_tiny_model("bert", pooling="mean")) != base
    hashes = []
    for alpha in (2.0, 16.0):
        model = build_tiny_model("bert")
        add_lora(model, 2, alpha)
        hashes.append(model_hash(model))
    assert hashes[0] != hashes[1]


def test_damaged_and_foreign_files(kernel, tmp_path):
    model, a, b, found = kernel
    path = found.save(tmp_path / "kernel.safetensors")
    data = path.read_bytes()
    for damaged in (data[:-7], data[:40], b"", data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="kernel.safetensors"):
            TangentKernel.load(path, model, a, b)
    write_tensors(path, {"gram": found.gram}, {"kind": "features"})
    with pytest.raises(KernelError, match="holds no tangent kernel"):
        TangentKernel.load(path, model, a, b)
