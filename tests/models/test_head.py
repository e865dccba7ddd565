"""The head: how it starts, how it is set, and the loss behind it."""

import numpy as np
import pytest
import torch
from model_oracle import TEXTS
from torch.testing import assert_close

from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.classifier import Classifier
from lpft_nb.models.head import reset_head, set_head


def test_loss_is_the_mean_negative_log_likelihood(tiny_model):
    model = tiny_model("bert")
    batch, labels = model.tokenize(TEXTS), torch.tensor([0, 2, 1, 2])
    output = model(**batch, labels=labels)
    expected = -torch.stack(
        [output.logits[i].log_softmax(0)[label] for i, label in enumerate(labels)]
    )
    assert_close(output.loss, expected.mean())
    assert_close(
        model(**batch, labels=labels, num_items_in_batch=torch.tensor(8)).loss, expected.sum() / 8
    )
    assert model(**batch, output_attentions=None, return_dict=True).loss is None


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, -1, 2], [0, 1, -100, 2]])
def test_labels_out_of_range_are_errors(tiny_model, labels):
    model = tiny_model("bert")
    with pytest.raises(IndexError):
        model(**model.tokenize(TEXTS), labels=torch.tensor(labels))


@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(4),
        torch.zeros(4, 3),
        torch.zeros(3, dtype=torch.long),
        torch.full((4, 3), 1 / 3),
    ],
)
def test_labels_of_another_form_are_errors(tiny_model, labels):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="labels must be integers"):
        model(**model.tokenize(TEXTS), labels=labels)


def test_reset_head_reads_no_global_generator(tiny_model):
    model = tiny_model("bert", num_labels=5, backbone={"hidden_size": 256})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    reset_head(model, 11)
    first = model.head.weight.clone()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    reset_head(model, 11)
    assert torch.equal(model.head.weight, first)
    reset_head(model, 12)
    assert not torch.equal(model.head.weight, first)
    assert model.head.bias.abs().max() == 0
    assert abs(first.std().item() - 0.02) < 0.002 and abs(first.mean().item()) < 0.002


def test_set_head(tiny_model):
    model = tiny_model("bert")
    weight, bias = torch.randn(3, 16), torch.randn(3)
    set_head(model, weight, bias)
    assert torch.equal(model.head.weight, weight.double()) and torch.equal(
        model.head.bias, bias.double()
    )
    set_head(model, weight)
    assert model.head.bias.abs().max() == 0


@pytest.mark.parametrize(
    "weight, bias, message",
    [
        (torch.zeros(16, 3), None, r"weight must have shape \(3, 16\), got \(16, 3\)"),
        (torch.zeros(1, 16), None, r"weight must have shape"),
        (torch.zeros(3, 16), torch.zeros(3, 1), r"bias must have shape \(3,\)"),
        (torch.full((3, 16), float("nan")), None, "NaN"),
        (torch.zeros(3, 16), torch.tensor([0, float("inf"), 0]), "infinity"),
    ],
)
def test_set_head_refuses(tiny_model, weight, bias, message):
    model = tiny_model("bert")
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=message):
        set_head(model, weight, bias)
    assert torch.equal(model.head.weight, before)


def test_a_head_without_bias(tiny_model, tmp_path):
    model = tiny_model("bert", head_bias=False)
    assert model.head.bias is None
    with pytest.raises(ValueError, match="head_bias=True"):
        set_head(model, torch.zeros(3, 16), torch.zeros(3))
    set_head(model, torch.ones(3, 16))
    model.save_pretrained(tmp_path)
    assert Classifier.from_pretrained(tmp_path).head.bias is None
    with pytest.raises(ClassifierError, match="head_bias=False, asked for True"):
        Classifier.from_pretrained(tmp_path, head_bias=True)


def test_what_is_no_label_and_no_number_of_rows_is_refused(tiny_model):
    model = tiny_model("bert")
    batch = model.tokenize(TEXTS[:2])
    for labels in ([0, -(2**31)], [True, False]):
        with pytest.raises(ValueError, match="labels must be"):
            model(**batch, labels=torch.tensor(labels))
    with pytest.raises(ValueError, match="positive number of rows, got 0"):
        model(**batch, labels=torch.tensor([0, 1]), num_items_in_batch=0)


def test_a_temperature_is_any_positive_number(tiny_model):
    model = tiny_model("bert")
    for two in (2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0)):
        softer = model.with_temperature(two)
        assert torch.equal(softer.head.weight, model.head.weight / 2)
        assert softer.config.history[-1] == {"temperature": 2.0}
    for wrong in (10**400, True, "2", None, float("nan"), -1, 0, torch.ones(2)):
        with pytest.raises(ValueError, match="temperature must be a positive finite number"):
            model.with_temperature(wrong)
