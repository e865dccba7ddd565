"""Collapse while a model trains: the choice of examples, the numbers of every layer, and training that does not notice."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from lpft_nb.geometry.sums import Undefined
from lpft_nb.models.layers import add_skip
from lpft_nb.training import collapse_rows
from lpft_nb.training.checkpoints import last_checkpoint
from lpft_nb.training.collapse_rows import (
    MOST,
    FollowCollapse,
    collapse_table,
    layer_collapse,
    stratified_places,
)
from lpft_nb.training.loop import train
from lpft_nb.training.stage import FineTune
from toys import small_model, toy_data

STAGE = dict(epochs=3, learning_rate=1e-3, batch_size=8)


@given(
    sizes=st.lists(st.integers(2, 200), min_size=1, max_size=6),
    share=st.floats(0.01, MOST),
    shuffle=st.randoms(),
)
def test_a_choice_is_small_fixed_and_stratified(sizes, share, shuffle):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    shuffle.shuffle(labels)
    if int(share * len(labels)) < 2 * len(sizes):
        with pytest.raises(Undefined, match="two examples of each"):
            stratified_places(labels, share)
        return
    places = stratified_places(labels, share)
    assert places == sorted(set(places)) == stratified_places(labels, share)
    assert len(places) <= share * len(labels)
    for label, size in enumerate(sizes):
        count = sum(labels[place] == label for place in places)
        assert 2 <= count <= max(2, share * size)


def test_a_class_of_one_is_refused():
    with pytest.raises(Undefined, match="the smallest class has 1"):
        stratified_places([0] * 99 + [1], 0.1)


def explicit_nc1(rows, labels):
    "tr(Σ_W Σ_B⁺) / K with matrices that are written out."
    rows, labels = rows.double().numpy(), np.asarray(labels)
    classes = np.unique(labels)
    means = np.stack([rows[labels == k].mean(axis=0) for k in classes])
    inside = sum(
        (rows[labels == k] - m).T @ (rows[labels == k] - m)
        for k, m in zip(classes, means, strict=True)
    ) / len(rows)
    shifts = means - rows.mean(axis=0)
    return np.trace(inside @ np.linalg.pinv(shifts.T @ shifts / len(classes))) / len(classes)


@pytest.mark.parametrize("skip", [None, 1])
def test_every_layer_has_the_nc1_of_explicit_matrices(skip):
    model, data = small_model(), toy_data(60)
    if skip is not None:
        add_skip(model, skip)
    found = layer_collapse(model, data.inputs, data.labels)
    rows = {f"layer {k}": [] for k in range(3)} | {"features": []}
    with torch.no_grad():
        for example in data.inputs:  # alone, by transformers' own hidden states
            batch = {name: torch.tensor([row]) for name, row in example.items()}
            output = model.backbone(**batch, output_hidden_states=True)
            for layer, state in enumerate(output.hidden_states):
                rows[f"layer {layer}"].append(state[0, 0])
            rows["features"].append(model.features(**batch)[0])
    assert set(found.values) | set(found.undefined) == set(rows)
    for name, values in found.values.items():
        wanted = explicit_nc1(torch.stack(rows[name]), data.labels)
        assert values["nc1"] == pytest.approx(wanted, rel=1e-3), name
    assert (found.values["features"] == found.values["layer 2"]) == (skip is None)


def test_a_layer_that_is_one_vector_has_a_reason_and_the_others_have_numbers():
    model = build_tiny_model("bert", pooling="cls", dtype=torch.float32)
    data = toy_data(30)
    for example in data.inputs:
        example["input_ids"][0] = 0
    found = layer_collapse(model, data.inputs, data.labels)
    assert "one vector" in found.undefined["layer 0"] and set(found.undefined) == {"layer 0"}
    assert set(found.values) == {"layer 1", "layer 2", "features"}


def trained(folder, data, share=None, minutes=math.inf, **changes):
    model = small_model()
    stage = FineTune(**(STAGE | changes), collapse_share=share)
    history, facts = train(
        model, data, data, stage=stage, seed=0, folder=folder, minutes_between_checkpoints=minutes
    )
    return model, pd.DataFrame(history), facts


def test_rows_by_layer_and_epoch_and_training_goes_on_as_without_them(tmp_path):
    data = toy_data(120)
    plain, quiet, _ = trained(tmp_path / "a", data)
    model, history, facts = trained(tmp_path / "b", data, share=0.1)
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name
    table = collapse_table(history)
    others = history[~history["metric"].str.contains("/")].reset_index(drop=True)
    pd.testing.assert_frame_equal(others, quiet)
    assert set(table["metric"]) == {"nc1", "nc1_quotient", "collapse_index"}
    assert set(table["layer"]) == {0, 1, 2, "features"} and len(table) == 4 * 3 * 4
    assert sorted(set(table["epoch"])) == [0, 1, 2, 3] and facts["no_collapse"] == ""
    places = stratified_places(data.labels, 0.1)
    assert len(places) <= 12
    start = layer_collapse(
        small_model(), [data.inputs[p] for p in places], [data.labels[p] for p in places]
    )
    first = table[(table["epoch"] == 0) & (table["metric"] == "nc1")].set_index("layer")["value"]
    assert first[1] == start.values["layer 1"]["nc1"]


def test_only_the_chosen_examples_are_read(tmp_path, monkeypatch):
    data, read = toy_data(120), []
    own = collapse_rows.layer_features

    def counted(model, inputs, poolings):
        read.append(len(inputs))
        return own(model, inputs, poolings)

    monkeypatch.setattr(collapse_rows, "layer_features", counted)
    trained(tmp_path, data, share=0.1)
    assert read == [len(stratified_places(data.labels, 0.1))] * 4 and max(read) <= 12


def test_a_resumed_training_keeps_the_rows_of_before(tmp_path, monkeypatch):
    data = toy_data(120)
    whole, history, _ = trained(tmp_path / "whole", data, share=0.1)
    looks, own = [], FollowCollapse.look

    def dies(self, model, state):
        looks.append(state.global_step)
        if len(looks) == 4:
            raise KeyboardInterrupt
        own(self, model, state)

    monkeypatch.setattr(FollowCollapse, "look", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", data, share=0.1, minutes=0)
    assert last_checkpoint(tmp_path / "cut") is not None
    monkeypatch.setattr(FollowCollapse, "look", own)
    model, again, _ = trained(tmp_path / "cut", data, share=0.1, minutes=0)
    pd.testing.assert_frame_equal(collapse_table(again), collapse_table(history))
    for one, other in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_too_few_examples_stop_no_training_and_leave_a_reason(tmp_path):
    _, history, facts = trained(tmp_path, toy_data(30), share=0.1, epochs=1)
    assert collapse_table(history).empty
    assert "two examples of each of 3 classes, and 0.1 of 30 are 3" in facts["no_collapse"]
    albert = FollowCollapse(build_tiny_model("albert"), toy_data(120), 0.1)
    assert "AlbertModel keeps no list" in albert.reasons and not albert.places


@pytest.mark.parametrize("share", [0, 0.11, 1, -0.1, math.nan, True, "0.1"])
def test_a_share_that_is_none_or_too_large_is_refused(share):
    with pytest.raises(ValueError, match="collapse_share=.*expected a share of the training set"):
        FineTune(collapse_share=share)
