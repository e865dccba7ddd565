"""The order of the examples: every one once, another order each epoch, little padding."""

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from toys import small_model, toy_data

from lpft_nb.classifier import Classifier
from lpft_nb.training.batches import EpochSampler, epoch_order, padding_share
from lpft_nb.training.loop import train
from lpft_nb.training.stage import FineTune


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    grouped=st.booleans(),
)
def test_every_example_once_and_reproducible(lengths, batch, seed, epoch, grouped):
    order = epoch_order(lengths, batch, seed=seed, epoch=epoch, length_grouping=grouped)
    assert sorted(order) == list(range(len(lengths)))
    assert order == epoch_order(lengths, batch, seed=seed, epoch=epoch, length_grouping=grouped)


def test_global_random_state_is_neither_read_nor_changed():
    before = torch.get_rng_state()
    first = epoch_order(list(range(100)), 8, seed=0, epoch=0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert first == epoch_order(list(range(100)), 8, seed=0, epoch=0)


def test_padding_share_by_hand():
    assert padding_share([1, 3, 2, 2], [0, 1, 2, 3], 2) == pytest.approx(1 - 8 / 10)


@pytest.mark.parametrize(
    "name, columns, batch, limit",
    [
        ("rte", ("sentence1", "sentence2"), 16, 0.05),
        ("sst2", ("sentence",), 32, 0.05),
        ("cb", ("premise", "hypothesis"), 16, 0.20),
        ("cb", ("premise", "hypothesis"), 8, 0.20),
    ],
)
def test_little_padding_on_real_data(shared_data, embedded_model, name, columns, batch, limit):
    rows = [
        json.loads(line)
        for line in (shared_data / name / "train.jsonl").read_text().split("\n")
        if line
    ]
    texts = [
        tuple(row[c] for c in columns) if len(columns) > 1 else row[columns[0]] for row in rows
    ]
    model = Classifier.from_pretrained(embedded_model, num_labels=2)
    lengths = [len(example["input_ids"]) for example in model.encode(texts, max_length=128)]
    assert padding_share(lengths, epoch_order(lengths, batch, seed=0, epoch=0), batch) <= limit


# --- every epoch its own order


@pytest.mark.parametrize("grouped", [True, False])
def test_a_sampler_gives_each_epoch_the_order_of_that_epoch(grouped):
    lengths = torch.randint(4, 40, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = EpochSampler(
        lengths,
        global_batch_size=4,
        process_batch_size=4,
        processes=1,
        seed=3,
        length_grouping=grouped,
    )
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        expected = epoch_order(lengths, 4, seed=3, epoch=epoch, length_grouping=grouped)
        assert list(sampler) == expected
    orders = [epoch_order(lengths, 4, seed=3, epoch=e, length_grouping=grouped) for e in range(3)]
    assert len(set(map(tuple, orders))) == 3


def test_no_two_epochs_of_a_training_see_the_same_order(tmp_path, monkeypatch):
    "The order in which a real training asks for its examples."
    import lpft_nb.training.loop as loop

    seen, collate = [], loop.collate

    def watch(model, examples):
        seen.extend(tuple(example["input_ids"]) for example in examples)
        return collate(model, examples)

    monkeypatch.setattr(loop, "collate", watch)
    data, stage = toy_data(16), FineTune(epochs=3, learning_rate=1e-3, batch_size=4)
    train(
        small_model(),
        data,
        toy_data(8, seed=1),
        stage,
        seed=5,
        folder=tmp_path,
        minutes_between_checkpoints=float("inf"),
    )
    places = {tuple(example["input_ids"]): at for at, example in enumerate(data.inputs)}
    order = [places[ids] for ids in seen if ids in places]  # without the validation's
    epochs = [order[at : at + 16] for at in (0, 16, 32)]
    assert len(places) == 16 and len(order) == 48
    assert epochs == [epoch_order(data.lengths, 4, seed=5, epoch=e) for e in range(3)]
    assert len(set(map(tuple, epochs))) == 3
