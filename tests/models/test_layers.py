"""Blocks by architecture, layers that come from their blocks, and skip connections: against weights that are shaken, and by hand."""

import copy
import sys

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, build_backbone_config, build_tiny_model, build_tokenizer
from kernel_oracle import gradient_rows
from model_oracle import POOLING, TEXTS
from repository import ROOT
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from lpft_nb.classifier import Classifier, logits_of
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.fingerprints import function_fingerprint
from lpft_nb.models.layers import (
    LayerError,
    add_skip,
    block_lists,
    block_parameters,
    check_layers,
    layer_features,
    to_width,
)
from lpft_nb.tangent_kernel import tangent_kernel

sys.path.insert(0, str(ROOT / "benchmarks"))
import architectures

OWN_BLOCKS = [name for name in ARCHITECTURES if name != "albert"]
MORE = ("gemma", "gemma2", "gemma3_text", "qwen3", "opt", "xlm", "xlnet", "bloom", "mt5")
LISTS = {
    "bert": ["encoder.layer"],
    "distilbert": ["transformer.layer"],
    "gpt2": ["h"],
    "llama": ["layers"],
    "t5": ["encoder.block"],
}


def small(name="bert", **fields):
    return build_tiny_model(name, dtype=torch.float32, **fields)


def another(name, folder):
    "A tiny random model of an architecture that the fixtures do not have."
    architectures.save_tiny(name, str(folder))
    build_tokenizer().save_pretrained(folder)
    return Classifier.from_pretrained(folder, num_labels=3, max_length=32)


def shaken(model, names):
    "A copy in which the named weights of the backbone are others."
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    weights = dict(made.backbone.named_parameters())
    with torch.no_grad():
        for name in names:
            weights[name].add_(0.3 * torch.randn(weights[name].shape, generator=generator))
    return made


def check_numbers_of(model):
    "Other weights in block k change layers k, k + 1, … and none before."
    depth, encoded = check_layers(model), model.encode(TEXTS)
    before = layer_features(model, encoded, ["mean"])
    assert sorted(layer for layer, _ in before) == list(range(depth + 1))
    for layer in range(1, depth + 1):
        names = block_parameters(model.backbone, layer)
        after = layer_features(shaken(model, names), encoded, ["mean"])
        moved = [not torch.equal(rows, after[place]) for place, rows in before.items()]
        assert moved == [number >= layer for number, _ in before], layer


@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_layer_k_is_what_block_k_gives(name):
    model = small(name)
    check_numbers_of(model)
    if name in LISTS:
        assert block_lists(model.backbone) == LISTS[name]


@pytest.mark.parametrize("name", MORE)
def test_layer_k_is_what_block_k_gives_in_further_architectures(name, tmp_path):
    check_numbers_of(another(name, tmp_path / name))


def test_a_block_that_is_spread_over_lists_is_taken_whole(tmp_path):
    backbone = another("xlm", tmp_path / "xlm").backbone
    parts = {name.split(".")[0] for name in block_parameters(backbone, 1)}
    assert parts == set(block_lists(backbone)) and len(parts) == 4


def test_blocks_share_no_weights_and_leave_embeddings_and_norms_out():
    backbone = small("gpt2").backbone
    one, two = (block_parameters(backbone, layer) for layer in (1, 2))
    rest = {name for name, _ in backbone.named_parameters()} - {*one, *two}
    assert not set(one) & set(two)
    assert rest == {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


# --- what is refused


@pytest.mark.parametrize("layer", [0, 3, -1, 1.0, True, "1", None])
def test_a_layer_that_is_none_is_refused(layer):
    with pytest.raises(LayerError, match="expected a number from 1 to 2, for BertModel has 2"):
        block_parameters(small().backbone, layer)


def test_shared_layers_are_refused():
    with pytest.raises(LayerError, match="AlbertModel keeps no list of 2 blocks"):
        block_parameters(small("albert").backbone, 1)


def test_a_weight_that_two_blocks_share_is_refused():
    backbone = small().backbone
    layers = backbone.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(
        LayerError, match=r"block 1 .*shares weights with encoder\.layer\.1\.output"
    ):
        block_parameters(backbone, 1)


def test_states_that_are_not_the_blocks_are_refused_and_nothing_is_left(tmp_path):
    model = another("mamba", tmp_path / "mamba")
    model.backbone.embeddings.requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    with pytest.raises(LayerError, match="not what its 2 blocks give"):
        check_layers(model)
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before
    assert block_parameters(model.backbone, 1)  # one block can be trained all the same
    assert all(one.grad is None for one in model.parameters()) and not model.training


def test_a_missing_state_is_refused():
    model = small()
    forward = model.backbone.forward

    def cut(*given, **more):
        output = forward(*given, **more)
        output.hidden_states = output.hidden_states[1:]
        return output

    model.backbone.forward = cut
    with pytest.raises(LayerError, match="its layers cannot be read"):
        check_layers(model)


# --- the skip connection


def by_hand(model, layer, pooling):
    "φ and the pooled output of a block, each text alone and without the classifier's own code."
    rows = []
    for example in model.encode(TEXTS):
        batch = model.pad([example])
        states = []
        block = model.backbone.get_submodule(f"{block_lists(model.backbone)[0]}.{layer - 1}")

        def keep(module, given, output, states=states):
            states.append(output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(keep)
        with torch.no_grad():
            features = model.features(**batch)
        handle.remove()
        state = {"cls": states[0][:, 0], "last": states[0][:, -1], "mean": states[0].mean(dim=1)}
        rows.append(features + state[pooling])
    return torch.cat(rows)


@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_a_skip_adds_what_the_block_gives_to_the_features(name):
    pooling = POOLING[name]
    model = small(name, pooling=pooling)
    expected = by_hand(model, 1, pooling)
    size = sum(one.numel() for one in model.parameters())
    plain = copy.deepcopy(model)
    add_skip(model, 1)
    with torch.no_grad():
        found = model.features(**model.tokenize(TEXTS))
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, plain.features(**plain.tokenize(TEXTS)), atol=1e-2)
    assert sum(one.numel() for one in model.parameters()) == size


@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_a_saved_skip_comes_back_bit_for_bit(name, tmp_path):
    model = small(name)
    add_skip(model, 1)
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    assert again.config.skip == 1
    assert torch.equal(logits_of(again, TEXTS), logits_of(model, TEXTS))
    assert not torch.equal(logits_of(again, TEXTS), logits_of(small(name), TEXTS))


def test_a_skip_goes_with_the_code_beside_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = small("bert", head_dropout=0.0)
    add_skip(model, 1)
    model.save_pretrained(tmp_path / "saved")
    batch = model.tokenize(TEXTS)
    with monkeypatch.context() as patch:
        patch.delitem(
            AutoModelForSequenceClassification._model_mapping._extra_content,
            type(model.config),
            raising=False,
        )
        other = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "saved", trust_remote_code=True
        ).eval()
    assert type(other).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_skip_is_part_of_the_fingerprint_and_none_is_not():
    model = small()
    before = function_fingerprint(model)
    made = []
    for layer in (1, 2):
        other = small(backbone=dict(num_hidden_layers=3))
        add_skip(other, layer)
        made.append(function_fingerprint(other))
    assert len({before, *made}) == 3 and function_fingerprint(small()) == before


def test_the_last_layer_and_a_second_skip_are_refused():
    model = small()
    with pytest.raises(LayerError, match="add φ to itself"):
        add_skip(model, 2)
    assert model.config.skip is None
    add_skip(model, 1)
    add_skip(model, 1)  # is there
    with pytest.raises(LayerError, match="from layer 1 already, asked for one from layer 2"):
        add_skip(model, 2)


def test_a_saved_number_that_is_no_layer_is_refused(tmp_path):
    model = small()
    add_skip(model, 1)
    model.config.skip = 9
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ClassifierError):
        Classifier.from_pretrained(tmp_path / "saved")


def test_a_model_that_reads_in_its_own_way_skips_by_the_token_of_its_kind():
    config = build_backbone_config("roberta", num_labels=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    made = Classifier.from_sequence_classifier(model, tokenizer=build_tokenizer(), max_length=32)
    batch = made.tokenize(TEXTS)
    with torch.no_grad():
        before = made.features(**batch)
        first = layer_features(made, made.encode(TEXTS), ["cls"])[1, "cls"]
        add_skip(made, 1)
        assert_close(made.features(**batch), before + first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [8, 24])
def test_another_width_is_padded_or_averaged(width, tmp_path):
    "OPT's layers may be wider or narrower than what it gives."
    config = transformers.OPTConfig(
        vocab_size=128, hidden_size=16, word_embed_proj_dim=width, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.OPTModel(config).save_pretrained(tmp_path / "opt")
    build_tokenizer().save_pretrained(tmp_path / "opt")
    model = Classifier.from_pretrained(tmp_path / "opt", num_labels=2, max_length=32)
    batch, layer = model.tokenize(TEXTS), layer_features(model, model.encode(TEXTS), ["last"])
    wide = layer[1, "last"]
    expected = (
        wide.reshape(-1, 8, 2).mean(dim=2)
        if width == 8
        else torch.cat([wide, torch.zeros(len(wide), 8)], dim=1)
    )
    with torch.no_grad():
        before = model.features(**batch)
        add_skip(model, 1)
        assert before.shape[1] == width == model.head.in_features
        assert_close(model.features(**batch), before + expected, rtol=1e-5, atol=1e-6)


def test_widths_that_do_not_divide_are_averaged_over_all_entries():
    rows = torch.arange(10.0)[None]
    assert_close(to_width(rows, 10), rows)
    assert to_width(rows, 4).shape == (1, 4)
    assert_close(to_width(torch.ones(2, 10), 3), torch.ones(2, 3))
    assert_close(to_width(rows, 1), rows.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_kernel_of_a_model_with_a_skip_is_exact(name):
    model = build_tiny_model(name, num_labels=2)
    add_skip(model, 1)
    batch = model.tokenize(TEXTS)
    kernel = tangent_kernel(model, batch, quiet=True)
    head, backbone = gradient_rows(model, batch)
    size = len(TEXTS), 2, len(TEXTS), 2
    assert_close(kernel.pretrain_effective, (head @ head.T).reshape(size), rtol=1e-9, atol=1e-9)
    assert_close(kernel.ft_effective, (backbone @ backbone.T).reshape(size), rtol=1e-9, atol=1e-9)
