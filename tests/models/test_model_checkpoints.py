"""From a name to files: the hub, the embedded model, shards, tokenizers, and what is refused."""

import importlib.util
import json
import logging

import pytest
import torch
import transformers
from conftest import build_tokenizer
from model_oracle import TEXTS
from safetensors.torch import save_file
from torch.testing import assert_close

from lpft_nb.models.checkpoints import EMBEDDED_MODELS, ClassifierError, locate, model_file_hash
from lpft_nb.classifier import Classifier, features_of, logits_of


def test_only_safetensors_are_read(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ClassifierError, match="only safetensors are read"):
        Classifier.from_pretrained(tmp_path)


def test_a_folder_without_configuration_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ClassifierError, match=r"no usable config.json"):
        Classifier.from_pretrained(tmp_path, num_labels=2)
    with pytest.raises(ClassifierError, match="no model.safetensors"):
        Classifier.from_pretrained(tmp_path.parent, num_labels=2)


def test_code_of_a_checkpoint_runs_only_when_asked(tiny_model, tmp_path):
    model = tiny_model("bert", dtype=torch.float32)
    model.backbone.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config.update(
        model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClassifierError, match="trust_remote_code"):
        Classifier.from_pretrained(tmp_path, num_labels=3, max_length=32)


def test_shards_are_hashed_and_loaded(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = Classifier.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, TEXTS), logits_of(model, TEXTS))
    assert len(again.config.source["sha256"]) == 64
    next(tmp_path.glob("model-00001-*")).write_bytes(b"")
    assert model_file_hash(tmp_path) != again.config.source["sha256"]
    next(tmp_path.glob("model-00001-*")).unlink()
    with pytest.raises(ClassifierError, match="lacks model-00001-.* not whole"):
        Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "eos, unk, expected", [("</s>", "<unk>", "</s>"), (None, "<unk>", "<unk>")]
)
def test_a_tokenizer_without_padding_token_borrows_one(
    tiny_model, tmp_path, caplog, eos, unk, expected
):
    model = tiny_model("gpt2", dtype=torch.float32)
    model.backbone.save_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer()._tokenizer, eos_token=eos, unk_token=unk
    )
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "lpft_nb"):
        loaded = Classifier.from_pretrained(tmp_path, num_labels=3, max_length=64)
    assert loaded.tokenizer.pad_token == expected and "no padding token" in caplog.text
    assert_close(features_of(loaded, TEXTS), features_of(model, TEXTS), rtol=0, atol=1e-5)


def test_a_hub_model_is_fetched_as_safetensors_only(tiny_model, tmp_path, monkeypatch):
    import huggingface_hub

    tiny_model("bert", dtype=torch.float32).backbone.save_pretrained(tmp_path / "0a1b")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "0a1b")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = Classifier.from_pretrained(
        "someone/bert", num_labels=2, max_length=64, revision="main", token="secret"
    )
    assert model.config.source["id"] == "someone/bert" and model.config.source["revision"] == "0a1b"
    assert (
        asked["name"] == "someone/bert"
        and asked["revision"] == "main"
        and asked["token"] == "secret"
    )
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    "name, hint",
    [
        ("minlm", r"no model of this package \(did you mean 'minilm'\?\)"),
        ("no/such-model", "Check the name and the network"),
    ],
)
def test_an_unknown_name_is_explained(name, hint):
    with pytest.raises(ClassifierError, match=hint):
        Classifier.from_pretrained(name, num_labels=2)


def test_an_embedded_model_with_other_weights_is_refused(tiny_model, tmp_path, monkeypatch):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    package = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(ClassifierError, match="expected 53aa51172d14"):
        locate("minilm")


def test_the_embedded_model(embedded_model):
    "Third party: transformers' own BertModel on the same files."
    model = Classifier.from_pretrained(embedded_model, num_labels=3, pooling="mean")
    directory, source = locate(embedded_model)
    assert source["sha256"] == model_file_hash(directory) == EMBEDDED_MODELS["minilm"]["sha256"]
    assert (
        model.config.source == source
        and model.config.hidden_size == 384
        and model.max_length == 128
    )
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == 22_565_376
    other = transformers.AutoModel.from_pretrained(directory).eval()
    batch = model.tokenize(TEXTS)
    with torch.no_grad():
        hidden = other(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    assert_close(
        features_of(model, TEXTS), (hidden * weights).sum(1) / weights.sum(1), rtol=0, atol=1e-5
    )
