"""A saved model loads where this package is not installed, and gives the same numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import build_backbone_config, build_tiny_model, build_tokenizer
from model_oracle import TEXTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, dynamic_module_utils, pipeline

from lpft_nb.classifier import Classifier, _Function
from lpft_nb.models.lora import add_lora
from lpft_nb.models.portable import Gathered, bindings, modelling_source

LONG = " ".join(TEXTS * 3)  # more tokens than the models take
INPUTS = [*TEXTS, LONG, {"text": "the cat sat", "text_pair": "the dog ran under the tree"}]
PAIR = [("the cat sat", "the dog ran under the tree")]
ALONE = """
import json, sys
from pathlib import Path
sys.modules["lpft_nb"] = sys.modules["peft"] = None  # not to be had
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, pipeline

folder, inputs = Path(sys.argv[1]), json.loads(sys.argv[2])
for path in sorted(folder.iterdir()):
    if path.name.startswith("lora"):
        sys.modules.pop("peft", None)
    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    logits = model.eval()(**load_file(path / "batch")).logits.detach()
    save_file({"logits": logits}, path / "logits")
    classify = pipeline("text-classification", str(path), trust_remote_code=True, device="cpu",
                        truncation=True, top_k=None, batch_size=4)
    (path / "answers").write_text(json.dumps(classify(inputs)))
"""


def made(kind: str):
    "A trained-looking model of a kind: an architecture, a side, a temperature or adapters."
    if kind == "elsewhere":
        return fine_tuned_elsewhere()
    name = {"left": "gpt2", "lora": "bert", "softer": "bert"}.get(kind, kind)
    model = build(name)
    if kind == "left":
        model.tokenizer.padding_side = "left"
    if kind == "lora":
        add_lora(model, r=2, alpha=4)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model.with_temperature(2.5) if kind == "softer" else model


def fine_tuned_elsewhere():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = build_backbone_config("roberta", num_labels=3)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return Classifier.from_sequence_classifier(model, tokenizer=build_tokenizer(), max_length=32)


def build(name: str):
    model = build_tiny_model(name, dtype=torch.float32)
    if name == "distilbert":  # whose tokenizers may number texts that the model cannot tell apart
        model.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model.config.id2label = {0: "cold", 1: "mild", 2: "hot"}
    model.config.label2id = {"cold": 0, "mild": 1, "hot": 2}
    with torch.no_grad():
        model.head.weight.mul_(30)
    return model


KINDS = ("bert", "distilbert", "roberta", "llama", "t5", "left", "lora", "softer", "elsewhere")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "Each kind's model and the folder in which a process without this package has left its numbers."
    folder, models = tmp_path_factory.mktemp("portable"), {}
    for kind in KINDS:
        models[kind] = made(kind)
        models[kind].save_pretrained(folder / kind)
        save_file(models[kind].tokenize([*TEXTS, LONG]), folder / kind / "batch")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), json.dumps(INPUTS)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "not supported" not in done.stderr
    return models, folder


def expected(model):
    return [*model.predict([*TEXTS, LONG]).probabilities, model.predict(PAIR).probabilities[0]]


def close(answers, model):
    for answer, row in zip(answers, expected(model), strict=True):
        found = {one["label"]: one["score"] for one in answer}
        assert found == pytest.approx(
            {model.config.id2label[c]: p for c, p in enumerate(row)}, abs=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_the_logits_are_the_same(alone, kind):
    "Up to the rounding of another process."
    models, folder = alone
    with torch.no_grad():
        logits = models[kind](**load_file(folder / kind / "batch")).logits
    found = load_file(folder / kind / "logits")["logits"]
    torch.testing.assert_close(found, logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_beside_the_weights_gives_the_same_bits(alone, kind, tmp_path, monkeypatch):
    models, folder = alone
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    load = dynamic_module_utils.get_class_from_dynamic_module
    configuration, model_class = (
        load(f"modeling_lpft.{name}", str(folder / kind))
        for name in ("ClassifierConfig", "Classifier")
    )
    again = model_class.from_pretrained(
        folder / kind, config=configuration.from_pretrained(folder / kind)
    )
    assert not isinstance(again, Classifier)
    batch = load_file(folder / kind / "batch")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, models[kind](**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_a_pipeline_predicts_the_same(alone, kind):
    models, folder = alone
    close(json.loads((folder / kind / "answers").read_text()), models[kind])


@pytest.mark.parametrize("kind", ["distilbert", "left", "lora", "softer"])
@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_a_pipeline_predicts_the_same(alone, kind, trust, caplog):
    models, folder = alone
    classify = pipeline(
        "text-classification",
        str(folder / kind),
        trust_remote_code=trust,
        device="cpu",
        truncation=True,
        top_k=None,
    )
    assert type(classify.model) is Classifier
    close(classify(INPUTS), models[kind])
    assert "not supported" not in caplog.text


def test_a_softer_model_is_softer(alone):
    models, _ = alone
    plain, softer = (models[kind].predict(TEXTS) for kind in ("bert", "softer"))
    assert (plain.labels == softer.labels).all()
    assert (softer.probabilities.max(axis=1) < plain.probabilities.max(axis=1)).all()


def test_the_tokenizer_names_the_models_length_and_inputs(tiny_model, tmp_path):
    tiny_model("distilbert", max_tokens=17).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["model_max_length"] == 17
    assert content["model_input_names"] == ["input_ids", "attention_mask"]
    again = Classifier.from_pretrained(tmp_path, max_length=20)
    again.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["model_max_length"] == 20


def test_a_model_without_tokenizer_is_portable_too(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_lpft.ClassifierConfig",
        "AutoModelForSequenceClassification": "modeling_lpft.Classifier",
    }
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_the_code_is_that_of_the_package():
    source = modelling_source("lpft_nb.classifier", "_Function")
    assert bindings("lpft_nb.classifier")["_Function"].text in source
    assert bindings("lpft_nb.models.backbones")["pool"].text in source
    assert "import lpft_nb" not in source and "from lpft_nb" not in source
    assert modelling_source(_Function.__module__, _Function.__name__) is source


def test_what_is_used_comes_first_and_an_unknown_name_adds_nothing():
    gathered = Gathered()
    gathered.add("lpft_nb.models.encoding", "pad_encoded")
    names = list(gathered.code)
    assert names.index("MODEL_INPUTS") < names.index("_checked_names") < names.index("pad_encoded")
    assert names.index("one_of") < names.index("pad_encoded")
    gathered.add("lpft_nb.models.encoding", "len")
    assert list(gathered.code) == names


def test_two_pieces_of_one_name_are_refused():
    gathered = Gathered(code={"pool": "def pool(): ..."})
    with pytest.raises(ValueError, match="'pool' of lpft_nb.models.backbones would hide"):
        gathered.add("lpft_nb.models.backbones", "pool")
