"""Kernels by random projection reach the error that was asked for."""

import pytest
import torch

from conftest import build_tiny_model
from kernel_oracle import OTHERS, TEXTS, distance, quick


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
