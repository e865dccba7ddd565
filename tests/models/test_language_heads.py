"""A language model without its output matrix: φ at each token, the gap, and rows with two uses."""

import copy

import pytest
import torch
from conftest import build_backbone_config
from torch import nn

from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.language_heads import (
    TiedHead,
    at_gap,
    build_language_features,
    language_model_class,
    output_matrix,
    refuse_tied_head,
    without_output_matrix,
)
from lpft_nb.models.prompted import split_language_model

MASKED = ("bert", "roberta", "distilbert", "albert", "mpnet", "electra", "modernbert")
CAUSAL = ("gpt2", "gpt-neox", "llama", "qwen2")


def language_model(name, **changes):
    "A tiny random language model in float64 in which no weight is zero."
    config = build_backbone_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = language_model_class(config)[0]._from_config(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MASKED + CAUSAL)
def test_the_output_matrix_on_phi_gives_the_models_scores(name):
    model = language_model(name)
    _, matrix = output_matrix(model)
    features = without_output_matrix(copy.deepcopy(model))
    batch = {
        "input_ids": torch.tensor([[0, 7, 4, 9, 2]]),
        "attention_mask": torch.ones(1, 5).long(),
    }
    with torch.no_grad():
        phi = features(**batch).logits
        torch.testing.assert_close(matrix(phi), model(**batch).logits, rtol=0, atol=1e-9)
    assert language_model_class(model.config)[1] == (name in MASKED)
    rebuilt = build_language_features(model.config).state_dict()
    assert rebuilt.keys() == features.state_dict().keys()
    gradients = torch.autograd.grad(
        features(**batch).logits.sum(), list(features.parameters()), allow_unused=True
    )
    vocabulary = model.config.vocab_size
    unused = [
        name
        for (name, table), found in zip(features.named_parameters(), gradients, strict=True)
        if found is None and table.shape[0] == vocabulary
    ]
    assert unused == []  # no bias of the vocabulary is left behind


def test_an_encoder_with_a_decoder_and_a_bent_score_are_refused():
    with pytest.raises(ClassifierError, match="no language model for model type 't5'"):
        language_model_class(build_backbone_config("t5"))
    model = language_model("bert")
    model.cls.predictions.decoder = nn.Sequential(nn.Linear(16, 128))
    with pytest.raises(ClassifierError, match="no linear layer that scores its vocabulary"):
        output_matrix(model)


def test_the_gap_is_found_on_either_side_of_padding_and_must_be_one():
    hidden = torch.arange(8.0).view(2, 4, 1)
    ids = torch.tensor([[4, 4, 6, 5], [7, 8, 9, 4]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])  # the first 4 is padding
    batch = {"input_ids": ids, "attention_mask": mask}
    assert at_gap(hidden, batch, 4).tolist() == [[1.0], [7.0]]
    for wrong in (5, 6, 99):
        with pytest.raises(ValueError, match="expected one mask token"):
            at_gap(hidden, batch, wrong)
    twice = {"input_ids": torch.full((1, 2), 4), "attention_mask": torch.ones(1, 2).long()}
    with pytest.raises(ValueError, match="got 2 in row 0"):
        at_gap(hidden[:1, :2], twice, 4)


def test_a_tied_head_is_its_rows_and_follows_a_copy():
    model = without_output_matrix(language_model("bert"))
    head = TiedHead(model, [9, 6], bias=True)
    table = model.get_input_embeddings().weight
    assert torch.equal(head.weight, table[[9, 6]]) and head.weight.requires_grad
    with torch.no_grad():  # a graph even here: a kernel asks whether V trains
        assert head.weight.requires_grad
        table[9] += 1
    assert torch.equal(head.weight, table[[9, 6]])
    assert [name for name, _ in head.named_parameters()] == ["bias"]
    phi = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(head.untied()(phi), head(phi))
    table.requires_grad_(False)
    assert not head.weight.requires_grad
    pair = copy.deepcopy(nn.ModuleList([model, head]))
    with torch.no_grad():
        pair[0].get_input_embeddings().weight[6] = 0
    assert not pair[1].weight[1].any() and head.weight[1].any()
    with pytest.raises(ClassifierError, match="untie"):
        refuse_tied_head(head)


def test_what_cannot_be_split_is_named():
    with pytest.raises(ClassifierError, match="expected a language model of transformers"):
        split_language_model("bert", [6, 9], tied=False)
    with pytest.raises(ClassifierError, match="nothing to tie"):
        split_language_model(language_model("gpt-neox"), [6, 9], tied=True)
    with pytest.raises(ClassifierError, match="word id 500 has no row"):
        split_language_model(language_model("gpt2"), [6, 500], tied=False)
