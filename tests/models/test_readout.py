"""A readout as a file, on an encoder, and in a prompted model."""

import pytest
import torch
from conftest import build_tokenizer
from readout_fixture import PLACES, drawn
from test_prompts import MASKED
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lpft_nb.models.checkpoints import ClassifierError, model_file_hash
from lpft_nb.models.readout import (
    HEAD,
    put_on,
    read_readout,
    readout_for,
    readout_hash,
    write_readout,
)
from lpft_nb.prompts import PromptedClassifier
from lpft_nb.tangent_kernel import tangent_kernel

SHAPE = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    "A BERT without a head for words, as a folder."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = build_tokenizer()
    BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def file(encoder, tmp_path):
    path = tmp_path / "one.safetensors"
    write_readout(drawn(encoder), path)
    return path


def test_a_file_holds_all_of_it_in_half_precision(encoder, file):
    ours, again = drawn(encoder), read_readout(file)
    assert (again.scale, again.base, again.facts) == (ours.scale, ours.base, ours.facts)
    for name, one in ours.head.items():
        assert torch.equal(again.head[name], one.half().float())
    for name, pair in ours.updates.items():
        assert all(torch.equal(a, b.half().float()) for a, b in zip(again.updates[name], pair))


def test_put_on_changes_what_it_names_and_nothing_else(encoder, file):
    before, model = (BertForMaskedLM.from_pretrained(encoder).eval() for _ in range(2))
    readout = read_readout(file)
    put_on(model, readout)
    after = dict(model.named_parameters())
    for name, one in before.named_parameters():
        place = name.removeprefix("bert.").removesuffix(".weight")
        if place in readout.updates:
            down, up = readout.updates[place]
            torch.testing.assert_close(after[name], one + 0.25 * up @ down)
        elif name not in HEAD.values():
            assert torch.equal(after[name], one), name
    for name, where in HEAD.items():
        assert torch.equal(after[where], readout.head[name])
    ids = torch.tensor([[1, 2, 3, 4]])
    hidden = model.bert(ids).last_hidden_state @ readout.head["transform.weight"].T
    hidden = torch.nn.functional.gelu(hidden + readout.head["transform.bias"])
    norm = (readout.head["norm.weight"], readout.head["norm.bias"])
    phi = torch.nn.functional.layer_norm(hidden, (16,), *norm, eps=model.config.layer_norm_eps)
    expected = phi @ model.bert.get_input_embeddings().weight.T + readout.head["bias"]
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("part", ["head", "updates"])
def test_another_shape_is_refused_and_nothing_is_changed(encoder, part):
    readout = drawn(encoder)
    if part == "head":
        readout.head["bias"] = torch.zeros(3)
    else:
        readout.updates[PLACES[1]] = (torch.zeros(2, 5), torch.zeros(16, 2))
    model = BertForMaskedLM.from_pretrained(encoder)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ClassifierError, match="of another model"):
        put_on(model, readout)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_another_architecture_is_refused(encoder):
    other = RobertaForMaskedLM(RobertaConfig(vocab_size=40, **SHAPE))
    with pytest.raises(
        ClassifierError, match="expected a BertForMaskedLM, got a RobertaForMaskedLM"
    ):
        put_on(other, drawn(encoder))


def test_a_readout_of_other_weights_is_refused(encoder, file, tmp_path):
    assert readout_for(encoder, file).base == model_file_hash(encoder)
    torch.manual_seed(5)
    BertModel(BertConfig(vocab_size=40, **SHAPE)).save_pretrained(tmp_path / "other")
    with pytest.raises(ClassifierError, match="take the encoder that it belongs to"):
        readout_for(tmp_path / "other", file)


@pytest.mark.parametrize("fault", ["cut", "changed", "foreign", "gone"])
def test_a_file_that_is_no_readout_is_refused(file, fault):
    data = file.read_bytes()
    if fault == "gone":
        file.unlink()
    elif fault == "foreign":
        BertModel(BertConfig(vocab_size=40, **SHAPE)).save_pretrained(file.parent / "m")
        file.write_bytes((file.parent / "m" / "model.safetensors").read_bytes())
    else:
        file.write_bytes(data[:-7] if fault == "cut" else data[:-7] + b"\1" * 7)
    with pytest.raises(ClassifierError, match="is no readout"):
        read_readout(file)


def test_numbers_that_half_precision_cannot_hold_are_refused(encoder, tmp_path):
    readout = drawn(encoder)
    readout.head["bias"][0] = 1e6
    with pytest.raises(ValueError, match="head/bias is not finite"):
        write_readout(readout, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_prompted_model_is_made_of_an_encoder_and_its_readout(encoder, file, tmp_path):
    model = PromptedClassifier.from_pretrained(encoder, MASKED, readout=file)
    assert model.config.source["readout"] == readout_hash(file)
    whole = BertForMaskedLM.from_pretrained(encoder).eval()
    put_on(whole, read_readout(file))
    expected = PromptedClassifier.from_language_model(whole, MASKED, tokenizer=model.tokenizer)
    batch = model.tokenize(["good", "bad good"])
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    kernel = tangent_kernel(model, batch).total
    assert torch.isfinite(kernel).all()
    model.save_pretrained(tmp_path / "saved")
    again = PromptedClassifier.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    with pytest.raises(ClassifierError, match="has a head already"):
        PromptedClassifier.from_pretrained(tmp_path / "saved", readout=file)


def test_without_a_readout_an_encoder_is_refused(encoder):
    with pytest.raises(ClassifierError, match="no head for words .* masked_readout"):
        PromptedClassifier.from_pretrained(encoder, MASKED)


def test_a_model_with_a_head_takes_no_readout(encoder, tmp_path):
    whole = BertForMaskedLM.from_pretrained(encoder)
    whole.save_pretrained(tmp_path / "whole")
    build_tokenizer().save_pretrained(tmp_path / "whole")
    path = tmp_path / "one.safetensors"
    write_readout(drawn(tmp_path / "whole"), path)
    with pytest.raises(ClassifierError, match="a head for words of its own"):
        PromptedClassifier.from_pretrained(tmp_path / "whole", MASKED, readout=path)
