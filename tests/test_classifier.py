"""f = Vφ + b as a user has it: logits, predictions and features of many texts, the hub, the Trainer and peft."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model_oracle import TEXTS, TOLERANCE, alone
from torch.testing import assert_close

from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.classifier import Classifier, features_of, logits_of
from lpft_nb.models.head import set_head


def test_logits_are_the_head_on_the_features(tiny_model, architecture):
    model = tiny_model(architecture)
    batch = model.tokenize(TEXTS)
    with torch.no_grad():
        features = model.features(**batch)
        assert torch.equal(model(**batch).logits, model.head(features))
        assert_close(model(**batch).logits, features @ model.head.weight.T + model.head.bias)


def test_dropout_before_the_head_acts_in_training_only(tiny_model):
    model = tiny_model("bert", head_dropout=0.5)
    model.backbone.eval()
    batch = model.tokenize(TEXTS)
    quiet = model(**batch).logits
    model.dropout.train()
    torch.manual_seed(3)
    noisy = model(**batch).logits
    torch.manual_seed(3)
    expected = model.head(torch.nn.functional.dropout(model.features(**batch), 0.5))
    assert_close(noisy, expected)
    assert not torch.allclose(noisy, quiet)


def test_unknown_arguments_are_errors(tiny_model):
    model = tiny_model("bert")
    batch = model.tokenize(TEXTS)
    with pytest.raises(TypeError, match="position_ids"):
        model(**batch, position_ids=batch["input_ids"])
    with pytest.raises(TypeError, match="return_dict"):
        model(**batch, return_dict=False)
    with pytest.raises(TypeError):
        model.features(**batch, labels=torch.zeros(4))


def test_predict(tiny_model):
    model = tiny_model("bert")
    set_head(model, 3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    labels, probabilities = model.predict(TEXTS, batch_size=2)
    with torch.no_grad():
        expected = model(**model.tokenize(TEXTS)).logits.softmax(dim=1)
    assert_close(torch.tensor(probabilities), expected, **TOLERANCE)
    assert labels.tolist() == expected.argmax(dim=1).tolist() and labels.dtype == np.int64
    assert model.predict(list(zip(TEXTS, TEXTS))).labels.shape == (4,)
    with pytest.raises(ValueError, match="no texts"):
        model.predict([])
    model.tokenizer = None
    with pytest.raises(ClassifierError, match="no tokenizer"):
        model.predict(TEXTS)


def test_features_of_keeps_the_order(tiny_model, architecture):
    model = tiny_model(architecture)
    encoded = model.encode(TEXTS)
    with torch.no_grad():
        expected = alone(model, encoded)
    for batch_size in (1, 3, 64):
        assert_close(features_of(model, encoded, batch_size), expected, **TOLERANCE)
    assert_close(features_of(model, model.tokenize(TEXTS)), expected, **TOLERANCE)
    assert_close(features_of(model, TEXTS), expected, **TOLERANCE)
    assert_close(logits_of(model, TEXTS), model.head(expected).detach(), **TOLERANCE)


def test_features_of_switches_dropout_off_and_restores_every_mode(tiny_model):
    model = tiny_model("bert", backbone={"hidden_dropout_prob": 0.5})
    expected = features_of(model, TEXTS)
    model.train()
    model.backbone.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(features_of(model, TEXTS), expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError):
        features_of(model, [])
    assert [module.training for module in model.modules()] == modes
    assert not expected.requires_grad and not expected.is_inference()


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ],
)
def test_features_of_returns_at_least_float32(tiny_model, dtype, expected):
    assert features_of(tiny_model("bert", dtype=dtype), TEXTS).dtype == expected


def test_damaged_weights_never_give_numbers(tiny_model):
    model = tiny_model("bert")
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight[model.tokenizer("cat")["input_ids"][1]] = (
            float("nan")
        )
    with pytest.raises(ValueError, match="1 of 4 rows are NaN"):
        features_of(model, TEXTS)
    with pytest.raises(ValueError, match="NaN"):
        model.predict(TEXTS)


def test_push_to_hub_sends_model_and_tokenizer(tiny_model, tmp_path, monkeypatch):
    sent = {}
    hub = transformers.utils.hub

    class Api:
        def create_repo(self, repo_id, **_):
            sent["repo_id"] = repo_id
            return type("Answer", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            pass

    monkeypatch.setattr(hub, "hf_api", lambda *_, **__: Api())
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(
        Classifier,
        "_upload_modified_files",
        lambda self, folder, *_, **__: sent.update(
            files={path.name for path in Path(folder).iterdir()}
        ),
    )
    model = tiny_model("bert")
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model.push_to_hub("someone/probe")
    assert sent["repo_id"] == "someone/probe" and sent["files"] >= needed
    sent.clear()
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/other", private=True)
    assert sent["repo_id"] == "someone/other" and sent["files"] >= needed
    assert needed <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_moves_every_parameter(tiny_model, architecture, checkpointing, tmp_path):
    model = tiny_model(architecture, dtype=torch.float32, head_dropout=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    examples = [
        {**example, "labels": index % 3} for index, example in enumerate(model.encode(TEXTS))
    ]

    def collate(rows):
        batch = model.pad([{name: row[name] for name in row if name != "labels"} for row in rows])
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.1,
    )
    if checkpointing:
        model.gradient_checkpointing_enable()
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, data_collator=collate)
    trainer.train()
    assert [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ] == []
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(
        logits_of(Classifier.from_pretrained(tmp_path / "saved"), TEXTS), logits_of(model, TEXTS)
    )


@pytest.mark.parametrize(
    "architecture, targets", [("bert", ["query", "value"]), ("llama", ["q_proj", "v_proj"])]
)
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_peft_wraps_a_classifier(tiny_model, architecture, targets, task_type, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = tiny_model(architecture, dtype=torch.float32)
    start = logits_of(model, TEXTS)
    original = copy.deepcopy(model)
    wrapped = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=targets, modules_to_save=["head"], task_type=task_type),
    )
    assert_close(logits_of(wrapped, TEXTS), start)
    batch, labels = model.tokenize(TEXTS), torch.tensor([0, 1, 2, 0])
    optimiser = torch.optim.SGD(
        [parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=1.0
    )
    for _ in range(2):
        optimiser.zero_grad()
        wrapped(**batch, labels=labels).loss.backward()
        optimiser.step()
    trained = logits_of(wrapped.eval(), TEXTS)
    assert not torch.allclose(trained, start, atol=1e-3)
    wrapped.save_pretrained(tmp_path)
    assert_close(logits_of(PeftModel.from_pretrained(original, tmp_path).eval(), TEXTS), trained)
    assert_close(logits_of(wrapped.merge_and_unload(), TEXTS), trained)
