"""Saved models come back bit for bit, backbones get a head, what does not fit is refused, and descriptions agree with the loaded model."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import build_backbone_config, build_tokenizer
from model_oracle import POOLING, TEXTS
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch.testing import assert_close

from lpft_nb.models.checkpoints import ClassifierError, model_file_hash
from lpft_nb.models.fingerprints import file_hashes
from lpft_nb.models.loading import describe_model
from lpft_nb.models.lora import add_lora
from lpft_nb.classifier import Classifier, features_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_logits_are_bit_identical(tiny_model, architecture, dtype, tmp_path):
    model = tiny_model(architecture, dtype=dtype, num_labels=4)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    batch = model.tokenize(TEXTS)
    again = Classifier.from_pretrained(tmp_path, num_labels=4)
    automatic = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for other in (again, automatic):
        assert type(other) is Classifier and not other.training
        assert other.dtype == dtype
        assert torch.equal(other(**batch).logits, model(**batch).logits)
        assert torch.equal(other.tokenize(TEXTS)["input_ids"], batch["input_ids"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXTS)["input_ids"] == model.tokenizer(TEXTS)["input_ids"]
    assert again.max_length == 32 and again.config.pooling == model.config.pooling


def test_a_second_round_trip_changes_nothing(tiny_model, tmp_path):
    model = tiny_model(
        "bert", num_labels=2, source={"id": "somewhere", "revision": "r", "sha256": "s"}
    )
    model.save_pretrained(tmp_path / "one")
    one = Classifier.from_pretrained(
        tmp_path / "one", label_names=["no", "yes"], max_length=16, head_dropout=0.3
    )
    one.save_pretrained(tmp_path / "two")
    two = Classifier.from_pretrained(tmp_path / "two")
    assert (
        model_file_hash(tmp_path / "one")
        == model_file_hash(tmp_path / "two")
        == two.config.source["sha256"]
    )
    assert (
        two.config.id2label == {0: "no", 1: "yes"} and two.max_length == 16 and two.dropout.p == 0.3
    )
    assert (
        one.config.source["base"]
        == two.config.source["base"]
        == {"id": "somewhere", "revision": "r", "sha256": "s"}
    )
    assert str(tmp_path) not in (tmp_path / "two" / "config.json").read_text()


def whole_model(architecture):
    "A tiny model with the head it was pre-trained with, as a hub would hold it."
    config = build_backbone_config(architecture)
    if architecture == "t5":
        return transformers.T5ForConditionalGeneration(config)
    kind = (
        transformers.AutoModelForCausalLM
        if POOLING[architecture] == "last"
        else transformers.AutoModelForMaskedLM
    )
    return kind.from_config(config)


def test_a_backbone_loads_from_a_whole_checkpoint(architecture, tmp_path):
    torch.manual_seed(0)
    whole = whole_model(architecture).eval()
    whole.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path, num_labels=3, max_length=64)
    base = whole.encoder if architecture == "t5" else whole.base_model
    own, theirs = model.backbone.state_dict(), base.state_dict()
    own = {
        name.removeprefix("encoder.") if architecture == "t5" else name: value
        for name, value in own.items()
    }
    shared = set(own) & set(theirs)
    assert shared >= set(theirs) - {name for name in theirs if "pooler" in name}
    for name in shared:
        assert torch.equal(own[name], theirs[name])
    assert model.config.source == {
        "id": tmp_path.name,
        "revision": None,
        "sha256": model_file_hash(tmp_path),
        **file_hashes(tmp_path),
    }
    assert model.config.backbone._name_or_path == tmp_path.name


def test_the_head_of_a_backbone_follows_the_seed(tiny_model, tmp_path):
    tiny_model("bert", dtype=torch.float32).backbone.save_pretrained(tmp_path)
    load = lambda seed: (
        Classifier.from_pretrained(tmp_path, num_labels=3, seed=seed, max_length=64).head.weight
    )
    torch.manual_seed(0)
    first = load(1)
    torch.manual_seed(99)
    assert torch.equal(load(1), first) and not torch.equal(load(2), first)
    model = Classifier.from_pretrained(tmp_path, 3, max_length=64)
    assert model.tokenizer is None
    assert model.pad([{"input_ids": [4, 5], "attention_mask": [1, 1]}])["input_ids"].tolist() == [
        [4, 5]
    ]


def test_loading_refuses_what_does_not_fit(tiny_model, tmp_path):
    saved, backbone = tmp_path / "saved", tmp_path / "backbone"
    model = tiny_model("bert", dtype=torch.float32)
    model.save_pretrained(saved)
    model.backbone.save_pretrained(backbone)
    cases = [
        (saved, dict(num_labels=2), "num_labels=3, asked for 2"),
        (saved, dict(pooling="mean"), "pooling='cls', asked for 'mean'"),
        (saved, dict(label_names=["a", "b"]), "expected 3 different label names"),
        (backbone, dict(), "num_labels is needed"),
        (backbone, dict(num_labels=1), "at least 2"),
        (backbone, dict(num_labels="3"), "at least 2"),
        (backbone, dict(num_labels=2, label_names=["a", "a"]), "2 different label names"),
    ]
    for path, options, message in cases:
        with pytest.raises(ClassifierError, match=message):
            Classifier.from_pretrained(path, **options)
    with pytest.raises(ValueError, match="65 is more than the 64 positions"):
        Classifier.from_pretrained(backbone, num_labels=2, max_length=65)
    with pytest.raises(ValueError, match="unknown attention"):
        Classifier.from_pretrained(backbone, num_labels=2, attention="flash")
    assert (
        Classifier.from_pretrained(
            backbone, label_names=["a", "b"], max_length=64
        ).config.num_labels
        == 2
    )


@pytest.mark.parametrize("part", ["backbone", "head"])
def test_missing_or_misshapen_weights_are_refused(tiny_model, tmp_path, part):
    model = tiny_model("bert", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    name = {"backbone": "backbone.encoder.layer.1.output.dense.weight", "head": "head.weight"}[part]
    weights = load_file(tmp_path / "model.safetensors")
    tensor = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ClassifierError, match=f"lacks 1 weights .*{name}"):
        Classifier.from_pretrained(tmp_path)
    save_file(
        {**weights, name: tensor[:1].clone()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ClassifierError, match=name):
        Classifier.from_pretrained(tmp_path)


def test_missing_backbone_weights_are_refused(tiny_model, tmp_path):
    tiny_model("llama", dtype=torch.float32).backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ClassifierError, match="layers.1.mlp.up_proj.weight"):
        Classifier.from_pretrained(tmp_path, num_labels=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_when_loading(tiny_model, architecture, attention, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path)
    expected = "eager" if architecture in ("mpnet", "deberta-v2") else attention
    saved = Classifier.from_pretrained(tmp_path, attention=attention)
    automatic = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation=attention
    )
    Classifier.from_pretrained(tmp_path).backbone.save_pretrained(tmp_path / "backbone")
    fresh = Classifier.from_pretrained(
        tmp_path / "backbone", num_labels=2, attention=attention, max_length=32
    )
    for model in (saved, automatic, fresh):
        assert model.backbone.config._attn_implementation == expected


def test_a_real_decoder(shared_models):
    "Third party: the last hidden state of transformers' causal language model."
    path = shared_models / "stories260K"
    model = Classifier.from_pretrained(path, num_labels=2)
    assert model.config.pooling == "last" and model.tokenizer.pad_token_id == 2
    other = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    for text in ("Once upon a time, there was a little girl.", "A dog"):
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = other(ids, output_hidden_states=True).hidden_states[-1][:, -1]
        assert_close(features_of(model, [text]), expected, rtol=0, atol=1e-4)


@pytest.fixture
def no_weights(monkeypatch):
    """Every way in which transformers could read a weight is an error; hashing a file stays possible."""

    def refuse(*arguments, **options):
        raise AssertionError("weights were read")

    def start():
        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
        monkeypatch.setattr(transformers.modeling_utils, "safe_open", refuse)
        monkeypatch.setattr(transformers.modeling_utils, "load_state_dict", refuse)

    return start


def said_by(model):
    "A loaded model's own account, by counting what is in memory: the oracle of `describe_model`."
    source = {name: value for name, value in model.config.source.items() if name != "base"}
    return source | {
        "pooling": model.config.pooling,
        "max_length": model.max_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "architecture": type(model.backbone).__name__,
    }


@pytest.mark.parametrize("kind", ["saved", "adapted", "backbone"])
def test_a_description_without_weights_equals_the_loaded_model(
    tiny_model, architecture, kind, tmp_path, no_weights
):
    model = tiny_model(architecture, dtype=torch.float32, num_labels=3)
    if kind == "adapted":
        add_lora(model, r=2, alpha=2)
    (model.backbone if kind == "backbone" else model).save_pretrained(tmp_path)
    asked = {"num_labels": 3} | ({"max_length": 48} if kind == "backbone" else {})
    expected = said_by(Classifier.from_pretrained(tmp_path, **asked))
    no_weights()
    assert describe_model(tmp_path, **asked) == expected
    with pytest.raises((AssertionError, ClassifierError), match="weights were read"):
        Classifier.from_pretrained(tmp_path, **asked)


def test_a_description_follows_what_is_asked_and_a_head_without_bias(tiny_model, tmp_path):
    tiny_model("bert", head_bias=False).save_pretrained(tmp_path / "saved")
    tiny_model("bert", dtype=torch.float32).backbone.save_pretrained(tmp_path / "backbone")
    for name, asked in (
        ("saved", {"num_labels": 3, "max_length": 20}),
        ("saved", {"num_labels": None, "label_names": ["a", "b", "c"]}),
        ("backbone", {"num_labels": 5, "max_length": 64, "pooling": "mean"}),
    ):
        model = Classifier.from_pretrained(tmp_path / name, **asked)
        assert describe_model(tmp_path / name, **asked) == said_by(model)


def test_a_description_is_made_anew_when_a_file_has_changed(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    first = describe_model(tmp_path, num_labels=3)
    tiny_model("bert", seed=1, backbone={"intermediate_size": 48}).save_pretrained(tmp_path)
    second = describe_model(tmp_path, num_labels=3)
    assert second == said_by(Classifier.from_pretrained(tmp_path))
    assert second["sha256"] != first["sha256"] and second["parameters"] > first["parameters"]


@pytest.mark.parametrize(
    "name, asked, message",
    [
        ("saved", {"num_labels": 2}, "num_labels=3, asked for 2"),
        ("saved", {"num_labels": 3, "pooling": "mean"}, "pooling='cls', asked for 'mean'"),
        ("saved", {"num_labels": 3, "max_length": 65}, "65 is more than the 64 positions"),
        ("backbone", {"num_labels": None}, "num_labels is needed"),
        ("backbone", {"num_labels": 2, "max_length": 65}, "65 is more than the 64 positions"),
        ("backbone", {"num_labels": 2, "pooling": "first"}, "unknown pooling 'first'"),
    ],
)
def test_a_description_refuses_what_loading_refuses(tiny_model, tmp_path, name, asked, message):
    model = tiny_model("bert", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    model.backbone.save_pretrained(tmp_path / "backbone")
    for ask in (describe_model, Classifier.from_pretrained):
        with pytest.raises(ValueError, match=message):
            ask(tmp_path / name, **asked)


def test_a_saved_configuration_without_a_backbone_is_refused(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone": None}))
    for ask in (describe_model, Classifier.from_pretrained):
        with pytest.raises(ClassifierError, match="backbone"):
            ask(tmp_path, num_labels=3)


ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "base_model_name_or_path": "."}


@pytest.mark.parametrize("kind", ["saved", "backbone", "adapter alone"])
def test_an_adapter_beside_a_model_is_refused_and_does_not_outlive_a_save(
    tiny_model, tmp_path, kind
):
    model = tiny_model("bert", dtype=torch.float32)
    if kind != "adapter alone":
        (model if kind == "saved" else model.backbone).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    for ask in (Classifier.from_pretrained, describe_model):
        with pytest.raises(ClassifierError, match="adapter_config.json.*merge the adapter first"):
            ask(tmp_path, num_labels=3)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*"))
    assert torch.equal(Classifier.from_pretrained(tmp_path).head.weight, model.head.weight)


def test_our_own_adapters_are_no_stray_ones(tiny_model, tmp_path):
    model = tiny_model("bert", dtype=torch.float32)
    add_lora(model, r=2, alpha=2)
    model.save_pretrained(tmp_path)
    assert Classifier.from_pretrained(tmp_path).config.lora["r"] == 2


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "be'),
        ("config.json", '{"model_type": "bert", "hidden_size": "wide"}'),
        ("tokenizer.json", '{"version": "1.0", "trunc'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": "Pre'),
        ("model.safetensors", "no weights"),
        ("model.safetensors.index.json", "{}"),
    ],
)
def test_a_damaged_file_is_named(tiny_checkpoint, tmp_path, file, text):
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(ClassifierError, match=file.replace(".", r"\.")):
        Classifier.from_pretrained(tmp_path, num_labels=2)


def test_a_saved_classifier_with_more_than_its_configuration_says_is_refused(tiny_model, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    fewer = kept | {"backbone": kept["backbone"] | {"num_hidden_layers": 1}}
    for changed, message in ((kept | {"head_bias": False}, "head.bias"), (fewer, "layer.1.")):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ClassifierError, match=f"no place: .*{message}"):
            Classifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_a_backbone_with_more_layers_than_its_configuration_says_is_refused(tmp_path, whole):
    config = build_backbone_config("bert")
    kind = transformers.BertForMaskedLM if whole else transformers.BertModel
    kind(config).save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(kept | {"num_hidden_layers": 1}))
    with pytest.raises(ClassifierError, match="no place: .*encoder.layer.1"):
        Classifier.from_pretrained(tmp_path, num_labels=2, max_length=64)


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {"1": "a", "2": "b", "3": "c"}},
        {"id2label": {"0": "a", "1": "a", "2": "c"}},
        {"label2id": {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 2}},
    ],
)
def test_a_saved_classifier_whose_classes_contradict_themselves_is_refused(
    tiny_model, tmp_path, labels
):
    tiny_model("bert").save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(kept | labels))
    for ask in (Classifier.from_pretrained, describe_model):
        with pytest.raises(ClassifierError, match="classes 0, 1|contradict"):
            ask(tmp_path, num_labels=3)


def test_the_head_of_a_seed_is_the_same_whatever_the_default_type(tiny_checkpoint):
    expected = Classifier.from_pretrained(tiny_checkpoint, num_labels=2, seed=3).head.weight
    torch.set_default_dtype(torch.float64)
    try:
        found = Classifier.from_pretrained(tiny_checkpoint, num_labels=2, seed=3).head.weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
