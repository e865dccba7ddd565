"""What two examples tell: the batch that is probed."""

import pytest
import torch

from lpft_nb.kernel.plan import probe_batch


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
