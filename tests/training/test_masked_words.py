"""Learning masked words: pieces, gaps, a resumed training, and scores against closed forms and a second implementation."""

import math

import pytest
import torch
from conftest import build_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.readout import HEAD, put_on
from lpft_nb.training import masked_words
from lpft_nb.training.batches import IGNORED
from lpft_nb.training.checkpoints import last_checkpoint
from lpft_nb.training.masked_words import (
    judge_words,
    learn_words,
    model_to_learn,
    pieces_of,
    readout_of,
    unigram,
)

TOKENIZER = build_tokenizer()
TEXTS = ["good film", "bad film", "good good cat", "bad dog"] * 8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config = BertConfig(vocab_size=len(TOKENIZER), max_position_embeddings=32, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def fresh(encoder, seed=0):
    return model_to_learn(encoder, rank=2, scale=2, seed=seed)


def learn(model, folder, **options):
    given = dict(epochs=2, learning_rate=1e-2, batch_size=8, gap_share=0.4, seed=3)
    return learn_words(
        model, pieces_of(TEXTS, TOKENIZER), TOKENIZER, folder=folder, **given | options
    )


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def test_pieces_hold_every_token_once():
    text = "good " * 23
    pieces = [one["input_ids"] for one in pieces_of([text, "bad"], TOKENIZER, max_length=10)]
    good = TOKENIZER.convert_tokens_to_ids("good")
    assert [len(one) for one in pieces] == [10, 10, 9, 3]
    assert all((one[0], one[-1]) == (0, 2) for one in pieces)
    assert sum(one.count(good) for one in pieces) == 23


def test_the_loss_is_that_of_all_scores(encoder):
    torch.manual_seed(1)
    model = fresh(encoder).eval()
    ids, labels = torch.randint(5, 20, (3, 6)), torch.full((3, 6), IGNORED)
    labels[0, 1], labels[2, 3], labels[2, 4] = 7, 9, 11
    mask = torch.ones_like(ids)
    found = model(ids, mask, labels)
    whole = BertForMaskedLM.forward(model, ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.loss, whole.loss)
    torch.testing.assert_close(found.logits, whole.logits[labels != IGNORED])
    nothing = model(ids, mask, torch.full_like(ids, IGNORED))
    assert nothing.loss == 0 and len(nothing.logits) == 0


def test_updates_begin_at_zero_and_the_head_is_drawn_from_the_seed(encoder):
    published = BertModel.from_pretrained(encoder).eval()
    one, same, other = fresh(encoder), fresh(encoder), fresh(encoder, seed=1)
    ids = torch.tensor([[1, 6, 7, 2]])
    assert torch.equal(one.eval().bert(ids)[0], published(ids)[0])
    name = HEAD["transform.weight"]
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_only_head_and_updates_learn(encoder, tmp_path):
    model = fresh(encoder)
    before = weights(model)
    history = learn(model, tmp_path)
    moved = {name for name, one in weights(model).items() if not torch.equal(one, before[name])}
    assert moved == {name for name in before if "lora_" in name or name in HEAD.values()}
    assert len([name for name in moved if "lora_A" in name]) == 2 * 6
    assert not model.training and history[-1]["step"] == 8
    assert {"step", "epoch", "loss"} == set(history[0])


def test_what_was_learned_is_the_same_function_on_the_published_encoder(encoder, tmp_path):
    model = fresh(encoder)
    learn(model, tmp_path)
    readout = readout_of(model, "base", {"steps": 8})
    whole = BertForMaskedLM.from_pretrained(encoder).eval()
    put_on(whole, readout)
    ids = torch.tensor([[0, 6, 7, 8, 2]])
    expected = whole(ids).logits[0]
    torch.testing.assert_close(model(ids, torch.ones_like(ids), ids).logits, expected)
    assert readout.scale == 2 and readout.facts == {"steps": 8}


class Killed(Exception):
    pass


def test_a_training_that_was_cut_goes_on_to_the_same_weights(encoder, tmp_path, monkeypatch):
    whole, cut, again = (fresh(encoder) for _ in range(3))
    learn(whole, tmp_path / "whole")
    step, steps = masked_words.Trainer.training_step, []

    def dying(trainer, *arguments, **options):
        steps.append(1)
        if len(steps) > 6:
            raise Killed
        return step(trainer, *arguments, **options)

    monkeypatch.setattr(masked_words.Trainer, "training_step", dying)
    with pytest.raises(Killed):
        learn(cut, tmp_path / "cut", minutes_between_checkpoints=0)
    monkeypatch.setattr(masked_words.Trainer, "training_step", step)
    assert last_checkpoint(tmp_path / "cut") is not None
    learn(again, tmp_path / "cut")
    for name, one in weights(whole).items():
        assert torch.equal(one, again.get_parameter(name)), name


def test_a_training_repeats_bit_for_bit(encoder, tmp_path):
    one, two = fresh(encoder), fresh(encoder)
    assert learn(one, tmp_path / "one") == learn(two, tmp_path / "two")
    assert all(torch.equal(a, two.get_parameter(name)) for name, a in weights(one).items())


def test_another_architecture_is_refused(tmp_path):
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    RobertaModel(RobertaConfig(vocab_size=40, **shape)).save_pretrained(tmp_path)
    with pytest.raises(ClassifierError, match="is a roberta: expected a BERT"):
        model_to_learn(tmp_path, rank=2, scale=2, seed=0)


# judging


def test_equal_scores_have_the_vocabulary_as_their_perplexity():
    pieces = pieces_of(TEXTS, TOKENIZER)
    size = len(TOKENIZER)
    flat = lambda batch: torch.zeros(int((batch["labels"] != IGNORED).sum()), size)
    found = judge_words(flat, pieces, TOKENIZER, gap_share=0.5)
    assert found.perplexity == pytest.approx(size)
    assert len(found.gaps) == len(pieces) and found.gaps.sum() > 10


@torch.no_grad()
def test_scores_of_each_piece_are_those_of_a_loop(encoder):
    model, pieces, seen = fresh(encoder).eval(), pieces_of(TEXTS, TOKENIZER), []

    def scores(batch):
        seen.append({name: one.clone() for name, one in batch.items()})
        return model(**batch).logits

    found = judge_words(scores, pieces, TOKENIZER, gap_share=0.4, batch_size=5)
    expected = []
    for batch in seen:
        logits = BertForMaskedLM.forward(model, batch["input_ids"], batch["attention_mask"]).logits
        for row, labels, ids in zip(logits, batch["labels"], batch["input_ids"], strict=True):
            at = labels != IGNORED
            assert (ids[at] == TOKENIZER.mask_token_id).all()
            nats = torch.nn.functional.cross_entropy(row[at], labels[at], reduction="sum")
            right = (row[at].argmax(1) == labels[at]).sum()
            expected.append([float(at.sum()), float(right), float(nats) if at.any() else 0.0])
    gaps, right, nats = torch.tensor(expected, dtype=torch.float64).T
    assert torch.equal(found.gaps, gaps) and torch.equal(found.right, right)
    torch.testing.assert_close(found.nats, nats, rtol=1e-5, atol=1e-5)
    assert found.accuracy == pytest.approx(float(right.sum() / gaps.sum()))
    assert found.perplexity == pytest.approx(math.exp(float(nats.sum() / gaps.sum())), rel=1e-5)


def test_every_model_is_asked_the_same_gaps(encoder):
    pieces = pieces_of(TEXTS, TOKENIZER)
    one = judge_words(unigram(pieces, TOKENIZER), pieces, TOKENIZER, seed=4)
    model = fresh(encoder).eval()
    two = judge_words(lambda batch: model(**batch).logits, pieces, TOKENIZER, seed=4)
    other = judge_words(unigram(pieces, TOKENIZER), pieces, TOKENIZER, seed=5)
    assert torch.equal(one.gaps, two.gaps) and not torch.equal(one.gaps, other.gaps)


def test_the_unigram_counts_words_and_no_special_token():
    pieces = pieces_of(["good good bad"], TOKENIZER)
    logs = unigram(pieces, TOKENIZER)({"labels": torch.tensor([[IGNORED, 3]])})
    size = len(TOKENIZER)
    good, bad, other = (TOKENIZER.convert_tokens_to_ids(word) for word in ("good", "bad", "film"))
    expected = torch.tensor([3, 2, 1, 1], dtype=torch.float64) / (3 + size)
    torch.testing.assert_close(logs[0, [good, bad, other, 0]].exp(), expected)
    assert logs.shape == (1, size)


def test_text_without_a_gap_is_refused():
    pieces = pieces_of(["good"], TOKENIZER)
    with pytest.raises(ValueError, match="no gap to judge by"):
        judge_words(unigram(pieces, TOKENIZER), pieces, TOKENIZER, gap_share=1e-9)
    with pytest.raises(ValueError, match="no gap to judge by"):
        judge_words(unigram(pieces, TOKENIZER), [], TOKENIZER)
