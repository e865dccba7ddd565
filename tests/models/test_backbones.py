"""φ on tiny random models of every architecture: padding, positions, pooling, attention, and batches that must be refused."""

import pytest
import torch
import transformers
from model_oracle import POOLING, TEXTS, TOLERANCE, alone
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lpft_nb.models.backbones import (
    POOLINGS,
    backbone_class,
    learned_positions,
    pool,
    positions_from_mask,
)
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.classifier import Classifier
from lpft_nb.models.encoding import pad_encoded
from lpft_nb.models.configuration import ClassifierConfig


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
    other = tiny_model("gpt2")
    types = torch.zeros_like(batch["input_ids"])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(  # zeros say nothing; tokenizers hand them out unasked
        other.features(**plain, token_type_ids=types), other.features(**plain)
    )
    types[0, -1] = 1
    with pytest.raises(ValueError, match="GPT2Model has no token types"):
        other.features(**plain, token_type_ids=types)
    with pytest.raises(ValueError, match="unknown pooling 'first'"):
        tiny_model("bert", pooling="first")


def test_an_image_model_is_no_backbone():
    with pytest.raises(ClassifierError, match="no text backbone for model type 'bart'"):
        backbone_class(transformers.BartConfig())


def test_a_mask_that_is_no_mask_and_ids_without_a_row_are_refused(tiny_model):
    model = tiny_model("bert")
    batch = model.tokenize(TEXTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    types = torch.zeros_like(ids)
    wrong = [
        ((ids, 2 * mask), "0 and 1"),
        ((ids, -mask), "0 and 1"),
        ((ids, mask.double()), "0 and 1, got torch.float64"),
        ((ids + 100, mask), "input_ids holds .*expected 0 to 127"),
        ((ids - 5, mask), "input_ids holds -"),
        ((ids.double(), mask), "input_ids must be integers"),
        ((ids, mask, types + 2), "token_type_ids holds 2, expected 0 to 1"),
        ((ids, mask, types[:, 1:]), "token_type_ids must be integers of shape"),
    ]
    for inputs, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.features(*inputs)
    assert torch.equal(model.features(ids, mask.bool()), model.features(ids, mask))
    for example, message in (
        ({"input_ids": [4, 5, 6], "attention_mask": [1, 1]}, "of one length"),
        ({"input_ids": [4, 5], "attention_mask": [0.5, 1.0]}, "must hold integers"),
    ):
        with pytest.raises(ValueError, match=message):
            pad_encoded([example])
