"""Random projections of gradients: unbiased, and the same for every split of a batch."""

import pytest
import torch

from kernel_oracle import random_factors
from lpft_nb.kernel.gradient_factors import Factors, KernelError, dense
from lpft_nb.kernel.projection import Projection, dimension_for


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


def test_dimension():
    assert dimension_for(0.1, 0.0, 1.0) == 64 and dimension_for(0.1, 5.0, 0.0) == 64
    assert dimension_for(0.05, 10.0, 2.0) >= 4 * dimension_for(0.1, 10.0, 2.0) - 4 * 64
    for wrong in (0, 1, -1, float("nan")):
        with pytest.raises(KernelError, match="between 0 and 1"):
            dimension_for(wrong, 1.0, 1.0)
