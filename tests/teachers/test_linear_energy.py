"""The linear model of paper B: closed forms against steps, autograd and an exact flow, and the derived table's trends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.energy import feature_motion
from lpft_nb.intervals import confidence_interval
from lpft_nb.teachers.linear_energy import (
    LinearModel,
    draw_linear_model,
    first_order_features,
    one_example_features,
    probe_by_steps,
    probed_heads,
    tuned_features,
)

FEW = settings(deadline=None, max_examples=15)
TAUS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 512, 4096]
SEEDS = 12


@FEW
@given(st.integers(0, 1000), st.integers(1, 30), st.sampled_from([0.0, 1.0]), st.floats(0.05, 1.95))
def test_the_probe_in_closed_form_is_the_probe_by_steps(seed, examples, scale, share):
    """Also with more examples than features, and where steps overshoot."""
    model = draw_linear_model(seed, head_scale=scale, examples=examples)
    rate = share * examples / torch.linalg.matrix_norm(model.features, ord=2).item() ** 2
    heads = probed_heads(model, [0, 1, 7, 60], rate=rate)
    for steps, head in zip([0, 1, 7, 60], heads, strict=True):
        torch.testing.assert_close(
            head, probe_by_steps(model, steps, rate=rate), rtol=1e-8, atol=1e-9
        )
    assert torch.equal(heads[0], model.head)


def test_tuning_takes_the_steps_of_autograd():
    """Features after zero-loss tuning of B and v themselves, every step by autograd."""
    model = draw_linear_model(1, head_scale=1.0, examples=4, features=6, inputs=9)
    after = tuned_features(model, model.head[None], share=0.1, tolerance=1e-6)[0]
    backbone, head = model.backbone.clone().requires_grad_(), model.head.clone().requires_grad_()
    gram, features = model.inputs @ model.inputs.T, model.features
    kernel = features @ features.T + model.head.square().sum() * gram
    rate = 0.1 * 4 / torch.linalg.eigvalsh(kernel)[-1]  # on the mean loss
    for _ in range(5000):
        residual = model.targets - model.inputs @ backbone.T @ head
        if residual.abs().max() < 1e-6:
            break
        gradients = torch.autograd.grad(residual.square().mean() / 2, [backbone, head])
        with torch.no_grad():
            backbone -= rate * gradients[0]
            head -= rate * gradients[1]
    torch.testing.assert_close(after, (model.inputs @ backbone.T).detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_one_example_ends_where_the_flow_ends(seed, scale):
    model = draw_linear_model(seed, head_scale=scale, examples=1, features=5, inputs=7)
    heads = probed_heads(model, [0, 1, 2], rate=0.1)
    length = model.inputs.square().sum().item()
    exact = one_example_features(
        model.features[0], heads, model.targets.item(), squared_length=length
    )
    moved = (exact - model.features[0]).norm(dim=1)
    errors = []
    for share in (0.02, 0.01):
        walked = tuned_features(model, heads, share=share, tolerance=1e-7)[:, 0]
        errors.append(((walked - exact).norm(dim=1) / moved).max().item())
    assert errors[1] < 0.05 and errors[1] < 0.6 * errors[0]  # of first order in the step


def test_one_example_reaches_its_target_and_keeps_what_a_flow_keeps():
    """The head's own end follows from |v|² − |B|²: here from v(s), by the same hyperbolic turn."""
    feature, head = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    after = one_example_features(feature, head[None], 1.0, squared_length=4.0)[0]
    sinh = after[1].item() / (2 * 0.8)  # √a = 2
    end = head * math.hypot(1, sinh) + feature / 2 * sinh
    assert (after @ end).item() == pytest.approx(1.0, abs=1e-12)
    before = 4 * head.square().sum() - feature.square().sum()
    assert (4 * end.square().sum() - after.square().sum()).item() == pytest.approx(before.item())


@pytest.mark.parametrize("seed", range(3))
def test_first_order_is_the_limit_of_small_energy(seed):
    model = draw_linear_model(seed, head_scale=1.0)
    gaps = []
    for left in (1e-2, 1e-3):  # targets this near to what a converged head says
        head = probed_heads(model, [100_000], rate=0.25)
        close = LinearModel(
            model.inputs,
            model.features @ head[0] + left * model.targets,
            backbone=model.backbone,
            head=head[0],
        )
        after, closed = (
            tuned_features(close, head, share=0.02, tolerance=1e-9),
            first_order_features(close, head),
        )
        gaps.append(((after - closed).norm() / (after - model.features).norm()).item())
    assert gaps[1] < 0.01 and gaps[1] < gaps[0]


@pytest.fixture(scope="module")
def tables():
    """Energy and the four numbers by head scale and seed, each a tensor (seeds, taus)."""
    found = {}
    for scale in (0.01, 2.0):
        rows = {"energy": [], "distance": [], "cosine_distance": [], "dot_product": [], "norm": []}
        for seed in range(SEEDS):
            model = draw_linear_model(seed, head_scale=scale)
            heads = probed_heads(model, TAUS, rate=0.25)
            rows["energy"].append(model.energies(heads).tolist())
            motions = [feature_motion(z, model.features) for z in tuned_features(model, heads)]
            for name in motions[0]:
                rows[name].append([motion[name] for motion in motions])
        found[scale] = {name: torch.tensor(values) for name, values in rows.items()}
    return found


@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_energy_falls_with_the_probe_and_distances_with_the_energy(tables, scale):
    for name in ("energy", "distance", "cosine_distance"):
        steps = tables[scale][name].mean(dim=0).diff()
        flat = 5e-4 if scale < 1 and name != "energy" else 0  # from a small head their top is flat
        assert (steps < flat).all() and (steps[3:] < 0).all(), name
    assert tables[scale]["energy"][:, -1].max() < 0.01


def rise(values, at):
    """The interval over seeds of a number at one probe length less at none."""
    return confidence_interval(values[:, at] - values[:, 0])


@pytest.mark.parametrize("name", ["dot_product", "norm"])
def test_product_and_norm_rise_and_fall_only_from_a_head_that_is_not_small(tables, name):
    large, small = tables[2.0][name], tables[0.01][name]
    peak = int(large.mean(dim=0).argmax())
    assert 0 < peak < len(TAUS) - 1
    assert rise(large, peak).low > 0  # from the energy at τ = 0 down to that at the peak it rises,
    fall = confidence_interval(large[:, peak] - large[:, -1])
    assert fall.low > 0  # and from there on it falls
    means = small.mean(dim=0)
    assert (means.diff() < 1e-4).all() and int(means.argmax()) <= 1


def test_distance_is_proportional_to_small_energy(tables):
    energy, distance = (tables[2.0][name].log() for name in ("energy", "distance"))
    slopes = (distance[:, -1] - distance[:, -2]) / (energy[:, -1] - energy[:, -2])
    low, high = confidence_interval(slopes)[1:]
    assert 0.85 < low < high < 1.15


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e3, math.nan])
def test_a_rate_at_which_the_probe_grows_is_refused(rate):
    model = draw_linear_model(0, head_scale=1.0)
    for probe in (
        lambda: probed_heads(model, [1], rate=rate),
        lambda: probe_by_steps(model, 1, rate=rate),
    ):
        with pytest.raises(ValueError, match="rate must lie between 0 and"):
            probe()


def test_other_wrong_input_is_refused():
    model = draw_linear_model(0, head_scale=1.0)
    with pytest.raises(ValueError, match="whole numbers"):
        probed_heads(model, [1.5], rate=0.1)
    with pytest.raises(ValueError, match="backbone must have shape"):
        LinearModel(model.inputs, model.targets, backbone=model.backbone.T, head=model.head)
    with pytest.raises(ValueError, match="finite float64"):
        LinearModel(
            model.inputs, torch.nan * model.targets, backbone=model.backbone, head=model.head
        )
    with pytest.raises(RuntimeError, match="take more steps"):
        tuned_features(model, model.head[None], max_steps=3)
    feature = torch.tensor([1.0, 0.0]).double()
    with pytest.raises(ValueError, match="exactly opposed"):
        one_example_features(feature, -feature[None], 1.0, squared_length=1.0)
    with pytest.raises(ValueError, match="squared_length"):
        one_example_features(feature, feature[None], 1.0, squared_length=0.0)
