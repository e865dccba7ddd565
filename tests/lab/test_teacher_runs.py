"""Random worlds as runs: each estimator against another way to its end, what a record holds, names, faults."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from teachers_oracle import projector

from lpft_nb.experiments import ParameterError, find_experiment, settings_of
from lpft_nb.lab.teacher_runs import (
    ESTIMATORS,
    design_of,
    draw,
    features_of,
    predictors,
    rank_correlation,
    with_worlds,
    world_rows,
)
from lpft_nb.linear_teachers import PLACES, Design, draw_worlds, gradient_flow, start_weights
from lpft_nb.records import load_results, read_record

close = torch.testing.assert_close
EXPERIMENT = find_experiment("linear_teachers")
SETTINGS = dict(
    dimension=12, examples=5, decay=1.0, alpha=1.5, epsilon=0.5, place="anywhere", source_length=2.0,
    noise=0.0, depth=1, frozen_layers=None, penalty=0.3, time=0.7, features=3, draws=4,
)  # fmt: skip


def ends(method, seed=0, **change):
    settings = SETTINGS | change
    worlds = draw(settings, seed)
    return worlds, predictors(method, worlds, settings=settings, seed=seed)


# estimators


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_one_layer_from_source_and_zero_by_the_pseudo_inverse(noise):
    for method in ("FT", "scratch"):
        worlds, found = ends(method, noise=noise)
        for inputs, source, labels, end in zip(
            worlds.inputs, worlds.source, worlds.labels, found, strict=True
        ):
            start = source if method == "FT" else torch.zeros_like(source)
            off = start - projector(inputs) @ start
            close(end, torch.linalg.pinv(inputs) @ labels + off)


def test_ridge_and_early_stopping_by_normal_equations_and_the_matrix_exponential():
    worlds, ridge = ends("ridge", noise=0.4)
    _, stopped = ends("early-stopping", noise=0.4)
    for place, (inputs, source, labels) in enumerate(
        zip(worlds.inputs, worlds.source, worlds.labels, strict=True)
    ):
        moment, n = inputs.T @ inputs / len(inputs), len(inputs)
        penalty = SETTINGS["penalty"] * torch.eye(12, dtype=torch.float64)
        wanted = torch.linalg.solve(moment + penalty, inputs.T @ labels / n + penalty @ source)
        close(ridge[place], wanted)
        best = source + torch.linalg.pinv(inputs) @ (labels - inputs @ source)
        decayed = torch.matrix_exp(-SETTINGS["time"] * moment)
        close(stopped[place], best + decayed @ (source - best))


@pytest.mark.parametrize(("depth", "frozen"), [(2, None), (3, None), (3, 1), (3, 2)])
def test_layers_end_where_simulated_flow_does_with_noise_too(depth, frozen):
    small = dict(dimension=6, examples=3, noise=0.3, draws=1, source_length=1.0, decay=0.0)
    worlds, found = ends("FT", depth=depth, frozen_layers=frozen, **small)
    generator = torch.Generator().manual_seed(0)
    weights = start_weights(worlds.source[0], depth=depth, width=3, generator=generator)
    ends_at = {"time": 1e3, "tolerance": 1e-8, "fitted_at": 1e-14}
    flow = gradient_flow(worlds.inputs[0], worlds.labels[0], weights, frozen=frozen or 0, **ends_at)
    close(found[0], flow.end, rtol=1e-4, atol=1e-4)


def test_the_limit_is_what_many_layers_tend_to_and_frozen_layers_leave_a_multiple():
    _, limit = ends("FT", depth=None)
    _, many = ends("FT", depth=100_000)
    close(limit, many, rtol=1e-3, atol=1e-3)
    worlds, frozen = ends("FT", depth=None, frozen_layers=3)
    assert torch.cosine_similarity(frozen, worlds.source, dim=1).abs().min() > 1 - 1e-12


def test_a_probe_is_least_squares_on_its_features_and_training_goes_on_from_there():
    worlds, probe = ends("LP", noise=0.2)
    _, both = ends("LP-FT", noise=0.2)
    for number, (inputs, source, labels) in enumerate(
        zip(worlds.inputs, worlds.source, worlds.labels, strict=True)
    ):
        features = features_of(source, 3, (0, number))
        close(features.T @ features, torch.eye(3, dtype=torch.float64))
        close(features[:, 0], source / source.norm())
        close(features @ features.T @ source, source)
        wanted = np.linalg.lstsq((inputs @ features).numpy(), labels.numpy(), rcond=None)[0]
        close(probe[number], features @ torch.from_numpy(wanted))
        assert (inputs @ both[number] - labels).norm() < 1e-4 * labels.norm()
    assert torch.equal(ends("source")[1], worlds.source)


# worlds


@pytest.mark.parametrize("place", PLACES)
def test_a_place_moves_what_is_new_and_nothing_else(place):
    common = dict(dimension=40, examples=16, alpha=0.0, epsilon=2.0, decay=1.0)
    inputs, source, new = draw_worlds(Design(**common, place=place), range(400))
    plain = draw_worlds(Design(**common), range(400))
    assert torch.equal(inputs, plain[0]) and torch.equal(source, plain[1])
    assert 1.86 < new.norm(dim=1).square().mean().sqrt() < 2.14  # four standard errors
    used = (new != 0).nonzero()
    if place in ("anywhere", "orthogonal"):
        assert ((new * source).sum(dim=1).abs().max() < 1e-12) == (place == "orthogonal")
    else:
        first, last = {"top": (0, 3), "border": (13, 16), "bottom": (36, 39), "window": (0, 39)}[
            place
        ]
        assert used[:, 1].min() == first and used[:, 1].max() == last
        assert ((new != 0).sum(dim=1) == 4).all()
    again = draw_worlds(Design(**common, place=place), [7])
    assert torch.equal(again[2][0], new[7])


def test_noise_moves_the_answers_alone():
    quiet, loud = draw(SETTINGS, 3), draw(SETTINGS | {"noise": 0.5}, 3)
    assert torch.equal(quiet.inputs, loud.inputs) and torch.equal(quiet.target, loud.target)
    errors = (loud.labels - quiet.labels) / 0.5
    assert 0.5 < errors.square().mean() < 2
    close(quiet.answered, quiet.target)
    close((loud.inputs @ loud.answered[..., None])[..., 0], loud.labels)


# what a record holds


def test_rows_are_means_over_draws():
    values = {row["metric"]: row["value"] for row in world_rows("FT", SETTINGS, 0)}
    worlds, found = ends("FT")
    spectrum = design_of(SETTINGS).spectrum
    cost = ((found - worlds.target).square() * spectrum).sum(dim=1)
    own = (worlds.target.square() * spectrum).sum(dim=1)
    assert values["risk"] == pytest.approx(cost.mean().item())
    assert values["relative_risk"] == pytest.approx((cost / own).mean().item())
    assert values["loss"] < 1e-20
    assert values["distance"] == pytest.approx((worlds.target - worlds.source).norm(dim=1).mean())
    assert values["rank_correlation/projected"] == pytest.approx(1)  # with one layer it is the risk
    loss = {row["metric"]: row["value"] for row in world_rows("source", SETTINGS, 0)}["loss"]
    gaps = (worlds.inputs @ (worlds.source - worlds.target)[..., None])[..., 0]
    assert loss == pytest.approx(gaps.square().mean().item())


def test_a_rank_correlation_of_what_never_differs_is_missing():
    rising, flat = torch.arange(5.0), torch.ones(5) * (1 + 1e-15)
    assert rank_correlation(rising, -(rising**3)) == pytest.approx(-1)
    assert np.isnan(rank_correlation(rising, flat)) and np.isnan(rank_correlation(flat, rising))
    assert np.isnan(rank_correlation(1e-17 * rising, rising))  # noise of a right angle
    assert np.isnan(rank_correlation(rising[:2], rising[:2]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    asked = {
        "dimension": 20,
        "draws": 5,
        "alpha": [1, 2],
        "depth": [1, None],
        "output": str(folder),
    }
    runs, task = EXPERIMENT.plan(EXPERIMENT.check(asked))
    assert task is None
    return runs, [run.make(run) for run in runs]


def test_a_run_leaves_the_record_that_was_planned(made):
    runs, paths = made
    assert len(runs) == 2 * 2 * 2 * 3 and paths == [run.path for run in runs]
    record = read_record(paths[0])
    assert record["model"] == {"id": "linear"} and record["task"]["sizes"] == {"train": 10}
    assert {row["metric"] for row in record["metrics"]} >= set(EXPERIMENT.metrics)
    assert all(run.state == "finished" for run in runs)
    fingerprints = {read_record(path)["task"]["fingerprint"] for path in paths}
    assert len(fingerprints) == 2  # two kinds of worlds, whatever the estimator, depth and seed


def test_worlds_and_estimators_are_named_by_what_differs(made):
    rows = with_worlds(load_results(made[1]))
    risks = rows[rows["metric"] == "relative_risk"]
    assert list(dict.fromkeys(risks["world"])) == ["alpha 1", "alpha 2"]
    assert set(risks["estimator"]) == {"FT, depth 1", "FT, depth limit", "scratch"}
    assert len(risks) == 2 * 3 * 3  # scratch once, although it was asked for at two depths
    one = load_results(made[1][:1])
    assert set(with_worlds(one)["world"]) == {"one world"} and set(
        with_worlds(one)["estimator"]
    ) == {"FT"}
    frozen = one.assign(
        parameters=[
            json.dumps(json.loads(text) | {"frozen_layers": at % 2 or None})
            for at, text in enumerate(one["parameters"])
        ]
    )
    assert set(with_worlds(frozen)["estimator"]) == {"FT, frozen layers 0", "FT, frozen layers 1"}


def test_published_records_are_those_of_this_code(published_worlds):
    for record in published_worlds:
        found = world_rows(record["method"], record["parameters"], record["seed"])
        again = {(row["split"], row["metric"]): row["value"] for row in found}
        for row in record["metrics"]:
            value = again[row["split"], row["metric"]]
            if row["value"] is None:
                assert np.isnan(value)
            else:
                assert value == pytest.approx(row["value"], rel=1e-5, abs=1e-7)


@pytest.fixture
def published_worlds():
    folder = ROOT / "results" / "grids" / "paper_d" / "linear_teachers"
    return [read_record(path) for path in sorted(folder.glob("*-s1001-*.json"))[::6]]


# faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": [0], "epsilon": [0]}, "the target is zero"),
        ({"frozen_layers": [2], "depth": [2]}, "expected fewer"),
        ({"features": 101}, "expected at most the 100"),
        ({"place": ["middle"]}, "one of anywhere"),
        ({"methods": ["LoRA"]}, "one of FT, scratch"),
        ({"epsilon": [-0.1]}, "numbers? from 0 on"),
        ({"alpha": [float("inf")]}, "finite"),
    ],
)
def test_what_means_nothing_is_refused(change, message):
    with pytest.raises(ParameterError, match=message):
        EXPERIMENT.plan(EXPERIMENT.check(change))


def test_every_estimator_has_every_parameter_in_its_name():
    parameters = EXPERIMENT.check({})
    for method in ESTIMATORS:
        assert {"penalty", "time", "features"} <= settings_of(parameters, method).keys()
