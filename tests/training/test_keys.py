"""Tokens, features and stages are found again for the same question only: each ingredient in turn, in both directions."""

import dataclasses
import json
import uuid

import pytest
import torch
from conftest import build_tiny_model
from datasets import Dataset
from transformers import ByT5Tokenizer, T5Config

from lpft_nb.classifier import Classifier
from lpft_nb.models.configuration import ClassifierConfig
from lpft_nb.models.lora import add_lora
from lpft_nb.stages import FineTune, LinearProbe, run_stages
from lpft_nb.store import cache
from lpft_nb.tasks import load_task
from lpft_nb.training import measuring
from lpft_nb.training.batches import EncodedDataset
from lpft_nb.training.checkpoints import MARKER, last_checkpoint
from lpft_nb.training.measuring import encode_split, frozen_features

LONG = "the cat saw a dog under the tree <unk> and the film is great"
TEXTS = {"first": [LONG, "a dull movie"], "second": ["the dog ran", LONG], "label": [0, 1]}


@pytest.fixture
def keys(monkeypatch, tmp_path):
    "The keys that are asked for, in their order; `keys.forget()` begins an empty cache."
    asked, real = [], measuring.cached

    def cached(kind, key, compute):
        asked.append(json.dumps([kind, key], sort_keys=True))
        return real(kind, key, compute)

    class Keys:
        def forget(self):
            monkeypatch.setenv("LPFT_CACHE", str(tmp_path / uuid.uuid4().hex))
            asked.clear()

        def __len__(self):
            return len(asked)

        def last(self):
            return asked[-1]

    monkeypatch.setattr(measuring, "cached", cached)
    keys = Keys()
    keys.forget()
    return keys


def in_both_directions(keys, compute, make_one, make_other):
    "Each after the other is what it is alone, under another key; and the same again under the same key."
    alone = []
    for make in (make_one, make_other):
        keys.forget()
        alone.append((compute(make()), keys.last()))
    assert alone[0][1] != alone[1][1]
    for order in ((0, 1), (1, 0)):
        keys.forget()
        for number in (*order, *order):
            result = compute((make_one, make_other)[number]())
            assert (result, keys.last()) == alone[number]


# --- tokens ---


@dataclasses.dataclass
class Asked:
    model: Classifier
    split: Dataset
    max_length: int = 8


def asked(**fields):
    return Asked(build_tiny_model("bert", **fields), Dataset.from_dict(TEXTS))


def tokens(asked):
    found = encode_split(asked.model, asked.split, asked.max_length)
    return found.inputs, found.truncated


def with_tokenizer(**settings):
    def make():
        one = asked()
        for name, value in settings.items():
            setattr(one.model.tokenizer, name, value)
        return one

    return make


def without_lower_case():
    one = asked()
    one.model.tokenizer.backend_tokenizer.normalizer = None
    return one


def other_text():
    texts = TEXTS | {"second": ["the dog ran", "the cat"]}
    return Asked(build_tiny_model("bert"), Dataset.from_dict(texts))


TOKENS = {
    "text": other_text,
    "first and second": lambda: dataclasses.replace(
        asked(), split=Dataset.from_dict({n: TEXTS[n] for n in ("second", "first", "label")})
    ),
    "length": lambda: dataclasses.replace(asked(), max_length=9),
    "token types": lambda: asked(backbone={"type_vocab_size": 1}),
    "truncation side": with_tokenizer(truncation_side="left"),
    "special tokens in texts": with_tokenizer(split_special_tokens=True),
    "normalizer": without_lower_case,
    "python": lambda: python_asked(),
}


def python_asked(**settings):
    "A model whose tokenizer has no Rust."
    sizes = {
        "vocab_size": 384,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
    }
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(backbone=T5Config(**sizes), num_labels=2)).eval()
    model.tokenizer = ByT5Tokenizer(**settings)
    return Asked(model, Dataset.from_dict(TEXTS))


@pytest.mark.parametrize("name", TOKENS)
def test_each_ingredient_of_tokens_is_in_their_key(keys, name):
    in_both_directions(keys, tokens, asked, TOKENS[name])


@pytest.mark.parametrize("settings", [{"truncation_side": "left"}, {"extra_ids": 7}], ids=str)
def test_a_python_tokenizer_has_all_that_it_does_in_the_key(keys, settings):
    in_both_directions(keys, tokens, python_asked, lambda: python_asked(**settings))


def test_python_and_rust_give_the_classifiers_own_tokens(keys):
    for one in (asked(), python_asked()):
        found, truncated = tokens(one)
        assert found == one.model.encode(one.split, one.max_length)
        assert truncated == one.model.count_truncated(one.split, one.max_length) == 2


def test_a_python_tokenizer_cuts_in_silence(keys, caplog):
    tokens(python_asked())
    assert caplog.text == ""


def test_a_tokenizer_that_cannot_be_keyed_encodes_each_time_anew(keys):
    one = python_asked()
    for word in ("good", "bad"):
        one.model.tokenizer.prepare_for_tokenization = lambda text, word=word, **more: (word, more)
        assert tokens(one)[0] == one.model.encode(one.split, one.max_length)
    assert len(keys) == 0


def test_a_length_that_does_not_fit_is_refused_though_the_tokens_are_stored(keys):
    long, short = asked(), asked(backbone={"max_position_embeddings": 4})
    tokens(long)
    with pytest.raises(ValueError, match="8 is more than the 4 positions"):
        tokens(short)


# --- features ---


def features(model):
    ids = [[0, 5, 6, 7, 2], [0, 9, 2]]
    inputs = [{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids]
    found = frozen_features(model, {"train": EncodedDataset(inputs, [0, 1])}, "cpu")
    return found["train"].tolist()


def small(**fields):
    return build_tiny_model("bert", dtype=torch.float32, **fields)


def adapted(alpha):
    model = small()
    add_lora(model, r=2, alpha=alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    return model


def with_attention():
    model = small()
    model.backbone.set_attn_implementation("eager")
    return model


def with_module():
    model = small()
    model.backbone.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.Tanh()
    return model


def with_weight():
    model = small()
    model.backbone.embeddings.word_embeddings.weight.data[5, 0] += 1e-3
    return model


FEATURES = {
    "weight": with_weight,
    "activation": lambda: small(backbone={"hidden_act": "relu"}),
    "epsilon": lambda: small(backbone={"layer_norm_eps": 0.1}),
    "heads": lambda: small(backbone={"num_attention_heads": 4}),
    "attention": with_attention,
    "pooling": lambda: small(pooling="mean"),
    "precision": lambda: small().double(),
    "module": with_module,
    "adapters": lambda: adapted(2.0),
}


@pytest.mark.parametrize("name", FEATURES)
def test_each_ingredient_of_features_is_in_their_key(keys, name):
    in_both_directions(keys, features, small, FEATURES[name])


def test_the_scale_of_adapters_is_in_the_key(keys):
    in_both_directions(keys, features, lambda: adapted(2.0), lambda: adapted(16.0))


def test_how_exactly_a_machine_multiplies_is_in_the_key(keys):
    before = torch.get_float32_matmul_precision()
    features(small())
    exact = keys.last()
    try:
        torch.set_float32_matmul_precision("medium")
        features(small())
    finally:
        torch.set_float32_matmul_precision(before)
    assert keys.last() != exact


# --- stages ---

QUICK = dict(epochs=1, batch_size=8)


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    start = "the cat saw a dog under the tree and "
    for split in ("train", "validation", "test"):
        rows = [
            {"text": start + word, "label": n % 2} for n, word in enumerate(["good", "bad"] * 8)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_task(folder)


def start(**fields):
    return build_tiny_model("bert", num_labels=2, dtype=torch.float32, max_tokens=8, **fields)


def test_a_stage_made_with_other_tokens_or_dropout_is_not_taken(task, tmp_path):
    probe = {"stages": [LinearProbe(penalty=1.0)], "output": tmp_path / "out", "device": "cpu"}
    run_stages(start(), task, **probe)
    left = start()
    left.tokenizer.truncation_side = "left"
    for other in (left, start(head_dropout=0.5), start(backbone={"layer_norm_eps": 0.1})):
        with pytest.raises(ValueError, match="another model, task, seed or settings"):
            run_stages(other, task, **probe)
    run_stages(start(), task, **probe)


def test_what_another_version_has_made_is_made_again(task, tmp_path, monkeypatch, caplog, capsys):
    probe = {"stages": [LinearProbe(penalty=1.0)], "output": tmp_path / "out", "device": "cpu"}
    with monkeypatch.context() as older:
        older.setattr(cache, "__version__", "0.0.1")
        run_stages(start(), task, **probe)
    assert "taken from" not in capsys.readouterr().out
    run_stages(start(), task, **probe)
    assert "LP is made again: 1-LP: made by other versions" in caplog.text
    assert "taken from" not in capsys.readouterr().out
    run_stages(start(), task, **probe)
    assert "taken from" in capsys.readouterr().out


def test_a_training_goes_on_from_checkpoints_of_its_own_only(task, tmp_path, monkeypatch):
    """Killed inside a stage; then called with another learning rate, another version, and as it was."""

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    where = {"output": tmp_path / "out", "device": "cpu", "minutes_between_checkpoints": 0.0}
    with monkeypatch.context() as kill:
        kill.setattr("lpft_nb.training.loop.restore_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stages(start(), task, [FineTune(**QUICK)], **where)
    place = tmp_path / "out" / "1-FT"
    assert list(place.glob(f"checkpoint-*/{MARKER}")) and last_checkpoint(place) is not None
    with pytest.raises(ValueError, match="another model, task, seed or settings"):
        run_stages(start(), task, [FineTune(learning_rate=1e-3, **QUICK)], **where)
    with monkeypatch.context() as newer:
        newer.setattr(cache, "__version__", "999")
        assert last_checkpoint(place) is None
    assert last_checkpoint(place) is not None
    run_stages(start(), task, [FineTune(**QUICK)], **where)


def test_features_of_a_hooked_backbone_are_computed_each_time_anew(keys):
    model, scale = small(), [1.0]
    model.backbone.register_forward_pre_hook(lambda *_: None)
    model.backbone.encoder.register_forward_hook(
        lambda module, given, output: (
            setattr(output, "last_hidden_state", scale[0] * output.last_hidden_state),
            output,
        )[1]
    )
    first = features(model)
    scale[0] = 2.0
    assert features(model) != first
