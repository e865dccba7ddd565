"""A model that was fine-tuned elsewhere keeps its logits as a Classifier: in batches, in files, in the kernel."""

import copy

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, build_backbone_config, build_tokenizer
from kernel_oracle import assert_exact, oracle
from model_oracle import TEXTS, TOLERANCE
from tokenizers import processors

from lpft_nb.classifier import Classifier, describe_model, features_of, logits_of
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.encoding import pad_encoded
from lpft_nb.models.fine_tuned import last_linear
from lpft_nb.models.lora import add_lora, merge_lora
from lpft_nb.tangent_kernel import tangent_kernel

DECODERS = ("gpt2", "gpt-neox", "llama", "qwen2")
TAKEN = [name for name in ARCHITECTURES if name != "t5"]
NAMES = {0: "cold", 1: "mild", 2: "hot"}


def fine_tuned(name="bert", dtype=torch.float64, id2label=NAMES, **changes):
    "A tiny random …ForSequenceClassification in which no weight is zero."
    config = build_backbone_config(name, id2label=dict(id2label), **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 1
    return model.eval()


def taken(model, **options):
    return Classifier.from_sequence_classifier(model, tokenizer=build_tokenizer(), **options)


def of_transformers(model, texts):
    "The model's own logits of texts that are padded on the right."
    tokenizer = build_tokenizer()
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", TAKEN)
def test_the_logits_are_the_models(name):
    model = fine_tuned(name)
    model.train()  # as a trainer leaves it
    before = copy.deepcopy(model.state_dict())
    ours = taken(model)
    assert model.training and all(part.training for part in model.modules())
    assert before.keys() == model.state_dict().keys()
    model.eval()
    expected = of_transformers(model, TEXTS)
    assert expected.std() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(ours(**ours.tokenize(TEXTS)).logits, expected, **TOLERANCE)
    torch.testing.assert_close(logits_of(ours, TEXTS, batch_size=2), expected, **TOLERANCE)
    assert ours.config.pooling == ("last" if name in DECODERS else "own")
    assert ours.config.id2label == NAMES and ours.config.label2id["hot"] == 2


SQUARE = {label: f"class {label}" for label in range(16)}  # as many classes as features


@pytest.mark.parametrize("name", ["roberta", "distilbert", "deberta-v2"])
def test_with_as_many_classes_as_features_the_head_is_still_the_last_layer(name):
    model = fine_tuned(name, id2label=SQUARE)
    expected = of_transformers(model, TEXTS)
    torch.testing.assert_close(logits_of(taken(model), TEXTS), expected, **TOLERANCE)


def test_a_backbones_own_layer_is_no_head():
    model = fine_tuned("bert", id2label=SQUARE)
    model.classifier = torch.nn.Identity()
    with pytest.raises(ClassifierError, match="no last linear layer .* dropout, classifier"):
        taken(model)


@pytest.mark.parametrize("name", TAKEN)
def test_features_are_what_enters_the_last_linear_layer(name):
    model, seen = fine_tuned(name), []
    ours = taken(model)
    layer = model.get_submodule(last_linear(model))
    layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    of_transformers(model, TEXTS[:1])
    entered = seen[0][:, -1] if seen[0].ndim == 3 else seen[0]
    torch.testing.assert_close(features_of(ours, TEXTS[:1]), entered.detach(), **TOLERANCE)
    assert torch.equal(ours.head.weight, layer.weight)
    assert (ours.head.bias is None) == (layer.bias is None)


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet", "deberta-v2", "gpt2"])
def test_padding_on_the_left_changes_nothing(name):
    ours = taken(fine_tuned(name))
    encoded = ours.encode(TEXTS)
    with torch.no_grad():
        right, left = (ours(**pad_encoded(encoded, 1, side)).logits for side in ("right", "left"))
    torch.testing.assert_close(left, right, **TOLERANCE)


def test_pairs_and_token_types():
    model = fine_tuned("bert")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    batch = build_tokenizer()(
        [*map(list, pairs)], padding=True, return_tensors="pt", return_token_type_ids=True
    )
    assert batch["token_type_ids"].any()
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(taken(model), pairs), model(**batch).logits, **TOLERANCE
        )


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("adapted", [False, True])
def test_it_goes_to_disk_and_back(name, adapted, tmp_path):
    ours = taken(fine_tuned(name, dtype=torch.float32))
    if adapted:
        add_lora(ours, r=2, alpha=4)
        with torch.no_grad():
            for parameter in (p for n, p in ours.named_parameters() if "lora_B" in n):
                parameter.normal_(std=0.3)
    ours.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    expected = logits_of(ours, TEXTS)
    assert torch.equal(logits_of(again, TEXTS), expected)
    assert again.config.pooling == ours.config.pooling and again.config.id2label == NAMES
    known = describe_model(tmp_path, num_labels=3)
    assert known["parameters"] == sum(parameter.numel() for parameter in ours.parameters())
    assert known["architecture"] == type(ours.backbone).__name__
    if adapted:
        merge_lora(again)
        torch.testing.assert_close(logits_of(again, TEXTS), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ClassifierError, match="pooling="):
        Classifier.from_pretrained(tmp_path, pooling="mean")


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "deberta-v2"])
def test_the_kernel_is_that_of_autograd(name):
    ours = taken(fine_tuned(name))
    batch = ours.tokenize(TEXTS[1:])
    assert_exact(tangent_kernel(ours, batch, quiet=True), oracle(ours, batch))


def test_the_class_that_is_trained_moves_the_dense_layer_too():
    ours = taken(fine_tuned("roberta"))
    loss = ours(**ours.tokenize(TEXTS), labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    assert ours.backbone.classifier.dense.weight.grad.abs().max() > 0
    assert ours.config.head_dropout == 0


def test_lengths_and_tokenizers():
    model = fine_tuned("bert")
    assert taken(model).max_length == 64  # as many as the tokenizer and the positions take
    assert taken(model, max_length=9).max_length == 9
    assert taken(fine_tuned("bert", max_position_embeddings=20)).max_length == 20
    with pytest.raises(ValueError, match="max_length 65"):
        taken(model, max_length=65)
    without = build_tokenizer()
    without.pad_token = None
    ours = Classifier.from_sequence_classifier(model, tokenizer=without)
    assert ours.tokenizer.pad_token == "</s>" and without.pad_token is None
    assert Classifier.from_sequence_classifier(model).tokenizer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_type_is_kept(dtype):
    model = fine_tuned("roberta", dtype=dtype)
    ours = taken(model)
    assert ours.dtype == ours.head.weight.dtype == dtype
    with torch.no_grad():
        found = ours(**ours.tokenize(TEXTS[:1])).logits
    torch.testing.assert_close(found, of_transformers(model, TEXTS[:1]))


def test_it_remembers_where_it_came_from(tmp_path):
    model = fine_tuned("bert")
    assert taken(model).config.source["id"] == "BertForSequenceClassification"
    model.save_pretrained(tmp_path / "mine")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine")
    assert taken(again).config.source == {"id": "mine", "revision": None}
    again.config._name_or_path = "someone/classifier"
    assert taken(again).config.source["id"] == "someone/classifier"


# --- what is refused


def spoiled(change):
    model = fine_tuned("roberta")
    change(model)
    return model


REFUSED = [
    (lambda: fine_tuned("t5"), "T5ForSequenceClassification .* a decoder behind an encoder"),
    (lambda: fine_tuned("bert").bert, "BertModel .* expected BertForSequenceClassification"),
    (lambda: torch.nn.Linear(2, 3), "a model of transformers in memory, got Linear"),
    (
        lambda: spoiled(lambda m: m.classifier.set_submodule("out_proj", torch.nn.Identity())),
        "RobertaForSequenceClassification .* no last linear layer .* classifier",
    ),
    (
        lambda: spoiled(lambda m: setattr(m.classifier, "more", torch.nn.Linear(4, 4))),
        r"not those of its configuration: classifier\.more\.bias",
    ),
    (
        lambda: spoiled(lambda m: setattr(m.config, "problem_type", "multi_label_classification")),
        "3 outputs for multi_label_classification",
    ),
    (
        lambda: transformers.AutoModelForSequenceClassification.from_config(
            build_backbone_config("bert", num_labels=1)
        ),
        "1 outputs",
    ),
]


@pytest.mark.parametrize("build, message", REFUSED)
def test_what_cannot_be_taken_apart_is_refused(build, message):
    with pytest.raises(ClassifierError, match=message):
        Classifier.from_sequence_classifier(build())


def test_other_logits_are_refused():
    def twice(module, given, output):
        output.logits = 2 * output.logits
        return output

    model = fine_tuned("gpt2")
    model.register_forward_hook(twice)  # of the class around the backbone, which ours drops
    with pytest.raises(ClassifierError, match="its logits would move by"):
        taken(model)


def test_own_is_no_pooling_to_ask_for(tiny_checkpoint):
    with pytest.raises(ValueError, match="unknown pooling 'own'"):
        Classifier.from_pretrained(tiny_checkpoint, num_labels=2, pooling="own")


# --- the same text for both


def ending_in(token, number):
    "A tokenizer that ends every text with one token."
    tokenizer = build_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {token}", pair=f"$A $B {token}", special_tokens=[(token, number)]
    )
    tokenizer.pad_token = token
    return tokenizer


def test_a_tokenizer_that_writes_the_models_padding_into_texts_is_refused():
    model = fine_tuned("gpt2")
    model.config.pad_token_id = 2  # as its end of text
    tokenizer = ending_in("</s>", 2)
    with pytest.raises(ClassifierError, match="'</s>' into each text.*pad_token_id"):
        Classifier.from_sequence_classifier(model, tokenizer=tokenizer)
    model.config.pad_token_id = 1
    Classifier.from_sequence_classifier(model, tokenizer=tokenizer)


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_predicted():
    with pytest.raises(ClassifierError, match="no row"):
        taken(fine_tuned("bert", vocab_size=20))
    with pytest.raises(ClassifierError, match="token type 2, and the model knows 2"):
        model = fine_tuned("bert", type_vocab_size=2)
        tokenizer = build_tokenizer()
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A", pair="$A:1 $B:2", special_tokens=[]
        )
        Classifier.from_sequence_classifier(model, tokenizer=tokenizer)


def test_big_bird_is_refused_where_a_short_text_would_change_it_and_the_callers_stays():
    config = transformers.BigBirdConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, block_size=4, num_random_blocks=1,
        pad_token_id=1, id2label=NAMES,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BigBirdForSequenceClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    with pytest.raises(ClassifierError, match='attention_type="original_full"'):
        taken(model, max_length=64)
    assert model.bert.attention_type == "block_sparse"
    taken(model, max_length=16)
    assert model.bert.attention_type == "block_sparse"
    model.bert.set_attention_type("original_full")
    model.config.attention_type = "original_full"
    taken(model, max_length=64)


def test_more_that_cannot_be_taken_apart():
    ours = taken(fine_tuned("bert"))
    with pytest.raises(ClassifierError, match="a Classifier of ours already"):
        Classifier.from_sequence_classifier(ours)
    with torch.device("meta"):
        empty = transformers.BertForSequenceClassification(build_backbone_config("bert"))
    with pytest.raises(ClassifierError, match="meta device"):
        Classifier.from_sequence_classifier(empty)


def test_models_without_a_table_of_words_and_with_a_shortest_text():
    small = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, id2label=NAMES)
    canine = transformers.CanineConfig(**small, num_hidden_layers=1, max_position_embeddings=64)
    with pytest.raises(ClassifierError, match="Canine"):  # it reads no text of a few letters
        Classifier.from_sequence_classifier(transformers.CanineForSequenceClassification(canine))


@pytest.mark.parametrize("wrong", [{1: "a", 2: "b", 3: "c"}, {0: "a", 1: "a", 2: "b"}])
def test_classes_that_are_numbered_otherwise_are_refused(wrong):
    model = fine_tuned("bert")
    model.config.id2label = wrong
    with pytest.raises(ClassifierError, match="classes 0, 1"):
        taken(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "bert"])
def test_a_text_that_spells_the_padding_is_refused_where_the_model_would_read_it_otherwise(
    name, tmp_path
):
    model = fine_tuned(name, dtype=torch.float32)
    ours = taken(model)
    ours.save_pretrained(tmp_path)
    text = ["the cat <pad> sat <pad>"]
    for each in (ours, Classifier.from_pretrained(tmp_path)):
        if name == "bert":
            expected = of_transformers(model, text)
            torch.testing.assert_close(logits_of(each, text), expected, rtol=0, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="takes for padding"):
                each.predict(text)
        each.predict(["the cat", "the cat sat"])


def test_the_shortest_text_has_the_tokenizers_special_tokens():
    "Funnel reads no text of a single token."
    config = transformers.FunnelConfig(
        vocab_size=128,
        d_model=16,
        n_head=2,
        d_head=8,
        d_inner=32,
        block_sizes=[1, 1],
        id2label=NAMES,
    )
    model = transformers.FunnelForSequenceClassification(config)
    assert taken(model).max_length == 64
    with pytest.raises(ClassifierError, match="as short as 1 tokens"):
        Classifier.from_sequence_classifier(model)
