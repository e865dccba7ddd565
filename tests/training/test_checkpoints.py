"""What a stage leaves comes back whole or is refused."""

import json

import pytest
import torch
from conftest import build_tiny_model

from damage import damaged
from lpft_nb.store.cache import read_tensors, sealed, versions, write_tensors
from lpft_nb.training.checkpoints import (
    LOGITS,
    MARKER,
    STAGE,
    WEIGHTS,
    DamagedStage,
    last_checkpoint,
    read_stage,
    restore_stage,
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
    saved = read_stage(folder, "key")
    restore_stage(saved, folder, other)
    assert saved.content == {"rows": [1, 2]} and set(saved.logits) == set(logits)
    assert all(torch.equal(saved.logits[split], logits[split]) for split in logits)
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
        restore_stage(read_stage(folder, "key"), folder, other)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_a_foreign_parameter_or_another_shape_is_refused():
    model = ready()
    weights = trained_weights(model)
    with pytest.raises(ValueError, match="holds adapter, which does not train"):
        restore_weights(model, weights | {"adapter": torch.zeros(1)}, "a file")
    with pytest.raises(ValueError, match=r"head.bias as \(1,\) instead of \(2,\)"):
        restore_weights(model, weights | {"head.bias": torch.zeros(1)}, "a file")


def test_another_key_is_refused(kept):
    with pytest.raises(ValueError, match="another model, task, seed or settings") as caught:
        read_stage(kept[0], "other")
    assert not isinstance(caught.value, DamagedStage)


@pytest.mark.parametrize("name", [STAGE, WEIGHTS, LOGITS])
def test_a_damaged_file_is_named(kept, name):
    """One bit, anywhere; a cut, anywhere; a file that is gone or empty."""
    folder, _, _ = kept
    for _ in damaged(folder / name):
        with pytest.raises(DamagedStage, match=folder.name):
            read_stage(folder, "key")
    assert read_stage(folder, "key").content == {"rows": [1, 2]}


def test_files_of_two_runs_are_not_mixed(kept):
    folder, _, logits = kept
    write_tensors(folder / LOGITS, {"test": logits["test"]}, {"key": "another"})
    with pytest.raises(DamagedStage, match="different runs"):
        read_stage(folder, "key")


def test_kept_weights_are_copies():
    model = ready()
    weights = trained_weights(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    assert not torch.equal(weights["head.weight"], model.head.weight)


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_with_a_damaged_file_is_passed_over(tmp_path, caplog):
    from lpft_nb.training.checkpoints import _checksum

    for step in (3, 12):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        (place / "optimizer.pt").write_bytes(bytes(range(64)))
        files = {"optimizer.pt": _checksum(place / "optimizer.pt")}
        marker = {"value": None, "files": files, "versions": versions()}
        (place / MARKER).write_bytes(sealed(json.dumps(marker).encode()))
    newest = tmp_path / "checkpoint-12"
    assert last_checkpoint(tmp_path) == newest
    for name in ("optimizer.pt", MARKER):
        for how in damaged(newest / name):
            caplog.clear()
            assert last_checkpoint(tmp_path).name == "checkpoint-3", how
            gone = name == MARKER and how == "removed"  # then it was never complete
            assert gone or f"checkpoint-12 is not used: {name}" in caplog.text
    assert last_checkpoint(tmp_path) == newest
