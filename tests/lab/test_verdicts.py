"""Four words from intervals: every side, no interval, no place, faults."""

import math

import numpy as np
import pandas as pd
import pytest

from lpft_nb.intervals import Interval, confidence_interval
from lpft_nb.lab.verdicts import WORDS, against_best, judge, judge_range, judge_sign

UP, DOWN, ACROSS = Interval(2, 1, 3), Interval(-2, -3, -1), Interval(1, -1, 3)
NONE = Interval(math.nan, math.nan, math.nan)


@pytest.mark.parametrize(
    "intervals, word",
    [
        ([UP, UP], "supported"),
        ([DOWN, DOWN], "contradicted"),
        ([UP, DOWN], "open"),
        ([UP, ACROSS], "open"),  # a mean above zero is not enough
        ([DOWN, ACROSS], "open"),
        ([ACROSS], "open"),
        ([UP, NONE], "open"),
        ([Interval(2, 0, 4)], "open"),  # zero itself is on neither side
        ([], "not testable"),
    ],
)
def test_the_word_follows_from_all_intervals_and_turns_with_the_claim(intervals, word):
    places = {f"place {number}": interval for number, interval in enumerate(intervals)}
    turned = {"supported": "contradicted", "contradicted": "supported"}
    assert judge_sign(places, above=True).word == word
    assert judge_sign(places, above=False).word == turned.get(word, word)
    assert word in WORDS


def test_every_place_is_named_once_on_its_side():
    found = judge_sign({"a": UP, "b": DOWN, "c": ACROSS, "d": UP, "e": NONE}, above=True)
    assert found.places == "for: a, d; against: b; open: c, e"


@pytest.mark.parametrize(
    "low, high, word",
    [
        (1, 3, "supported"),
        (0, math.inf, "supported"),
        (1.1, 3, "open"),
        (1, 2.9, "open"),
        (1.5, 2.5, "open"),
        (3.1, 9, "contradicted"),
        (-9, 0.9, "contradicted"),
        (3, 9, "open"),  # the ends touch
    ],
)
def test_a_range_wants_the_whole_interval_inside_or_outside(low, high, word):
    assert judge_range({"a": UP}, low, high).word == word


@pytest.mark.parametrize(
    "supports, contradicts",
    [({"a": True}, {"b": False}), ({"a": True}, {}), ({"a": True}, {"a": True})],
)
def test_other_places_and_places_on_both_sides_are_refused(supports, contradicts):
    with pytest.raises(ValueError, match="places"):
        judge(supports, contradicts)


def test_the_best_other_is_chosen_by_the_mean_and_the_difference_is_paired():
    draw = np.random.default_rng(0)
    values = pd.DataFrame(draw.normal(size=(5, 4)), columns=["LP-FT", "FT", "LoRA", "LP-LoRA"])
    values["LoRA"] += 10
    values.loc[1, "LP-FT"] = values.loc[3, "LoRA"] = math.nan
    found = against_best(values)
    expected = [values.loc[seed, "LP-FT"] - values.loc[seed, "LoRA"] for seed in (0, 2, 4)]
    assert (found.name, found.pairs) == ("LoRA", 3)
    assert found.difference == pytest.approx(confidence_interval(expected))


def test_without_a_rival_or_a_pair_there_is_no_interval():
    alone = pd.DataFrame({"LP-FT": [1.0, 2.0], "FT": [math.nan, math.nan]})
    assert against_best(alone).name is None and math.isnan(against_best(alone).difference.mean)
    apart = pd.DataFrame({"LP-FT": [1.0, math.nan], "FT": [math.nan, 2.0]})
    assert against_best(apart).name == "FT" and against_best(apart).pairs == 0
    assert judge_sign({"a": against_best(apart).difference}, above=True).word == "open"


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="LP-FT"):
        against_best(pd.DataFrame({"FT": [1.0], "LoRA": [2.0]}))
