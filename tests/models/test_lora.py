"""LoRA in every architecture: nothing changes at the start, everything comes back, merging keeps the function."""

import pytest
import torch

from lpft_nb.classifier import Classifier
from lpft_nb.models.lora import add_lora, inject_lora, lora_targets, merge_lora

FUSED = {"modernbert": ("Wqkv",), "gpt2": ("c_attn",), "gpt-neox": ("query_key_value",)}


def test_lora_on_every_architecture(tiny_model, architecture, tmp_path):
    model = tiny_model(architecture, num_labels=2, dtype=torch.float32)
    batch = model.tokenize(["a good film", "the dull cat sat on the matrix"])
    before = model(**batch).logits
    targets = add_lora(model, r=2, alpha=2, seed=1)
    assert targets == FUSED.get(architecture, targets) and (
        len(targets) == 2 or architecture in FUSED
    )
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-6, atol=1e-7)  # B = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    trained = model(**batch).logits
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    torch.testing.assert_close(again(**batch).logits, trained, rtol=1e-6, atol=1e-7)
    merge_lora(again)
    torch.testing.assert_close(again(**batch).logits, trained, rtol=1e-4, atol=1e-5)
    assert add_lora(again, r=2, alpha=2) == targets


def test_no_attention_no_default_targets():
    with pytest.raises(ValueError, match="name the modules to adapt"):
        lora_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_an_adapted_layer_is_its_matrix_plus_the_scaled_product(tiny_model):
    "Oracle: W₀ + (α/r) B A by hand; other targets than the default, and the seed of A."
    model, plain = tiny_model("bert", dtype=torch.float64), tiny_model("bert", dtype=torch.float64)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert add_lora(model, r=3, alpha=6, targets=("dense",), seed=4) == ("dense",)
    assert torch.equal(torch.get_rng_state(), state)
    layer = model.backbone.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        own = plain.backbone.encoder.layer[0].intermediate.dense
        rows = torch.randn(5, 16, dtype=torch.float64)
        expected = rows @ (own.weight + 6 / 3 * product).T + own.bias
        torch.testing.assert_close(layer(rows), expected)
    again = tiny_model("bert", dtype=torch.float64)
    add_lora(again, r=3, alpha=6, targets=("dense",), seed=4)
    same = again.backbone.encoder.layer[0].intermediate.dense.lora_A["default"].weight
    assert torch.equal(same, layer.lora_A["default"].weight)
    other = tiny_model("bert", dtype=torch.float64)
    add_lora(other, r=3, alpha=6, targets=("dense",), seed=5)
    assert not torch.equal(
        other.backbone.encoder.layer[0].intermediate.dense.lora_A["default"].weight, same
    )


def test_adapters_on_adapters_and_merging_none_are_refused(tiny_model):
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="no LoRA adapters to merge"):
        merge_lora(model)
    add_lora(model, r=2, alpha=2)
    with pytest.raises(ValueError, match="merge them first"):
        add_lora(model, r=2, alpha=2)
    with pytest.raises(TypeError):
        inject_lora(model.backbone, 2, 2.0, ("query",))
