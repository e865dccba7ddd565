"""A kernel with its axes and what it belongs to: views, saving, loading, refusals."""

import copy

import pytest
import torch

from conftest import build_tiny_model
from kernel_oracle import OTHERS, TEXTS, quick
from lpft_nb.kernel.gradient_factors import KernelError
from lpft_nb.kernel.result import TangentKernel, as_matrix, block, model_hash, trace_over_classes
from lpft_nb.models.lora import add_lora
from lpft_nb.store.cache import write_tensors


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
