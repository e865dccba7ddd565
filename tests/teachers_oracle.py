"""Worlds of the linear teachers for tests: random spectra, repeated inputs, teachers in special positions."""

import torch


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(examples, dimension, seed, *, repeat=False, decay=0.0):
    """Inputs (n, d), their covariance (d,), and two teachers."""
    spectrum = torch.arange(1, dimension + 1, dtype=torch.float64) ** -decay
    inputs = randn(examples, dimension, seed=seed) * spectrum.sqrt()
    if repeat and examples > 1:
        inputs[-1] = -2 * inputs[0]
    return inputs, spectrum, randn(dimension, seed=seed + 1), randn(dimension, seed=seed + 2)


def projector(inputs):
    """The projection onto the rows' span, by the pseudo-inverse."""
    return torch.linalg.pinv(inputs) @ inputs
