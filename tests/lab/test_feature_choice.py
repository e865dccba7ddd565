"""Every layer and pooling: the same features as the model's own, rows in their order, a record that holds what the probes do."""

import pytest
import torch
from model_oracle import TEXTS
from torch.testing import assert_close

from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.lab.choice_tables import choice_table, last_layer, with_places
from lpft_nb.lab.feature_choice import layer_features, probe_rows
from lpft_nb.linear_probe import fit_probe
from lpft_nb.records import load_results, read_record

POOLINGS = ["cls", "last", "mean"]


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_last_layer_is_what_the_model_reads_and_rows_keep_their_order(
    tiny_model, architecture, batch_size
):
    for pooling in POOLINGS:
        model = tiny_model(architecture, pooling=pooling, dtype=torch.float32)
        found = layer_features(model, model.encode(TEXTS), POOLINGS, batch_size=batch_size)
        assert {layer for layer, _ in found} == {0, 1, 2}
        with torch.no_grad():
            assert_close(found[2, pooling], model.features(**model.tokenize(TEXTS)))


def test_the_first_layer_is_the_embedding(tiny_model):
    model = tiny_model("llama", dtype=torch.float32)
    found = layer_features(model, model.encode(TEXTS), ["last"])
    last = [example["input_ids"][-1] for example in model.encode(TEXTS)]
    assert_close(found[0, "last"], model.backbone.get_input_embeddings().weight[last].detach())


def test_the_rows_say_what_the_probe_does():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) + 2 * torch.eye(3, 5)[labels]
    test, test_labels = features[:15] + 0.1, labels[:15]
    rows = probe_rows(
        (features, labels), (test, test_labels), stage="layer 1/mean", classes=3, seed=0
    )
    values = {row["metric"]: row["value"] for row in rows}
    probe = fit_probe(features, labels, seed=0, num_classes=3)
    right = (probe.logits(test).argmax(1) == test_labels).double().mean()
    assert values["accuracy"] == float(right) and values["penalty"] == probe.penalty
    assert values["head_norm"] == float(probe.weight.norm())
    assert abs(values["feature_norm"] - float(features.norm(dim=1).double().mean())) < 1e-6
    assert {row["stage"] for row in rows} == {"layer 1/mean"}


@pytest.fixture(scope="module")
def made(toy_task, tiny_checkpoint, tmp_path_factory):
    "Two runs of the experiment on the toy task."
    experiment, folder = find_experiment("feature_choice"), tmp_path_factory.mktemp("choice")
    request = dict(task=str(toy_task), model=str(tiny_checkpoint), output=str(folder))
    request |= dict(probe_train=12, poolings=["cls", "mean"], seeds=[0, 1], device="cpu")
    runs, _ = experiment.plan(experiment.check(request | {"max_length": 32}))
    return [run.make(run) for run in runs]


def test_a_record_holds_every_layer_and_pooling(made):
    rows = with_places(load_results(made))
    assert set(rows["layer"]) == {0, 1, 2} and set(rows["pooling"]) == {"cls", "mean"}
    assert len(rows[rows["metric"] == "accuracy"]) == 2 * 3 * 2
    assert set(last_layer(rows)["layer"]) == {2}
    table = choice_table(rows)
    assert list(table.index) == ["first token", "mean"]
    assert table["head norm"].str.contains(r"\(2\)").all()  # two seeds
    first, second = (read_record(path) for path in made)
    assert first["task"]["fingerprint"] == second["task"]["fingerprint"]
    assert first["metrics"] != second["metrics"]  # each seed draws its own examples


def test_only_a_probe_is_trained(toy_task, tiny_checkpoint):
    experiment = find_experiment("feature_choice")
    request = dict(task=str(toy_task), model=str(tiny_checkpoint), methods=["FT"], max_length=32)
    with pytest.raises(ParameterError, match="expected LP"):
        experiment.plan(experiment.check(request))
