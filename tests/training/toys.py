"""A tiny model and made-up examples for the tests of training."""

import torch

from lpft_nb.training.batches import EncodedDataset


def toy_data(examples, seed=0, vocabulary=50, classes=3):
    "Random token lists whose label can be read off the tokens."
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = [], []
    for _ in range(examples):
        label = int(torch.randint(classes, (1,), generator=generator))
        length = int(torch.randint(4, 14, (1,), generator=generator))
        ids = (
            torch.randint(10 + 12 * label, 22 + 12 * label, (length,), generator=generator)
            % vocabulary
        ).tolist()
        inputs.append(dict(input_ids=ids, attention_mask=[1] * length))
        labels.append(label)
    return EncodedDataset(inputs, torch.tensor(labels))


def small_model(dropout=0.1, dtype=torch.float32, num_labels=3):
    from conftest import build_tiny_model

    return build_tiny_model(
        "bert",
        num_labels=num_labels,
        dtype=dtype,
        head_dropout=dropout,
        backbone=dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
    )
