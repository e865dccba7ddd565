"""What a stage leaves comes back whole or is refused."""

import pytest
import torch
from conftest import build_tiny_model

from lpft_nb.store.cache import read_tensors, write_tensors
from lpft_nb.training.checkpoints import (
    WEIGHTS,
    last_checkpoint,
    load_stage,
    restore_weights,
    save_stage,
    trained_weights,
)
from lpft_nb.training.stage import set_trainable


def small(seed):
    return build_tiny_model("bert", num_labels=2, seed=seed, dtype=torch.float32)


@pytest.fixture
def kept(tmp_path):
    "A finished stage of a model whose head and last layer train, in a folder."
    model = small(0)
    set_trainable(model, ("head.*", "backbone.encoder.layer.1.*"))
    logits = {"test": torch.randn(3, 2), "ood/other": torch.randn(2, 2)}
    save_stage(tmp_path, "key", model=model, content={"rows": [1, 2]}, logits=logits)
    return tmp_path, model, logits


def ready(seed=1):
    model = small(seed)
    set_trainable(model, ("head.*", "backbone.encoder.layer.1.*"))
    return model


def test_there_and_back(kept):
    folder, model, logits = kept
    other = ready()
    frozen = {n: p.clone() for n, p in other.named_parameters() if not p.requires_grad}
    content, found = load_stage(folder, "key", other)
    assert content == {"rows": [1, 2]} and set(found) == set(logits)
    assert all(torch.equal(found[split], logits[split]) for split in logits)
    theirs = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert torch.equal(p, frozen[name] if name in frozen else theirs[name]), name
    assert not list(folder.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize("name", ["head.weight", "backbone.encoder.layer.1.output.dense.weight"])
def test_a_file_that_lacks_a_parameter_is_refused_and_nothing_is_changed(kept, name):
    folder, _, _ = kept
    weights, metadata = read_tensors(folder / WEIGHTS)
    del weights[name]
    write_tensors(folder / WEIGHTS, weights, {"key": metadata["key"]})
    other = ready()
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match=rf"lacks {name}.*remove this one"):
        load_stage(folder, "key", other)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_a_foreign_parameter_or_another_shape_is_refused():
    model = ready()
    weights = trained_weights(model)
    with pytest.raises(ValueError, match="holds adapter, which does not train"):
        restore_weights(model, weights | {"adapter": torch.zeros(1)}, "a file")
    with pytest.raises(ValueError, match=r"head.bias as \(1,\) instead of \(2,\)"):
        restore_weights(model, weights | {"head.bias": torch.zeros(1)}, "a file")


def test_another_key_or_a_damaged_file_is_refused(kept):
    folder, _, _ = kept
    with pytest.raises(ValueError, match="another model, task, seed or settings"):
        load_stage(folder, "other", ready())
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        load_stage(folder, "key", ready())


def test_kept_weights_are_copies():
    model = ready()
    weights = trained_weights(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(weights["head.weight"], model.head.weight)


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path) is None
