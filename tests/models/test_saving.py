"""A saved model is the old one, the new one or refused, at whatever moment the saving ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from model_oracle import TEXTS

from lpft_nb.classifier import Classifier, logits_of
from lpft_nb.models import saving
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.saving import belongs_to_a_model, whole_save


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def moments(tmp_path, monkeypatch):
    """Copies of the folder `target` before every change of a name and every write to the disk: what a kill leaves."""
    copies = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **keywords):
            copy = tmp_path / f"moment-{len(copies)}"
            shutil.copytree(tmp_path / "target", copy)
            copies.append(copy)
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, watched)

    def start():
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            watch(owner, name)
        return copies

    yield start


SINGLE, SHARDS = {}, {"max_shard_size": "20KB"}


@pytest.mark.parametrize("before", [SINGLE, SHARDS], ids=["single", "shards"])
@pytest.mark.parametrize("after", [SINGLE, SHARDS], ids=["single", "shards"])
def test_whenever_saving_ends_the_folder_is_the_old_model_or_the_new_one_or_refused(
    tiny_model, tmp_path, moments, before, after
):
    "Both models have the same shapes: a mixture of them would load without a word."
    old, new = tiny_model("bert", seed=1, pooling="mean"), tiny_model("bert", seed=2)
    target = tmp_path / "target"
    old.save_pretrained(target, **before)
    expected = {
        ("mean", tuple(logits_of(old, TEXTS).flatten().tolist())),
        ("cls", tuple(logits_of(new, TEXTS).flatten().tolist())),
    }
    copies = moments()
    new.save_pretrained(target, **after)
    seen = []
    for copy in [*copies, target]:
        try:
            model = Classifier.from_pretrained(copy)
        except ClassifierError as error:
            words = ("no usable config.json", "no model.safetensors", "the checkpoint is not whole")
            assert any(word in str(error) for word in words), error
            seen.append("refused")
            continue
        seen.append((model.config.pooling, tuple(logits_of(model, TEXTS).flatten().tolist())))
        assert seen[-1] in expected
    assert seen[0][0] == "mean" and seen[-1][0] == "cls" and "refused" in seen
    order = [state if state == "refused" else state[0] for state in seen]
    assert order == sorted(order, key=["mean", "refused", "cls"].index)  # never back
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("before, after", [(SHARDS, SINGLE), (SINGLE, SHARDS)])
def test_nothing_of_the_old_model_is_left(tiny_model, tmp_path, before, after):
    first, second = tiny_model("bert", seed=1), tiny_model("bert", seed=2)
    first.save_pretrained(tmp_path / "over", **before)
    (tmp_path / "over" / "notes.md").write_text("kept")
    (tmp_path / "over" / "checkpoint-3").mkdir()
    second.tokenizer = None
    second.save_pretrained(tmp_path / "over", **after)
    second.save_pretrained(tmp_path / "fresh", **after)
    found = files(tmp_path / "over")
    assert found.pop("notes.md") == b"kept" and (tmp_path / "over" / "checkpoint-3").is_dir()
    assert found == files(tmp_path / "fresh")
    assert Classifier.from_pretrained(tmp_path / "over").tokenizer is None


def test_the_files_are_those_that_transformers_writes_and_ours(tiny_model, tmp_path):
    from transformers import PreTrainedModel

    model = tiny_model("bert")
    PreTrainedModel.save_pretrained(model, tmp_path / "theirs")
    model.tokenizer.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    ours, theirs = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert set(ours) - set(theirs) == {"modeling_lpft.py", "README.md"}
    for name in ("config.json", "tokenizer_config.json"):
        fields = [json.loads(found.pop(name)) for found in (ours, theirs)]
        for added in ("auto_map", "model_max_length", "model_input_names"):
            fields[0].pop(added, None), fields[1].pop(added, None)
        assert fields[0] == fields[1]
    assert {name: ours[name] for name in theirs} == theirs


def test_an_error_while_writing_leaves_the_old_model(tiny_model, tmp_path, monkeypatch):
    tiny_model("bert", seed=1).save_pretrained(tmp_path)
    before = files(tmp_path)
    broken = tiny_model("bert", seed=2)

    def fail(folder):
        raise OSError("no space left")

    monkeypatch.setattr(broken.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        broken.save_pretrained(tmp_path)
    assert files(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before)


def test_another_process_of_several_writes_nothing(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path, is_main_process=False)
    assert files(tmp_path) == {}


def test_a_file_is_no_folder_to_save_into(tiny_model, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(FileExistsError):
        tiny_model("bert").save_pretrained(tmp_path / "taken")


KILLED = """
import os, signal, sys
from lpft_nb.models.saving import whole_save
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
with whole_save(sys.argv[1]) as staged:
    for name in ("config.json", "model.safetensors"):
        (staged / name).write_text("new")
"""


def test_a_killed_process_leaves_no_configuration_and_the_next_save_mends_it(tmp_path):
    with whole_save(tmp_path) as staged:
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            (staged / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert set(files(tmp_path)) == {"model.safetensors"}
    with whole_save(tmp_path) as staged:
        for name in ("config.json", "model.safetensors"):
            (staged / name).write_text("newer")
    assert files(tmp_path) == {"config.json": b"newer", "model.safetensors": b"newer"}


def test_everything_is_on_the_disk_before_the_old_configuration_goes(tmp_path, monkeypatch):
    with whole_save(tmp_path) as staged:
        (staged / "config.json").write_text("old")
    steps, sync, unlink, replace = [], saving._to_disk, Path.unlink, os.replace
    monkeypatch.setattr(saving, "_to_disk", lambda path: (steps.append(path.name), sync(path)))
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: (steps.append("unlink"), unlink(path, **options))
    )
    monkeypatch.setattr(
        os, "replace", lambda one, two: (steps.append(f"move {two.name}"), replace(one, two))
    )
    with whole_save(tmp_path) as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "template").write_text("new")
        (staged / "config.json").write_text("new")
        (staged / "model.safetensors").write_text("new")
    assert set(steps[:4]) == {"sub", "template", "config.json", "model.safetensors"}
    folder = tmp_path.name
    moves = ["move model.safetensors", "move sub", folder, "move config.json", folder]
    assert steps[4:] == ["unlink", folder, *moves]
    assert (tmp_path / "sub" / "template").read_text() == "new"


def test_files_without_a_configuration_are_added(tmp_path):
    for names in (["config.json", "model.safetensors"], ["adapter.safetensors"]):
        with whole_save(tmp_path) as staged:
            for name in names:
                (staged / name).write_text(name)
    assert set(files(tmp_path)) == {"config.json", "model.safetensors", "adapter.safetensors"}


def test_what_belongs_to_a_model(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", **SHARDS)
    written = {*files(tmp_path / "one"), *files(tmp_path / "many")} - {"README.md"}
    assert all(belongs_to_a_model(name) for name in written), written
    for name in ("README.md", "training_args.bin", "optimizer.pt", "trainer_state.json"):
        assert not belongs_to_a_model(name)
