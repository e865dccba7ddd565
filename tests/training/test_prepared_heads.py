"""Prepared heads: smoothed targets, squared loss, requested energy and many probe lengths, against autograd and scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from test_stages import small, write_task

from lpft_nb.classifier import features_of, reset_head
from lpft_nb.energy import energy, smoothed_energy
from lpft_nb.linear_probe import ConvergenceError, fit_logistic, probe_path
from lpft_nb.solvers.descent import soft_targets, stable_learning_rate
from lpft_nb.solvers.squared import fit_squared
from lpft_nb.stages import FineTune, LinearProbe, run_stages
from lpft_nb.tasks import load_task
from lpft_nb.training import head_stages


def make(examples, size, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(examples, size, generator=generator, dtype=torch.float64) + 0.3
    return features, torch.arange(examples) % classes


# --- smoothed targets


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [0.1, 5.0])
def test_the_smoothed_optimum_is_scikit_learns_with_weighted_copies(classes, penalty):
    features, labels = make(40, 5, classes)
    fit = fit_logistic(features, labels, penalty, smoothing=0.3)
    shares = soft_targets(labels, classes, 0.3).flatten().numpy()
    oracle = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(
        features.repeat_interleave(classes, dim=0).numpy(),
        np.tile(np.arange(classes), len(labels)),
        sample_weight=shares,
    )
    expected = torch.from_numpy(oracle.predict_proba(features.numpy()))
    torch.testing.assert_close(fit.logits(features).softmax(dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_smoothed_objective_is_the_stated_one_and_has_no_slope(bias):
    features, labels = make(30, 4, 3)
    fit = fit_logistic(features, labels, 2.0, smoothing=0.2, bias=bias)
    weight = fit.weight.clone().requires_grad_()
    logits = features @ weight.T + (0 if fit.bias is None else fit.bias)
    targets = soft_targets(labels, 3, 0.2)
    value = -2.0 * (targets * logits.log_softmax(dim=1)).sum() + weight.square().sum() / 2
    assert value.item() == pytest.approx(fit.objective, rel=1e-10)
    (slope,) = torch.autograd.grad(value, weight)
    assert slope.norm() < 1e-7


def test_no_smoothing_is_the_plain_fit_bit_for_bit():
    features, labels = make(30, 4, 3)
    plain, same = (
        fit_logistic(features, labels, 2.0),
        fit_logistic(features, labels, 2.0, smoothing=0),
    )
    assert torch.equal(plain.weight, same.weight) and plain.objective == same.objective


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("examples", [11, 21])  # N = h + 1 is the last that is fitted
def test_smoothed_targets_are_fitted_up_to_h_plus_one_examples(classes, examples):
    features, labels = make(examples, 20, classes)
    fit = fit_logistic(features, labels, math.inf, smoothing=0.1)
    left = energy(fit.logits(features), labels)
    assert left == pytest.approx(smoothed_energy(0.1, classes), rel=1e-6)


def test_more_examples_than_that_leave_more_energy():
    left = []
    for examples in (21, 60, 300):
        features, labels = make(examples, 20, 3)
        fit = fit_logistic(features, labels, math.inf, smoothing=0.1)
        left.append(energy(fit.logits(features), labels))
    assert left[0] < 1.01 * smoothed_energy(0.1, 3) < left[1] / 2 and left[1] < left[2]


# --- squared loss


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [4, 60])  # fewer and more features than examples
@pytest.mark.parametrize("penalty", [0.05, 4.0])
def test_the_squared_optimum_is_scikit_learns_ridge(bias, size, penalty):
    features, labels = make(30, size, 3)
    fit = fit_squared(features, labels, penalty, bias=bias, smoothing=0.2)
    targets = soft_targets(labels, 3, 0.2)
    oracle = Ridge(alpha=1 / penalty, fit_intercept=bias).fit(features.numpy(), targets.numpy())
    torch.testing.assert_close(fit.weight, torch.from_numpy(oracle.coef_), rtol=1e-7, atol=1e-9)
    scores = features @ fit.weight.T + (0 if fit.bias is None else fit.bias)
    value = penalty * (targets - scores).square().sum() / 2 + fit.weight.square().sum() / 2
    assert fit.objective == pytest.approx(value.item())
    assert (fit.bias is None) != bias


def test_without_a_penalty_it_is_the_shortest_least_squares():
    features, labels = make(12, 30, 3)
    fit = fit_squared(features, labels, math.inf, bias=False)
    targets = soft_targets(labels, 3)
    torch.testing.assert_close(fit.weight, (torch.linalg.pinv(features) @ targets).T)
    assert fit.objective == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_squared_path_ends_at_the_squared_optimum(classes):
    features, labels = make(40, 4, classes)
    rate = 0.9 * stable_learning_rate(features, classes, penalty=1.0, loss="squared")
    path = probe_path(features, labels, 4000, rate, penalty=1.0, loss="squared", smoothing=0.1)
    exact = fit_squared(features, labels, 1.0, smoothing=0.1)
    torch.testing.assert_close(path.weight, exact.weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(path.bias, exact.bias, rtol=1e-6, atol=1e-9)


# --- lengths and energies


@pytest.mark.parametrize("batch_size", [None, 7])
def test_every_length_of_one_pass_is_the_path_that_ends_there(batch_size):
    features, labels = make(30, 5, 3)
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    options = dict(weight=start, bias_init=torch.ones(3), batch_size=batch_size, seed=4)
    path = probe_path(features, labels, 16, 0.1, keep=[0, 1, 5, 16], **options)
    assert list(path.heads) == [0, 1, 5, 16]
    for epochs, (weight, bias) in path.heads.items():
        alone = probe_path(features, labels, epochs, 0.1, **options)
        assert torch.equal(weight, alone.weight) and torch.equal(bias, alone.bias)
        left = energy(features @ weight.T + bias, labels)
        assert path.history["energy"][epochs] == pytest.approx(left, rel=1e-12)
    assert torch.equal(path.heads[0][0], start.double())


def test_the_path_stops_at_the_first_epoch_with_so_little_energy():
    features, labels = make(30, 20, 3)
    whole = probe_path(features, labels, 200, 0.2).history
    for wanted in (0.7, 0.4):
        stopped = probe_path(features, labels, 200, 0.2, energy=wanted)
        last = int(stopped.history["epoch"].iloc[-1])
        assert last == int((whole["energy"] <= wanted).to_numpy().argmax()) > 0
        alone = probe_path(features, labels, last, 0.2)
        assert torch.equal(stopped.weight, alone.weight)
    at_once = probe_path(features, labels, 200, 0.2, energy=1.2)
    assert len(at_once.history) == 1 and (at_once.weight == 0).all()


def test_an_energy_that_is_not_reached_is_an_error():
    features, labels = make(30, 5, 3)
    with pytest.raises(ConvergenceError, match=r"the energy is 0\.\d+ after 3 epochs, wanted 0.01"):
        probe_path(features, labels, 3, 0.1, energy=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=[4]), "epochs from 0 to 3"),
        (dict(keep=[1.5]), "epochs from 0 to 3"),
        (dict(energy=0.0), "energy must be"),
        (dict(energy=math.nan), "energy must be"),
        (dict(smoothing=1.0), r"share in \[0, 1\)"),
        (dict(smoothing=True), r"share in \[0, 1\)"),
        (dict(loss="mse"), "unknown loss 'mse'"),
    ],
)
def test_a_path_refuses(options, message):
    features, labels = make(30, 5, 3)
    with pytest.raises(ValueError, match=message):
        probe_path(features, labels, 3, 0.1, **options)


# --- as settings of the stage


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))
    return load_task(write_task(tmp_path))


PREPARED = {
    "smoothed": LinearProbe(smoothing=0.2, penalty=10.0),
    "squared": LinearProbe(loss="squared", penalty=1.0),
    "smoothed steps": LinearProbe(smoothing=0.2, epochs=30, learning_rate=0.05),
    "squared steps": LinearProbe(loss="squared", epochs=30, learning_rate=0.01),
    "energy": LinearProbe(energy=0.6, epochs=3000, learning_rate=0.05),
}


def given_head(model):
    return model.head.weight.detach().clone(), model.head.bias.detach().clone()


@pytest.mark.parametrize("name", PREPARED)
def test_the_stage_gives_the_head_of_the_solver_and_comes_back_from_its_folder(
    name, task, tmp_path
):
    probe, model = PREPARED[name], small()
    start, features, labels = given_head(model), features_of(model, task.train), task.train["label"]
    run = run_stages(model, task, [probe], output=tmp_path / "run", device="cpu")
    plain = dict(smoothing=probe.smoothing or 0.0)
    if probe.epochs is not None:
        wanted = probe_path(
            features,
            labels,
            probe.epochs,
            probe.learning_rate,
            weight=start[0],
            bias_init=start[1],
            loss=probe.loss or "cross-entropy",
            energy=probe.energy,
            **plain,
        )
    else:
        fit = fit_squared if probe.loss == "squared" else fit_logistic
        wanted = fit(features, labels, probe.penalty, **plain)
    torch.testing.assert_close(model.head.weight.double(), wanted.weight, rtol=1e-5, atol=1e-6)
    bias = wanted.bias - 0.5 if probe.loss == "squared" else wanted.bias  # the same softmax
    torch.testing.assert_close(model.head.bias.double(), bias, rtol=1e-5, atol=1e-6)
    facts = json.loads(json.dumps(run.stages[0], allow_nan=False))  # as a record holds them
    for setting in ("smoothing", "loss", "energy"):
        assert facts["settings"][setting] == getattr(probe, setting)
    if name == "energy":
        assert facts["energy_reached"] <= 0.6 and facts["epochs_taken"] > 0
    again = small()
    back = run_stages(again, task, [probe], output=tmp_path / "run", device="cpu")
    assert all(torch.equal(value, back.arrays[key]) for key, value in run.arrays.items())
    assert torch.equal(again.head.weight, model.head.weight)


# --- probes that share one walk

LENGTHS = (0, 3, 20)


@pytest.fixture
def walks(monkeypatch):
    "How far each walk went."
    far, real = [], head_stages.probe_path

    def noted(*arguments, **options):
        far.append(options["epochs"])
        return real(*arguments, **options)

    monkeypatch.setattr(head_stages, "probe_path", noted)
    return far


@pytest.mark.parametrize(
    "changed", [{}, {"batch_size": 7}, {"smoothing": 0.2}, {"loss": "squared"}]
)
@pytest.mark.parametrize("bias", [True, False])
def test_probes_of_several_lengths_share_one_walk_bit_for_bit(changed, bias, task, walks):
    ends = {}
    for epochs in LENGTHS:
        step = dict(epochs=epochs, learning_rate=0.01, **changed)
        for keep in (LENGTHS, None):
            model = small(head_bias=bias)
            found = run_stages(model, task, [LinearProbe(**step, keep=keep)], device="cpu")
            ends[epochs, keep] = model.head.state_dict(), found
        (shared, found), (alone, other) = ends[epochs, LENGTHS], ends[epochs, None]
        assert all(torch.equal(shared[name], alone[name]) for name in alone)
        assert found.history.equals(other.history)
    assert walks == [20, 0, 3, 20]  # one for all; then each alone
    assert not torch.equal(ends[0, None][0]["weight"], ends[20, None][0]["weight"])


def test_another_start_or_setting_is_another_walk(task, walks):
    step = dict(epochs=3, learning_rate=0.01, keep=(3, 5))
    for seed, more in ((0, {}), (1, {}), (0, {"penalty": 2.0}), (0, {"keep": (3, 6)}), (0, {})):
        model = small()
        reset_head(model, seed)
        run_stages(model, task, [LinearProbe(**step | more)], device="cpu")
    assert walks == [5, 5, 5, 6]


def test_a_probe_of_no_epochs_leaves_the_head_as_it_is(task):
    model, start = small(), small().head.state_dict()
    run_stages(model, task, [LinearProbe(epochs=0, learning_rate=0.1)], device="cpu")
    assert all(torch.equal(model.head.state_dict()[name], start[name]) for name in start)


def test_another_smoothing_is_another_run(task, tmp_path):
    first = LinearProbe(smoothing=0.2, penalty=1.0)
    run_stages(small(), task, [first], output=tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"."):
        other = LinearProbe(smoothing=0.3, penalty=1.0)
        run_stages(small(), task, [other], output=tmp_path / "run", device="cpu")


def test_a_prepared_head_is_where_fine_tuning_starts(task):
    tuned = FineTune(epochs=1, learning_rate=1e-3, batch_size=8)
    both, alone = small(), small()
    run_stages(alone, task, [PREPARED["energy"]], device="cpu")
    probed = run_stages(alone, task, [tuned], device="cpu")
    result = run_stages(both, task, [PREPARED["energy"], tuned], device="cpu")
    assert torch.equal(result.arrays["logits/FT/test"], probed.arrays["logits/FT/test"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(smoothing=0.0, penalty=1.0), "smoothing=0.0.: expected a number between 0 and 1"),
        (dict(smoothing=1, penalty=1.0), "smoothing=1.: expected"),
        (dict(smoothing=True, penalty=1.0), "smoothing=True"),
        (dict(smoothing="0.1", penalty=1.0), "smoothing='0.1'"),
        (dict(smoothing=0.1), "not cross-validated: give a penalty"),
        (dict(loss="squared"), "not cross-validated: give a penalty"),
        (dict(loss="square", penalty=1.0), "did you mean 'squared'"),
        (dict(loss="squared", penalty=1.0, folds=3), "belongs to a cross-validation"),
        (dict(smoothing=0.1, penalty=1.0, repeats=3), "belongs to a cross-validation"),
        (dict(energy=0.3), "stops gradient steps; give epochs"),
        (dict(energy=0.3, penalty=1.0), "stops gradient steps; give epochs"),
        (dict(energy=1.5, epochs=3, learning_rate=0.1), "energy=1.5.: expected"),
        (dict(energy=math.nan, epochs=3, learning_rate=0.1), "energy=nan"),
        (dict(epochs=-1, learning_rate=0.1), "epochs=-1"),
        (dict(epochs=3, learning_rate=0.1, keep=(2, 4)), "with this probe's among them"),
        (dict(epochs=3, learning_rate=0.1, keep=(3, -1)), "whole numbers from 0 on"),
        (dict(epochs=3, learning_rate=0.1, keep=(3, True)), "whole numbers from 0 on"),
        (dict(epochs=3, learning_rate=0.1, keep=(3,), energy=0.5), "and no energy"),
        (dict(keep=(3,)), "with this probe's among them"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**settings)


def test_the_plain_probe_gives_the_same_head_as_before_to_the_bit():
    """The walk of a plain probe, as a loop of the operations that it had before there were options."""
    features, labels = make(20, 3, 3)
    path = probe_path(features, labels, 25, 0.1, penalty=2.0)
    matrix = torch.cat([features, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    targets = torch.nn.functional.one_hot(labels, 3).T.double().contiguous()
    head = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(25):
        gradient = ((head @ matrix.T).log_softmax(dim=0).exp() - targets) @ matrix / 20
        gradient[:, :3] += 1 / (2.0 * 20) * head[:, :3]
        head -= 0.1 * gradient
    assert torch.equal(path.weight, head[:, :3]) and torch.equal(path.bias, head[:, 3])
