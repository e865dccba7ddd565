"""Texts, pairs and data sets become ids and batches; labels are never read."""

import numpy as np
import pytest
import torch
from model_oracle import TEXTS
from datasets import Dataset
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lpft_nb.classifier import features_of
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.encoding import pad_encoded, text_rows, unpad


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


def test_a_text_without_tokens_is_read_as_the_token_that_begins_a_text(tiny_model, caplog):
    model = tiny_model("gpt2")
    model.tokenizer._tokenizer.post_processor = None
    first, empty = model.encode(["cat", " "])
    token = model.tokenizer.bos_token or model.tokenizer.eos_token
    assert empty["input_ids"] == [model.tokenizer.convert_tokens_to_ids(token)]
    assert empty.keys() == first.keys() and empty["attention_mask"] == [1]
    assert "1 of 2 texts have no tokens, first example 1" in caplog.text
    assert torch.isfinite(features_of(model, ["cat", " "])).all()


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


def test_a_text_that_the_tokenizer_cannot_read_is_named(tiny_model):
    model = tiny_model("bert")
    with pytest.raises(ClassifierError, match="example 1 cannot be encoded"):
        model.encode(["a cat", "half a letter \ud83d"])
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"cat": 0, "</s>": 1})), pad_token="</s>"
    )
    with pytest.raises(ClassifierError, match="example 1 cannot be encoded: .*dog.*unknown words"):
        model.encode(["cat", "dog"])
