"""Runs of the collapse experiment: fresh blocks and random weights, frozen features against their own probe, shares of the training set."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_tiny_model
from scipy import stats

from lpft_nb.collapse import collapse_statistics
from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.intervals import rank_correlation
from lpft_nb.lab.collapse_answers import frozen_table, with_fraction
from lpft_nb.lab.collapse_runs import cut_to, freshened, frozen_rows, source_kinds
from lpft_nb.lab.feature_choice import probe_rows
from lpft_nb.lab.saved_logits import last_logits
from lpft_nb.linear_probe import fit_probe
from lpft_nb.models.layers import LayerError, layer_features
from lpft_nb.records import load_history, load_results, read_record
from lpft_nb.tasks import load_task
from lpft_nb.training.collapse_rows import collapse_table


def small(layers=3, **fields):
    return build_tiny_model(
        "bert", num_labels=2, dtype=torch.float32, pooling="mean",
        backbone=dict(num_hidden_layers=layers), **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(toy_task):
    return load_task(str(toy_task))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_only_the_last_blocks_are_fresh(blocks):
    model = small()
    before = copy.deepcopy(model.state_dict())
    made = freshened(model, blocks, seed=0)
    fresh = tuple(f"backbone.encoder.layer.{3 - number}." for number in range(1, blocks + 1))
    moved = {name for name, one in made.state_dict().items() if not torch.equal(one, before[name])}
    assert moved and all(name.startswith(fresh) for name in moved)
    assert {name.split(".")[3] for name in moved} == {name.split(".")[3] for name in fresh}
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    again, other = freshened(model, blocks, seed=0), freshened(model, blocks, seed=1)
    assert all(torch.equal(again.state_dict()[name], made.state_dict()[name]) for name in moved)
    assert any(not torch.equal(other.state_dict()[name], made.state_dict()[name]) for name in moved)


def test_random_weights_are_all_of_the_backbones():
    model = small()
    made = freshened(model, None, seed=0)
    for name, one in model.backbone.named_parameters():
        assert not torch.equal(one, dict(made.backbone.named_parameters())[name]), name
    assert torch.equal(made.head.weight, model.head.weight)
    with pytest.raises(LayerError, match="layer=0"):
        freshened(model, 4, seed=0)


def test_frozen_rows_are_those_of_each_kind_alone(task):
    model = small()
    rows = pd.DataFrame(
        frozen_rows(model, task, poolings=["mean"], fresh=[1], max_length=16, seed=0)
    )
    places = [f"pretrained/layer {k}/mean" for k in range(4)] + ["fresh 1/layer 3/mean"]
    places += [f"random/layer {k}/mean" for k in range(4)]
    assert list(dict.fromkeys(rows["stage"])) == places
    labels = [torch.tensor(list(side["label"])) for side in (task.train, task.test)]
    made = freshened(model, 1, seed=0)
    for place, source in (("pretrained/layer 3/mean", model), ("fresh 1/layer 3/mean", made)):
        sides = [
            layer_features(source, source.encode(side, 16), ["mean"])[3, "mean"]
            for side in (task.train, task.test)
        ]
        found = rows[rows["stage"] == place].set_index("metric")["value"]
        for name, value in collapse_statistics(sides[0], labels[0]).items():
            assert found[name] == pytest.approx(value, rel=1e-9), name
        probe = fit_probe(sides[0], labels[0], seed=0, num_classes=2)
        right = (probe.logits(sides[1]).argmax(dim=1) == labels[1]).double().mean().item()
        assert found["accuracy"] == pytest.approx(right)


def test_layers_that_are_one_vector_are_left_out(task):
    rows = frozen_rows(small(), task, poolings=["cls"], fresh=[1], max_length=16, seed=0)
    assert "pretrained/layer 0/cls" not in {row["stage"] for row in rows}
    assert "pretrained/layer 1/cls" in {row["stage"] for row in rows}


def test_a_share_is_stratified_drawn_by_the_seed_and_never_without_a_class(task):
    assert cut_to(task, 1, 0) is task
    half, other = cut_to(task, 0.5, 0), cut_to(task, 0.5, 1)
    assert half.class_counts["train"] == other.class_counts["train"] == (3, 3) or list(
        half.class_counts["train"]
    ) == [3, 3]
    assert half.fingerprint != other.fingerprint or half.train["text"] != other.train["text"]
    assert len(cut_to(task, 0.001, 0).train) == 2
    assert half.test.to_dict() == task.test.to_dict()


def planned(loaded, **request):
    experiment = find_experiment("neural_collapse")
    parameters = experiment.check({"device": "cpu", "max_length": 16} | request)
    return experiment.plan(parameters, loaded)[0]


def test_the_plan_has_a_run_for_each_method_seed_and_share(task, tiny_checkpoint):
    methods = ["LP", "LayerFT", "SCL-FT", "FT", "LoRA", "LP-FT"]
    request = {"task": task.name, "model": str(tiny_checkpoint), "methods": methods}
    runs = planned(task, **request, fraction=[1.0, 0.5], seeds=[0, 1])
    assert len({run.name for run in runs}) == len(runs) == 6 * 2 * 2
    sizes = {(run.settings["fraction"], run.task["sizes"]["train"]) for run in runs}
    assert sizes == {(1.0, 12), (0.5, 6)}
    for run in runs:
        frozen = run.method == "LP" and run.settings["fraction"] == 1
        assert ("poolings" in run.settings) == ("fresh" in run.settings) == frozen
        assert ("layer" in run.settings) == (run.method in ("LayerFT", "SCL-FT"))
        assert [stage.name for stage in run.stages][-1] == run.method.removeprefix("LP-")
    with pytest.raises(ParameterError, match=r"fraction=1\.5: expected shares"):
        planned(task, **request, fraction=[1.5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source_task": "docstring-kind"}, "expected both, or neither"),
        ({"source_epochs": [1]}, "expected both, or neither"),
        ({"source_learning_rate": 1e-3}, "a rate with them only"),
        ({"source_task": "toy", "source_epochs": [1]}, "expected another task"),
        ({"source_task": "docstring-kind", "source_epochs": [4, 1]}, "expected numbers of epochs that rise"),
    ],
)  # fmt: skip
def test_a_source_that_says_too_little_is_refused(task, tiny_checkpoint, given, message):
    request = {"task": task.name, "model": str(tiny_checkpoint), "methods": ["LP"]}
    with pytest.raises(ParameterError, match=message):
        planned(task, **request, **given)


def test_a_source_is_part_of_the_name_where_it_counts(task, tiny_checkpoint):
    request = {"task": task.name, "model": str(tiny_checkpoint), "methods": ["LP", "FT"]}
    plain = planned(task, **request, fraction=[1.0, 0.5])
    more = planned(
        task, **request, fraction=[1.0, 0.5], source_task="docstring-kind", source_epochs=[1]
    )
    same = [one.name == two.name for one, two in zip(plain, more, strict=True)]
    where = [run.method != "LP" or run.settings["fraction"] < 1 for run in plain]
    assert same == where


def test_checkpoints_along_another_task_are_kinds_with_the_collapse_of_both(task):
    model, start = small(), small()
    before = copy.deepcopy(model.state_dict())
    kept = {}

    def copied():
        options = dict(learning_rate=1e-2, device="cpu", max_length=16)
        for kind, made, first in source_kinds(start, task, epochs=[1, 3], seed=0, **options):
            kept[kind] = copy.deepcopy(made)
            yield kind, made, first

    options = dict(poolings=["mean"], fresh=[1], max_length=16, seed=0)
    frame = pd.DataFrame(frozen_rows(model, task, source=task, checkpoints=copied(), **options))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    alone = pd.DataFrame(frozen_rows(model, task, **options))
    own = frame[
        ~frame["stage"].str.startswith("source") & ~frame["metric"].str.startswith("source")
    ]
    assert own.reset_index(drop=True).equals(alone)
    labels = torch.tensor(list(task.train["label"]))
    found = frame[frame["metric"] == "source_nc1"].set_index("stage")["value"]
    assert set(found.index) == {
        f"{kind}/layer 3/mean" for kind in ("pretrained", "source 1", "source 3")
    }
    for kind, made in {"pretrained": model, **kept}.items():
        rows = layer_features(made, made.encode(task.train, 16), ["mean"])[3, "mean"]
        expected = collapse_statistics(rows, labels)
        place = f"{kind}/layer 3/mean"
        assert found[place] == pytest.approx(expected["nc1"], rel=1e-6)
        values = frame[frame["stage"] == place].set_index("metric")["value"]
        assert values["nc1"] == pytest.approx(
            expected["nc1"], rel=1e-6
        )  # source and task are one here
    assert found.nunique() == 3
    assert set(frame[frame["stage"].str.startswith("source 3")]["stage"]) == {
        "source 3/layer 3/mean"
    }


def test_a_probe_is_judged_on_shifted_sets_too():
    generator = torch.Generator().manual_seed(0)
    sides = [
        (
            torch.randn(30, 4, generator=generator) + torch.arange(30)[:, None] % 2,
            torch.arange(30) % 2,
        )
        for _ in range(3)
    ]
    rows = probe_rows(*sides[:2], {"ood/other": sides[2]}, stage="x", classes=2, seed=0)
    found = {(row["split"], row["metric"]): row["value"] for row in rows}
    probe = fit_probe(*sides[0], seed=0, num_classes=2)
    for split, (features, labels) in (("test", sides[1]), ("ood/other", sides[2])):
        right = (probe.logits(features).argmax(dim=1) == labels).double().mean().item()
        assert found[split, "accuracy"] == pytest.approx(right)


def test_records_hold_frozen_features_and_what_training_left(toy_task, tiny_checkpoint, tmp_path):
    task = load_task(str(toy_task))
    runs = planned(
        task, task=str(toy_task), model=str(tiny_checkpoint), methods=["LP", "SCL-FT"],
        fraction=[1.0, 0.5], fresh=[1], epochs=1, learning_rate=1e-3, pooling="mean",
        output=str(tmp_path),
    )  # fmt: skip
    for run in runs:
        assert run.make(run) == run.path
    records = [read_record(run.path) for run in runs]
    metrics, history = load_results(records), load_history(records)
    ends = with_fraction(metrics[metrics["final"]])
    assert set(ends["fraction"]) == {1.0, 0.5} and set(ends["stage"]) == {"LP", "SCL-FT"}
    for method in ("LP", "SCL-FT"):
        part = ends[(ends["method"] == method) & (ends["split"] == "train")]
        assert {"nc1", "nc1_quotient", "class_distance_variance"} <= set(part["metric"])
    table = frozen_table(metrics)
    kinds = table[table["fraction"] == 1.0]
    assert len(kinds) == len(table) == 3 + 1 + 3  # shares below one have none
    assert kinds[["nc1", "accuracy"]].notna().all().all()
    for record, run in zip(records, runs, strict=True):
        name, logits, truth = last_logits(record, run.path.parent)
        assert name == record["method"] and logits["test"].shape == (6, 2)
        assert truth["test"].tolist() == list(task.test["label"])
    last = kinds[(kinds["kind"] == "pretrained") & (kinds["layer"] == 2)].iloc[0]
    own = ends[(ends["method"] == "LP") & (ends["fraction"] == 1.0)]
    for metric, split in (("accuracy", "test"), ("nc1", "train")):
        value = own[(own["metric"] == metric) & (own["split"] == split)]["value"].item()
        assert last[metric] == pytest.approx(value, rel=1e-5)
    assert collapse_table(history).empty  # a tenth of 12 texts is too few to follow
    facts = [record["stages"][-1] for record in records if record["method"] == "SCL-FT"]
    assert all("collapse needs two examples of each" in fact["no_collapse"] for fact in facts)
    assert json.loads(ends["parameters"].iloc[0])["fraction"] in (1.0, 0.5)


def test_the_correlation_over_kinds_is_scipys():
    generator = np.random.default_rng(0)
    left = generator.normal(size=20)
    right = left + generator.normal(size=20)
    assert rank_correlation(left, right).mean == pytest.approx(stats.spearmanr(left, right)[0])
