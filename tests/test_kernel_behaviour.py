"""The three conditions on numbers, first order and gradients against brute force, and networks where the answer is known."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as some
from kernel_oracle import TEXTS, gradient_rows
from test_prompts import language_model, prompted

from lpft_nb.classifier import logits_of
from lpft_nb.kernel_behaviour import (
    fixed_features,
    gradient_changes,
    kernel_behaviour,
    kernel_fit,
    linearisation,
    linearised_logits,
    moved_parameters,
    solves,
)
from lpft_nb.kernel_machines import class_accuracy
from lpft_nb.stages import FineTune, LinearProbe, LoRA
from lpft_nb.tasks import Task

SIGNS = ("great", "dull", "small")  # the word that gives a text its class
FILLING = ("the cat sat", "a dog ran", "under a tree", "the matrix", "film over cat")
QUICK = dict(batch_size=15)
SHARES = some.floats(0, 1)


def words_task(names=("train", "validation", "test")):
    "Texts whose class is the word that they hold; the same texts in every split but for their order."
    rows = [(f"{words} {sign}", label) for words in FILLING for label, sign in enumerate(SIGNS)]
    splits = {}
    for shift, name in enumerate(names):
        own = rows[shift:] + rows[:shift]
        splits[name] = Dataset.from_dict(
            {"text": [text for text, _ in own], "label": [label for _, label in own]}
        )
    return Task("words", **splits, label_names=SIGNS)


def moved(model, size=0.1, only=""):
    "A copy with other weights: those whose name starts with `only`."
    end = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in end.named_parameters():
            parameter.requires_grad_(name.startswith(only))
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if name.startswith(only):
                parameter.add_(size * step)
    return end


# conditions


@given(SHARES, SHARES, SHARES)
def test_solving_is_a_share_of_what_fine_tuning_reached(kernel, fine_tuned, largest):
    found = solves(kernel, fine_tuned, largest)
    if fine_tuned <= largest:
        assert found.holds is None and math.isnan(found.value) and "cannot tell" in found.reason
    else:
        assert found.value == kernel / fine_tuned
        assert found.holds == (kernel >= 0.9 * fine_tuned - 1e-9 * fine_tuned)
        assert ("short of" in found.reason) != found.holds


@given(SHARES, SHARES, SHARES)
def test_first_order_is_judged_by_the_gain(start, linearised, fine_tuned):
    found = linearisation(start, linearised, fine_tuned)
    if fine_tuned <= start:
        assert found.holds is None and math.isnan(found.value)
    elif fine_tuned - start > 1e-6:
        assert found.value == pytest.approx((linearised - start) / (fine_tuned - start))
        assert ("short of" in found.reason) != found.holds


def test_the_limits_belong_to_what_holds():
    assert solves(0.63, 0.7, 0.1).holds and linearisation(0.5, 0.7, 0.9).holds
    assert not fixed_features([2.0, 2.0]).holds and fixed_features([1.9, 2.0]).holds
    short = linearisation(0.2, 0.3, 0.8)
    assert short.value == pytest.approx(1 / 6) and "20.0 points short of 0.5" in short.reason
    assert "9.0 points short of 0.9" in solves(0.72, 0.9, 0.5).reason
    assert "0.500 too far for 2" in fixed_features([2.5]).reason


@pytest.mark.parametrize(
    "call",
    [
        lambda: solves(81.0, 0.9, 0.5),
        lambda: solves(0.8, math.nan, 0.5),
        lambda: linearisation(-0.1, 0.5, 0.9),
        lambda: fixed_features([]),
        lambda: fixed_features([0.1, math.nan]),
        lambda: fixed_features([[0.1]]),
        lambda: fixed_features([-0.1]),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call()


# first order and gradients


def check_first_order(model, end, texts):
    batch = model.tokenize(texts)
    names = list(moved_parameters(model, end))
    step = torch.cat(
        [(end.get_parameter(name) - model.get_parameter(name)).detach().flatten() for name in names]
    )
    sides = [copy.deepcopy(one) for one in (model, end)]
    for one in sides:
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(name in names)
    jacobians = []
    for one in sides:
        head, backbone = (rows[:, 1:] for rows in gradient_rows(one, batch))
        part = {"head": head, "backbone": backbone}
        own = {
            kind: torch.cat(
                [p.detach().flatten() for n, p in one.named_parameters() if n.startswith(kind)]
            )
            for kind in part
        }
        assert all(part[kind].shape[1] == len(own[kind]) for kind in part)
        order = sorted(part, key=lambda kind: not names[0].startswith(kind))
        jacobians.append(torch.cat([part[kind] for kind in order], dim=1))
    classes = len(jacobians[0]) // len(texts)
    expected = logits_of(model, texts) + (jacobians[0] @ step).view(len(texts), classes)
    found = linearised_logits(model, end, texts, batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # RMS norms in float32
    first, last = (one.view(len(texts), -1) for one in jacobians)
    changes = (last - first).norm(dim=1) / first.norm(dim=1)
    torch.testing.assert_close(gradient_changes(model, end, texts), changes, rtol=1e-6, atol=1e-7)


def test_first_order_and_gradients_are_those_of_brute_force(architecture):
    model = build_tiny_model(architecture)
    check_first_order(model, moved(model), TEXTS[:3])


@pytest.mark.parametrize("tied", [True, False])
def test_those_of_a_prompted_model_too(tied):
    model = prompted(language_model(), tied=tied)
    check_first_order(model, moved(model), TEXTS[:3])


def test_frozen_parameters_take_no_part():
    model = build_tiny_model()
    end = moved(model, only="head.")
    assert list(moved_parameters(model, end)) == ["head.weight", "head.bias"]
    torch.testing.assert_close(linearised_logits(model, end, TEXTS), logits_of(end, TEXTS))
    assert gradient_changes(model, end, TEXTS).max() == 0


def test_no_model_is_changed():
    model = build_tiny_model().train()
    end = moved(model, only="head.")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    linearised_logits(model, end, TEXTS), gradient_changes(model, end, TEXTS)
    assert model.training and all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [p.requires_grad for p in end.parameters()].count(True) == 2
    assert all(p.grad is None for p in [*model.parameters(), *end.parameters()])


def test_models_of_two_kinds_are_refused():
    model = build_tiny_model()
    with pytest.raises(ValueError, match="adds none"):
        moved_parameters(model, build_tiny_model("roberta"))
    end = moved(model)
    end.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'head.weight' is frozen"):
        moved_parameters(model, end)


# networks where the answer is known


def test_a_linear_model_passes_all():
    model = build_tiny_model(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    stage = FineTune(epochs=20, learning_rate=0.3, trainable=("head.*",), **QUICK)
    found = kernel_behaviour(model, words_task(), stage, examples=5)
    assert found.holds is True and found.failed == []
    solved, recovered, fixed = found.conditions
    assert found.accuracies["linearised"] == found.accuracies["fine-tuned"] > 0.6
    assert recovered.value == 1 and fixed.value == 0 and solved.value >= 0.9
    assert repr(found).startswith("kernel behaviour") and len(found.table()) == 3
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_a_network_far_from_its_kernel_fails_the_third():
    model = build_tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.head.weight.mul_(1e-3)  # the backbone's gradients are as small
    stage = FineTune(epochs=12, learning_rate=1.0, backbone_learning_rate=0.01, **QUICK)
    found = kernel_behaviour(model, words_task(), stage, examples=5)
    assert found.holds is False and "fixed features" in found.failed
    assert found.conditions[2].value > 4 and "too far for 2" in repr(found)


def test_fine_tuning_that_learns_nothing_cannot_tell():
    model = build_tiny_model(dtype=torch.float32)
    stage = FineTune(epochs=1, learning_rate=1e-9, **QUICK)
    found = kernel_behaviour(model, words_task(), stage, examples=1)
    assert found.conditions[1].holds is None and found.holds is None
    assert repr(found).startswith("cannot tell")


@pytest.mark.parametrize("formula", ["signgd", "asymmetric_signgd"])
def test_other_kernels_have_their_own_machine(formula):
    model = build_tiny_model(dtype=torch.float32)
    fit, scores = kernel_fit(model, words_task(), formula=formula)
    assert fit.solver == {"signgd": "least_squares", "asymmetric_signgd": "asymmetric"}[formula]
    labels = torch.tensor(words_task().test["label"][:])
    assert scores.shape == (len(labels), 3)
    assert 1 / 3 < class_accuracy(scores, labels) <= 1


def test_a_prompted_model_is_tested_in_the_same_way():
    model = prompted(language_model(dtype=torch.float32))
    stage = FineTune(epochs=3, learning_rate=1e-3, **QUICK)
    found = kernel_behaviour(model, words_task(), stage, examples=3)
    assert set(found.accuracies) == {"largest class", "start", "kernel", "linearised", "fine-tuned"}
    assert all(0 <= one <= 1 for one in found.accuracies.values())


# faults


def test_wrong_requests_are_refused():
    model, task = build_tiny_model(dtype=torch.float32), words_task()
    with pytest.raises(TypeError, match="expected a Classifier"):
        kernel_behaviour(torch.nn.Linear(2, 2), task)
    with pytest.raises(TypeError, match="expected a stage that trains"):
        kernel_behaviour(model, task, LinearProbe())
    with pytest.raises(ValueError, match="the model has 2 classes"):
        kernel_behaviour(build_tiny_model(num_labels=2), task)
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="one example or more"):
            kernel_behaviour(model, task, examples=wrong)
    with pytest.raises(ValueError, match="adds none"):
        kernel_behaviour(model, task, LoRA(epochs=1, **QUICK))


def test_numbers_of_the_table_are_those_of_the_conditions():
    changes = np.array([0.5, 1.5])
    row = fixed_features(changes)
    assert (row.value, row.limit, row.holds) == (1.0, 2.0, True)
