"""A recommendation from measures made up and real, what is refused, and how the advice is judged."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from lpft_nb.advice import (
    FEWEST_TASKS,
    HeadMeasures,
    advise,
    judge_advice,
    recommend_head,
    target_energy,
)
from lpft_nb.classifier import Classifier, features_of
from lpft_nb.intervals import Interval, confidence_interval
from lpft_nb.linear_probe import cross_validate
from lpft_nb.tasks import load_task

WALK = tuple(1.0 * 0.9**epoch for epoch in range(60))
MEASURES = HeadMeasures(
    examples=100, features=384, classes=2, majority=0.5, start_energy=1.0, held_out=Interval(0.8, 0.75, 0.85),
    fitted=1.0, left=0.01, walk=WALK, learning_rate=0.3, ft_ratio=0.8,
)  # fmt: skip


def of(**changes):
    return advise(dataclasses.replace(MEASURES, **changes))


def test_a_probe_stops_where_as_much_is_left_as_it_does_not_know():
    found = advise(MEASURES)
    target = math.sqrt(2) * 0.2
    assert found.method == "LP-FT" and found.learning_rate == 0.3
    assert WALK[found.epochs] <= target < WALK[found.epochs - 1]
    assert found.smoothing * math.sqrt(1 / 2) == pytest.approx(target)
    text = repr(found)
    assert f"{found.epochs} epochs" in text and "80% right" in text and "FT ratio" in text


def test_the_nearer_the_task_the_longer_the_probe():
    lengths = [of(held_out=Interval(one, one, one)).epochs for one in (0.6, 0.7, 0.8, 0.9, 0.98)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 5


def test_a_probe_that_is_no_better_than_the_largest_class_is_left_out():
    found = of(held_out=Interval(0.6, 0.45, 0.75))
    assert (found.method, found.epochs, found.smoothing) == ("FT", 0, None)
    assert "no probe" in repr(found)
    assert of(held_out=Interval(0.6, math.nan, math.nan)).method == "LP-FT"  # one fold: the mean


def test_a_probe_that_leaves_enough_by_itself_is_not_stopped():
    found = of(left=0.5, fitted=0.7)
    assert found.method == "LP-FT" and found.epochs is None and found.smoothing is None
    assert "converged probe" in repr(found) and "70%" in repr(found)


def test_a_walk_that_is_too_short_says_so_and_more_examples_than_features_have_no_smoothing():
    assert of(walk=WALK[:3]).epochs is None and "still leave" in repr(of(walk=WALK[:3]))
    assert of(examples=386).smoothing is None and of(examples=385).smoothing is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"majority": 1.2}, "shares"),
        ({"held_out": Interval(math.nan, math.nan, math.nan)}, "shares"),
        ({"walk": ()}, "energies"),
        ({"left": 1.5}, "energies"),
        ({"start_energy": math.nan}, "energies"),
        ({"ft_ratio": math.nan}, "FT ratio"),
        ({"classes": 1}, "sizes"),
    ],
)
def test_measures_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        of(**changes)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_an_accuracy_is_a_share(wrong):
    with pytest.raises(ValueError, match="accuracy"):
        target_energy(wrong)


@pytest.fixture(scope="module")
def given(tiny_checkpoint, toy_task):
    model = Classifier.from_pretrained(tiny_checkpoint, 2, seed=0, max_length=16)
    return model, load_task(str(toy_task))


def test_measures_are_those_of_the_instruments_and_the_model_stays(given):
    model, task = given
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found = recommend_head(model, task, examples=4)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    features, labels = features_of(model, task.train), torch.tensor(task.train["label"][:])
    validation = cross_validate(features, labels, num_classes=2)
    best = validation.accuracy.mean(dim=1).argmax()
    expected = confidence_interval(validation.accuracy[best].numpy())
    measures = found.measures
    assert measures.held_out == pytest.approx(expected)
    assert (measures.examples, measures.features) == tuple(features.shape)
    chance = torch.nn.functional.linear(features, model.head.weight, model.head.bias).softmax(1)
    left = torch.nn.functional.one_hot(labels, 2) - chance
    assert measures.start_energy == pytest.approx(left.norm(dim=1).mean().item(), abs=1e-5)
    assert list(measures.walk) == sorted(measures.walk, reverse=True) and measures.ft_ratio > 0


def test_wrong_input_is_refused_before_anything_is_computed(given, tiny_checkpoint):
    model, task = given
    with pytest.raises(TypeError, match="Classifier"):
        recommend_head(model.backbone, task)
    with pytest.raises(ValueError, match="classes"):
        recommend_head(Classifier.from_pretrained(tiny_checkpoint, 3, seed=0, max_length=16), task)
    for wrong in (1, True, 2.5):
        with pytest.raises(ValueError, match="examples"):
            recommend_head(model, task, examples=wrong)


def runs(tasks, arms):
    "Accuracies of arms by task, the same for three seeds but for a shift that all arms share."
    return pd.DataFrame(
        [
            (f"t{number}", seed, arm, value + 0.01 * seed)
            for number in range(tasks)
            for seed in range(3)
            for arm, value in arms(number).items()
        ],
        columns=["task", "seed", "arm", "value"],
    )


def test_regrets_by_hand():
    table = runs(3, lambda number: {"FT": 0.7, "LP-FT": 0.7 + 0.1 * number, "short": 0.75})
    told = judge_advice(table, {"t0": "short", "t1": "FT", "t2": "LP-FT"}).set_index("policy")
    regrets = {"advice": [0, 0.1, 0], "always FT": [0.05, 0.1, 0.2], "always LP-FT": [0.05, 0, 0]}
    for policy, expected in regrets.items():
        row = told.loc[policy]
        assert row[["regret", "low", "high"]].tolist() == pytest.approx(
            list(confidence_interval(expected))
        )
        more = confidence_interval(np.subtract(expected, regrets["advice"]))
        assert row[["more", "more_low", "more_high"]].tolist() == pytest.approx(list(more))
    # elsewhere LP-FT has .85 without t0, .8 without t1 and .75 without t2, where short has .75 as well
    assert told.drop(index="advice")["verdict"].str.startswith("no claim: 3 tasks").all()


def test_a_task_does_not_choose_for_itself():
    "On each task an arm of its own wins; on the other tasks that arm is the worst, and FT is best there."
    own = lambda number: {f"own {at}": 0.9 if at == number else 0.2 for at in range(3)}
    table = runs(3, lambda number: {"FT": 0.6, "LP-FT": 0.5} | own(number))
    told = judge_advice(table, dict.fromkeys(("t0", "t1", "t2"), "LP-FT")).set_index("policy")
    assert told.loc["best on the other tasks", "regret"] == pytest.approx(0.9 - 0.6)
    assert told.loc["always FT", "more"] == pytest.approx(-0.1)


@pytest.mark.parametrize("tasks", [FEWEST_TASKS - 1, FEWEST_TASKS])
def test_ten_tasks_are_needed_for_a_verdict(tasks):
    table = runs(tasks, lambda number: {"FT": 0.6 - 0.01 * (number % 2), "LP-FT": 0.8})
    good = judge_advice(table, {f"t{number}": "LP-FT" for number in range(tasks)}).set_index(
        "policy"
    )
    bad = judge_advice(table, {f"t{number}": "FT" for number in range(tasks)}).set_index("policy")
    if tasks < FEWEST_TASKS:
        assert good.loc["always FT", "verdict"].startswith("no claim")
    else:
        assert good.loc["always FT", "verdict"] == "advice better"
        assert good.loc["always LP-FT", "verdict"] == "open"
        assert bad.loc["always LP-FT", "verdict"] == "advice worse"


@pytest.mark.parametrize(
    ("change", "advised", "message"),
    [
        (lambda table: table[table["arm"] != "FT"], {}, "FT and LP-FT"),
        (lambda table: table.iloc[1:], {}, "missing"),
        (lambda table: table, {"t0": "LoRA"}, "advised arm"),
        (lambda table: table[table["task"] == "t0"], {}, "two tasks"),
    ],
)
def test_a_table_that_judges_nothing_is_refused(change, advised, message):
    table = change(runs(3, lambda number: {"FT": 0.6, "LP-FT": 0.8}))
    with pytest.raises(ValueError, match=message):
        judge_advice(table, {"t0": "FT", "t1": "FT", "t2": "FT"} | advised)
