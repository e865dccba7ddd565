"""Clouds of features for tests, and the scatters of their classes in loops."""

import numpy as np
import torch


def draw(examples, size, seed, offset=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, size, generator=generator, dtype=torch.float64) + offset


def scatters(features, labels):
    """Between and within classes, over N, in loops."""
    rows, mean = features.numpy(), features.numpy().mean(axis=0)
    between, within = np.zeros((2, features.shape[1], features.shape[1]))
    for label in set(labels.tolist()):
        members = rows[labels.numpy() == label]
        shift = members.mean(axis=0) - mean
        between += len(members) / len(rows) * np.outer(shift, shift)
        for row in members:
            within += np.outer(row - members.mean(axis=0), row - members.mean(axis=0)) / len(rows)
    return between, within
