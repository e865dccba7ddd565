"""Gradients kept as factors: against plain autograd, over every architecture."""

import torch

from conftest import build_tiny_model
from kernel_oracle import TEXTS, random_factors
from lpft_nb.kernel.gradient_factors import (
    Factors,
    cropped,
    dense,
    explicit_gradients,
    gradient_pieces,
    keep_active,
    kernel_parameters,
)
from lpft_nb.kernel.plan import probe


def test_active_tokens_lose_nothing():
    found = random_factors(0, 3, 2, 5, 4, 3)
    found.cotangent[0, :, 1:] = 0
    found.cotangent[1, :, [0, 2, 4]] = 0
    found.cotangent[2] = 0
    kept = Factors(*keep_active(found.given, found.cotangent))
    assert kept.given.shape[1] == 2
    torch.testing.assert_close(dense(kept, torch.Size([4, 3])), dense(found, torch.Size([4, 3])))


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
