"""f = Vφ + b: padding, pooling, heads, text input, loading and saving, on tiny random models of every architecture."""

import copy
import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, build_backbone_config, build_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lpft_nb.models.checkpoints import EMBEDDED_MODELS, ClassifierError, locate, model_file_hash
from lpft_nb.classifier import (
    POOLINGS,
    Classifier,
    backbone_class,
    features_of,
    learned_positions,
    logits_of,
    pad_encoded,
    pool,
    positions_from_mask,
    reset_head,
    set_head,
    text_rows,
    unpad,
)
from lpft_nb.models.configuration import ClassifierConfig

TEXTS = [
    "the cat sat",
    "a small matrix of random noise is not the mean of a large sparse graph and the dog ran under the tree",
    "find",
    "compute the norm of an array",
]
POOLING = (
    dict.fromkeys(ARCHITECTURES, "cls")
    | dict.fromkeys(("gpt2", "gpt-neox", "llama", "qwen2"), "last")
    | {"t5": "mean"}
)
TOLERANCE = dict(rtol=0, atol=1e-9)


def alone(model, encoded):
    "Features of each example by itself, without any padding: the oracle for every batch."
    return torch.cat([model.features(**pad_encoded([example])) for example in encoded])


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_do_not_depend_on_padding_or_neighbours(tiny_model, architecture, pooling):
    model = tiny_model(architecture, pooling=pooling)
    encoded = model.encode(TEXTS)
    with torch.no_grad():
        expected = alone(model, encoded)
        for side in ("right", "left"):
            for pad_token_id in (1, 7):
                assert_close(
                    model.features(**pad_encoded(encoded, pad_token_id, side)),
                    expected,
                    **TOLERANCE,
                )
        swapped = [encoded[2], encoded[1]]
        assert_close(
            model.features(**pad_encoded(swapped, 1, "left")), expected[[2, 1]], **TOLERANCE
        )
    assert expected.shape == (4, 16) and expected.dtype == torch.float64
    if (
        POOLING[architecture] != "last" or pooling != "cls"
    ):  # a decoder's first token sees nothing but itself
        assert torch.pdist(expected).min() > 1e-2


def test_features_equal_the_backbone_with_its_own_positions(tiny_model, architecture):
    "Oracle: transformers' own forward pass of one unpadded example, which makes its own position ids."
    model = tiny_model(architecture)
    for example in model.encode(TEXTS):
        batch = {name: torch.tensor([values]) for name, values in example.items()}
        with torch.no_grad():
            hidden = model.backbone(**batch).last_hidden_state[0]
            found = model.features(**batch)[0]
        expected = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(dim=0)}[
            POOLING[architecture]
        ]
        assert_close(found, expected, **TOLERANCE)


def test_features_of_pairs_do_not_depend_on_padding(tiny_model, architecture):
    model = tiny_model(architecture)
    encoded = model.encode(list(zip(TEXTS, reversed(TEXTS))))
    with torch.no_grad():
        assert_close(
            model.features(**pad_encoded(encoded, 1, "left")), alone(model, encoded), **TOLERANCE
        )
    assert ("token_type_ids" in encoded[0]) == (architecture in ("bert", "albert", "electra"))


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2", "llama", "t5"])
def test_sdpa_and_eager_attention_agree(tiny_model, architecture):
    fast = tiny_model(architecture)
    slow = (
        Classifier(ClassifierConfig(**{**fast.config.to_dict(), "attn_implementation": "eager"}))
        .double()
        .eval()
    )
    slow.load_state_dict(fast.state_dict())
    assert slow.backbone.config._attn_implementation == "eager"
    encoded = fast.encode(TEXTS)
    with torch.no_grad():
        for side in ("right", "left"):
            batch = pad_encoded(encoded, 1, side)
            # transformers' eager attention takes some softmaxes in float32 even where all else is float64
            assert_close(slow.features(**batch), fast.features(**batch), rtol=0, atol=1e-5)


def test_default_pooling(tiny_model, architecture):
    model = tiny_model(architecture)
    assert model.config.pooling == POOLING[architecture]


def test_every_parameter_gets_a_gradient(tiny_model, architecture):
    "No pooler, no decoder, no head of another task: nothing that training would leave as it is."
    model = tiny_model(architecture)
    batch = model.tokenize(list(zip(TEXTS, reversed(TEXTS))))
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not any("pooler" in name for name, _ in model.named_parameters())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=4),
    st.sampled_from(POOLINGS),
)
def test_pool_against_a_loop(rows, pooling):
    mask = torch.tensor(rows).long()
    hidden = torch.randn(
        len(rows), 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    expected = []
    for states, row in zip(hidden, rows):
        kept = [state for state, keep in zip(states, row) if keep]
        expected.append({"cls": kept[0], "last": kept[-1], "mean": sum(kept) / len(kept)}[pooling])
    assert_close(pool(hidden, mask, pooling), torch.stack(expected))
    hidden[mask == 0] = float("nan")  # what stands under the padding is never read
    assert_close(pool(hidden, mask, pooling), torch.stack(expected))


def test_positions_from_mask():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]])
    found = positions_from_mask(mask, offset=2)
    assert found[mask.bool()].tolist() == [2, 3, 4, 2, 3, 2, 3, 4]
    assert found.min() >= 2


def test_features_survive_backbones_that_fail_on_left_padding(tiny_model):
    "Eager attention in float64: transformers itself gives NaN for a Llama with padding on the left."
    eager = tiny_model("llama")
    eager.backbone.set_attn_implementation("eager")
    batch = pad_encoded(eager.encode(TEXTS), 1, "left")
    with torch.no_grad():
        assert eager.features(**batch).isfinite().all()


def test_learned_positions(tiny_model, architecture):
    found = learned_positions(tiny_model(architecture).backbone)
    table = {"roberta": (2, 64), "mpnet": (2, 64)} | dict.fromkeys(
        ("modernbert", "gpt-neox", "llama", "qwen2", "t5"), (0, None)
    )
    assert found == table.get(architecture, (0, 64))


# ---------------------------------------------------------------- head, loss


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


def test_unknown_arguments_are_errors(tiny_model):
    model = tiny_model("bert")
    batch = model.tokenize(TEXTS)
    with pytest.raises(TypeError, match="position_ids"):
        model(**batch, position_ids=batch["input_ids"])
    with pytest.raises(TypeError, match="return_dict"):
        model(**batch, return_dict=False)
    with pytest.raises(TypeError):
        model.features(**batch, labels=torch.zeros(4))


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


# ---------------------------------------------------------------- batches that must be refused


def test_wrong_batches(tiny_model):
    model = tiny_model("bert")
    batch = model.tokenize(TEXTS)
    with pytest.raises(ValueError, match="both needed"):
        model.features(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="share one shape"):
        model.features(batch["input_ids"], batch["attention_mask"][:, :-1])
    with pytest.raises(ValueError, match="no real token"):
        model.features(batch["input_ids"], torch.zeros_like(batch["attention_mask"]))
    with pytest.raises(ValueError, match="65 tokens are more than the 64 positions"):
        model.features(torch.ones(1, 65).long(), torch.ones(1, 65).long())
    with pytest.raises(ValueError, match="GPT2Model has no token types"):
        tiny_model("gpt2").features(**batch)
    with pytest.raises(ValueError, match="unknown pooling 'first'"):
        tiny_model("bert", pooling="first")


# ---------------------------------------------------------------- texts


def test_encode_takes_texts_pairs_and_datasets(tiny_model):
    model = tiny_model("bert")
    one = Dataset.from_dict({"sentence": TEXTS, "label": [0, 1, 2, 0]})
    two = Dataset.from_dict({"premise": TEXTS, "label": [0, 1, 2, 0], "hypothesis": TEXTS[::-1]})
    assert model.encode(one) == model.encode(TEXTS)
    assert model.encode(two) == model.encode(list(zip(TEXTS, TEXTS[::-1])))
    assert set(model.tokenize(one)) == {"input_ids", "attention_mask", "token_type_ids"}
    expected = model.tokenizer(
        TEXTS, TEXTS[::-1], padding=True, return_tensors="pt", return_token_type_ids=True
    )
    for name, table in model.tokenize(two).items():
        assert torch.equal(table, expected[name])


def test_truncation_is_done_and_counted(tiny_model):
    model = tiny_model("bert", max_tokens=8)
    assert [len(example["input_ids"]) for example in model.encode(TEXTS)] == [5, 8, 3, 8]
    assert [len(example["input_ids"]) for example in model.encode(TEXTS, max_length=6)] == [
        5,
        6,
        3,
        6,
    ]
    assert model.count_truncated(TEXTS) == 1
    assert model.count_truncated(TEXTS, max_length=7) == 2
    assert model.count_truncated(TEXTS, max_length=64) == 0
    assert model.count_truncated(list(zip(TEXTS, TEXTS)), max_length=11) == 2


@pytest.mark.parametrize("max_length", [0, -3, 65, 3, 7.0, True])
def test_impossible_lengths(tiny_model, max_length):
    with pytest.raises(ValueError, match="max_length"):
        tiny_model("bert").encode(TEXTS, max_length=max_length)


@pytest.mark.parametrize(
    "data, error, message",
    [
        ([], ValueError, "no texts"),
        ("the cat", TypeError, "wrap one text in a list"),
        (["a", None], TypeError, "example 1 holds NoneType"),
        (["a", float("nan")], TypeError, "example 1 holds float"),
        ([3], TypeError, "example 0 holds int"),
        ([["a", "b"]], TypeError, "example 0 holds list"),
        (["a", ("b", "c")], ValueError, "example 1 has 2 texts, the first one has 1"),
        ([("a", "b", "c")], ValueError, "example 0 has 3 texts"),
        (np.array(["a"]), TypeError, "expected a Dataset or a list"),
        (Dataset.from_dict({"label": [0]}), ValueError, "one or two text columns"),
        (
            Dataset.from_dict({"a": ["x"], "b": ["x"], "c": ["x"]}),
            ValueError,
            "one or two text columns",
        ),
        (Dataset.from_dict({"text": ["x", None]}), TypeError, "example 1 holds NoneType"),
    ],
)
def test_wrong_texts(data, error, message):
    with pytest.raises(error, match=message):
        text_rows(data)


def test_a_text_without_tokens_is_an_error(tiny_model):
    model = tiny_model("gpt2")
    model.tokenizer._tokenizer.post_processor = None
    with pytest.raises(ValueError, match="example 1 has no tokens"):
        model.encode(["cat", " "])


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from(("left", "right")),
)
def test_unpad_undoes_padding(rows, side):
    encoded = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    batch = pad_encoded(encoded, 5, side)
    assert batch["input_ids"].shape == (len(rows), max(map(len, rows)))
    assert unpad(batch) == encoded


def test_pad_refuses_labels(tiny_model):
    model = tiny_model("bert")
    encoded = [{**example, "labels": 0} for example in model.encode(TEXTS)]
    with pytest.raises(ValueError, match="labels"):
        model.pad(encoded)
    with pytest.raises(ValueError, match="labels"):
        features_of(model, {**model.tokenize(TEXTS), "labels": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match="no examples"):
        model.pad([])


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


# ---------------------------------------------------------------- features of many


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


# ---------------------------------------------------------------- saving and loading


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
    with pytest.raises(ValueError, match="128 is more than the 64 positions"):
        Classifier.from_pretrained(backbone, num_labels=2)
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


def test_shards_are_hashed_and_loaded(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = Classifier.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, TEXTS), logits_of(model, TEXTS))
    assert len(again.config.source["sha256"]) == 64
    next(tmp_path.glob("model-00001-*")).write_bytes(b"")
    assert model_file_hash(tmp_path) != again.config.source["sha256"]


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


# ---------------------------------------------------------------- names


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
        ("minlm", r"no embedded model \(did you mean 'minilm'\?\)"),
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


# ---------------------------------------------------------------- the world around


def test_configuration_round_trip(tiny_model, tmp_path):
    config = tiny_model("t5", source={"id": "x"}).config
    config.save_pretrained(tmp_path)
    again = ClassifierConfig.from_pretrained(tmp_path)
    assert type(again.backbone) is transformers.T5Config
    assert again.to_dict() == {
        **config.to_dict(),
        "transformers_version": again.to_dict()["transformers_version"],
    }
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lpft_classifier"
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_an_image_model_is_no_backbone():
    with pytest.raises(ClassifierError, match="no text backbone for model type 'bart'"):
        backbone_class(transformers.BartConfig())


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
