"""Prepared heads as runs: one walk for all lengths, the energy at which training starts, paper B's numbers by hand, what is refused."""

import json

import pandas as pd
import pytest
import torch

from lpft_nb.classifier import Classifier, features_of, logits_of
from lpft_nb.energy import energy
from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.lab.head_preparation import (
    AXES,
    draw_preparations,
    measures_of,
    preparation_stages,
    preparation_table,
    preparations,
)
from lpft_nb.lab.runs import make_each
from lpft_nb.records import load_results
from lpft_nb.stages import run_stages
from lpft_nb.training import head_stages

LENGTHS = [0, 2, 5, None]
EXPERIMENT = find_experiment("head_preparation")


def asked(toy_task, tiny_checkpoint, folder, **more):
    request = dict(
        task=str(toy_task), model=str(tiny_checkpoint), output=str(folder), max_train=None
    )
    request |= dict(max_length=16, device="cpu", probe_learning_rate=0.05, together=[5], epochs=1)
    return EXPERIMENT.check(request | more)


@pytest.fixture(scope="module")
def made(toy_task, tiny_checkpoint, tmp_path_factory):
    "Four lengths and two seeds, made once: runs, the walks that were taken, the metrics."
    folder, walks, real = tmp_path_factory.mktemp("heads"), [], head_stages.probe_path

    def noted(*arguments, **options):
        walks.append(options["epochs"])
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPFT_CACHE", str(folder / "cache"))
        patch.setattr(head_stages, "probe_path", noted)
        parameters = asked(toy_task, tiny_checkpoint, folder, probe_epochs=LENGTHS, seeds=[0, 1])
        runs, task = EXPERIMENT.plan(parameters)
        make_each(runs, task)
        before = [run.path.stat().st_mtime_ns for run in runs]
        make_each(runs, task)
        assert [run.path.stat().st_mtime_ns for run in runs] == before  # nothing is made again
    return runs, task, walks, load_results([run.path for run in runs])


def test_each_seed_walks_once_for_all_lengths(made):
    runs, _, walks, _ = made
    assert walks == [5, 5] and len(runs) == 8
    names = [[stage.name for stage in run.stages] for run in runs]
    assert names == [["LP", "FT"]] * 8


def test_energy_and_motion_are_those_of_the_model_at_its_start_and_end(made, tiny_checkpoint):
    runs, task, _, metrics = made
    table = preparations(metrics)
    for run in (runs[0], runs[2], runs[3]):
        model = Classifier.from_pretrained(
            tiny_checkpoint, 2, seed=0, max_length=16, label_names=list(task.label_names)
        )
        first = features_of(model, task.train).double()
        (probe, tune) = run.stages
        run_stages(model, task, [probe], seed=0, device="cpu", max_length=16)
        row = table.loc[run.name]
        left = energy(logits_of(model, task.train), task.train["label"])
        assert row["start energy"] == pytest.approx(left, rel=1e-5)
        run_stages(model, task, [tune], seed=0, device="cpu", max_length=16)
        last = features_of(model, task.train).double()
        cosine = torch.nn.functional.cosine_similarity(first, last)
        expected = {
            "distance": (last - first).norm(dim=1).mean(),
            "cosine distance": 1 - cosine.mean(),
            "dot product": (last * first).sum(dim=1).mean(),
            "norm": last.norm(dim=1).mean(),
        }
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
        right = logits_of(model, task.test).argmax(1) == torch.tensor(list(task.test["label"]))
        assert row["test accuracy"] == pytest.approx(float(right.double().mean()))


def test_more_probing_leaves_less(made):
    table = preparations(made[3])
    assert list(dict.fromkeys(table["preparation"])) == ["0", "2", "5", "converged"]
    for _, of_one in table.groupby("seed"):
        left = of_one["start energy"].to_numpy()
        assert (left[1:] < left[:-1]).all()


def test_the_table_and_the_figures_hold_every_preparation(made):
    table = preparations(made[3])
    shown = preparation_table(table)
    assert shown["preparation"].tolist() == ["0", "2", "5", "converged"] and set(
        shown["seeds"]
    ) == {2}
    assert {"distance", "test accuracy"} <= set(measures_of(table))
    by_hand = table[table["preparation"] == "2"]["test accuracy"].mean()
    assert shown["test accuracy"][1].startswith(f"{100 * by_hand:.1f}")
    for over in ("preparation", "start energy"):
        figure = draw_preparations(table, ["distance", "test accuracy"], over=over)
        line = figure.axes[0].lines[0]
        means = table.groupby("place")["distance"].mean().tolist()
        assert line.get_ydata().tolist() == pytest.approx(means)
    energies = table.groupby("place")["start energy"].mean().tolist()
    assert line.get_xdata() == pytest.approx(energies)  # of the last figure


def test_two_axes_are_both_named_and_ordered():
    rows = []
    for number, (length, share) in enumerate([(None, 0.1), (4, None), (4, 0.1)]):
        told = dict.fromkeys(AXES) | {"probe_epochs": length, "smoothing": share, "head_scale": 1.0}
        about = dict(run_id=str(number), method="LP-FT", seed=0, task="t", model="m", value=0.5)
        about |= dict(parameters=json.dumps(told), split="train")
        rows.append(about | dict(stage="LP", metric="energy", final=False))
        for metric in ("feature_change", "mean_cosine_to_reference"):
            rows.append(about | dict(stage="FT", metric=metric, final=True))
    table = preparations(pd.DataFrame(rows))
    assert table["preparation"].tolist() == [
        "probe epochs 4, smoothing none",
        "probe epochs 4, smoothing 0.1",
        "probe epochs converged, smoothing 0.1",
    ]


def test_the_last_stage_before_training_says_with_which_energy_it_starts(
    toy_task, tiny_checkpoint, tmp_path
):
    parameters = asked(
        toy_task, tiny_checkpoint, tmp_path, probe_epochs=[3], head_scale=[1, 8], seeds=[0]
    )
    runs, task = EXPERIMENT.plan(parameters)
    make_each(runs, task)
    table = preparations(load_results([run.path for run in runs]))
    assert table["preparation"].tolist() == ["1", "8"]
    assert [stage.name for stage in runs[1].stages] == ["LP", "scale", "FT"]
    assert table["start energy"].iloc[0] != table["start energy"].iloc[1]


@pytest.mark.parametrize(
    "larger", [{"hidden": [4]}, {"blocks": [1]}, {"energy": [0.7068]}, {"smoothing": [0.2]}]
)
def test_every_other_way_to_prepare_a_head_runs(larger, toy_task, tiny_checkpoint, tmp_path):
    steps = {"probe_epochs": [3], "probe_learning_rate": 0.02}
    if "energy" in larger:
        steps = {"probe_epochs": [20_000], "probe_learning_rate": 0.1}
    runs, task = EXPERIMENT.plan(asked(toy_task, tiny_checkpoint, tmp_path, **steps, **larger))
    make_each(runs, task)
    table = preparations(load_results([run.path for run in runs]))
    if "energy" in larger:
        assert 0 < table["start energy"].item() <= 0.7068
    assert table["distance"].item() > 0


PLAIN = dict.fromkeys(AXES) | {"head_scale": 1.0, "penalty": 100.0, "probe_learning_rate": 0.1}
PLAIN |= {"probe_batch_size": None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"energy": 0.5}, "expected probe_epochs of at least 1"),
        ({"energy": 0.5, "probe_epochs": 0}, "expected probe_epochs of at least 1"),
        ({"energy": 1.5, "probe_epochs": 3}, "less than √2"),
        ({"hidden": 4}, "a larger head has no exact optimum"),
        ({"blocks": 1}, "a larger head has no exact optimum"),
    ],
)
def test_a_preparation_that_contradicts_itself_is_refused(changed, message):
    with pytest.raises(ParameterError, match=message):
        preparation_stages(PLAIN | changed)


@pytest.mark.parametrize("method", ["FT", "LP", "LoRA"])
def test_only_methods_that_train_after_a_probe_are_planned(
    method, toy_task, tiny_checkpoint, tmp_path
):
    with pytest.raises(ParameterError, match="expected LP-FT or LP-LoRA"):
        EXPERIMENT.plan(asked(toy_task, tiny_checkpoint, tmp_path, methods=[method]))


@pytest.mark.parametrize("wrong", [[-1], [1.5], ["much"], [True], []])
def test_a_length_that_is_none_is_refused(wrong, toy_task, tiny_checkpoint, tmp_path):
    with pytest.raises(ParameterError, match="probe_epochs"):
        asked(toy_task, tiny_checkpoint, tmp_path, probe_epochs=wrong)
