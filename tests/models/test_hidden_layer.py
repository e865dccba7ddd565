"""A hidden layer behind the pooling: φ grows, f stays V φ + b for features, files, kernel and a model on its own."""

import subprocess
import sys

import pytest
import torch
from conftest import build_tiny_model

from lpft_nb.classifier import Classifier, features_of, logits_of
from lpft_nb.models.hidden_layer import add_hidden_layer, below_hidden_layer
from lpft_nb.models.lora import add_lora
from lpft_nb.tangent_kernel import tangent_kernel

TEXTS = ["a good film", "the dull cat sat on the matrix", "a dull movie"]


def grown(architecture="bert", width=5, **fields):
    model = build_tiny_model(architecture, **fields)
    add_hidden_layer(model, width, seed=3)
    return model


def test_phi_is_the_rectified_layer_of_what_is_read_out_in_every_architecture(architecture):
    plain, model = build_tiny_model(architecture), grown(architecture)
    below = features_of(plain, TEXTS)
    layer = model.backbone.hidden_layer
    expected = (below @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(features_of(model, TEXTS), expected)
    torch.testing.assert_close(
        logits_of(model, TEXTS), expected @ model.head.weight.T + model.head.bias
    )
    with below_hidden_layer(model):
        torch.testing.assert_close(features_of(model, TEXTS), below)
    torch.testing.assert_close(features_of(model, TEXTS), expected)


@pytest.mark.parametrize("fields", [{}, {"pooling": "mean"}, {"head_bias": False}], ids=str)
@pytest.mark.parametrize("adapted", [False, True])
def test_saved_and_loaded_it_gives_the_same_logits(tmp_path, fields, adapted):
    model = grown(dtype=torch.float32, **fields)
    if adapted:
        add_lora(model, r=2, alpha=2)
    logits = logits_of(model, TEXTS)
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    assert again.config.hidden_layer == 16 and again.config.hidden_size == 5
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    torch.testing.assert_close(logits_of(again, TEXTS), logits, rtol=1e-6, atol=1e-7)


def test_the_code_beside_the_weights_knows_the_layer(tmp_path):
    model = grown(dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    batch = {name: table.tolist() for name, table in model.tokenize(TEXTS[:1]).items()}
    script = (
        "import sys, torch\nsys.modules['lpft_nb'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=True).eval()\n"
        f"batch = {{n: torch.tensor(t) for n, t in {batch!r}.items()}}\n"
        "print(model(**batch).logits.tolist())\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    expected = logits_of(model, TEXTS[:1])
    torch.testing.assert_close(torch.tensor(eval(told.stdout)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5"])
def test_the_kernel_is_that_of_autograd_with_the_layer_in_f(architecture):
    model = grown(architecture)
    batch = model.tokenize(TEXTS)
    kernel = tangent_kernel(model, batch, by="module")
    rows = []
    for example in range(len(TEXTS)):
        for score in model(**batch).logits[example]:
            parts = torch.autograd.grad(
                score, list(model.parameters()), retain_graph=True, allow_unused=True
            )
            own = zip(parts, model.parameters(), strict=True)
            rows.append(
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in own])
            )
    gradients = torch.stack(rows)
    size = len(rows)
    torch.testing.assert_close(
        kernel.total.reshape(size, size), gradients @ gradients.T, rtol=1e-9, atol=1e-12
    )
    phi = features_of(model, TEXTS)
    expected = torch.einsum("nm,cd->ncmd", phi @ phi.T + 1, torch.eye(3, dtype=phi.dtype))
    torch.testing.assert_close(kernel.pretrain_effective, expected)
    assert kernel.shares["hidden_layer"].abs().sum() > 0


def test_it_is_drawn_by_the_seed_and_leaves_the_global_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = grown(), grown(), build_tiny_model("bert")
    add_hidden_layer(other, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    weight = lambda model: model.backbone.hidden_layer.weight
    assert torch.equal(weight(one), weight(same)) and not torch.equal(weight(one), weight(other))
    assert weight(one).dtype == torch.float64 and one.head.weight.dtype == torch.float64
    assert not one.backbone.hidden_layer.training


@pytest.mark.parametrize("width", [0, -1, True, 2.0, "4"])
def test_a_width_that_is_none_is_refused(width):
    model = build_tiny_model("bert")
    with pytest.raises(ValueError, match="expected a positive whole number"):
        add_hidden_layer(model, width)
    assert model.config.hidden_layer is None and model.head.in_features == 16


def test_a_second_layer_is_refused():
    with pytest.raises(ValueError, match="already has a hidden layer of 5"):
        add_hidden_layer(grown(), 4)
