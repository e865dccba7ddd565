"""What the tests of models share: a few texts, the default pooling of each architecture, features without padding."""

import torch
from conftest import ARCHITECTURES

from lpft_nb.models.encoding import pad_encoded

TEXTS = [
    "the cat sat",
    "a small matrix of random noise is not the mean of a large sparse graph and the dog ran under the tree",
    "find",
    "compute the norm of an array",
]
POOLING = (
    dict.fromkeys(ARCHITECTURES, "cls")
    | dict.fromkeys(("gpt2", "gpt-neox", "llama", "qwen2"), "last")
    | {"t5": "mean"}
)
TOLERANCE = dict(rtol=0, atol=1e-9)


def alone(model, encoded):
    "Features of each example by itself, without any padding: the oracle for every batch."
    return torch.cat([model.features(**pad_encoded([example])) for example in encoded])
