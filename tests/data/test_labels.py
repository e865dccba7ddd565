"""One rule for labels: what each value is, which classes there are, and what is refused by its place."""

import math
from datetime import date

import numpy
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpft_nb.data.labels import look_alikes, read_labels, whole_number, without_hidden
from lpft_nb.data.table import LabelError, Table


def read(train, test=None, defined=(), **options):
    """Names, and the integers of both splits."""
    tables = {"train": Table({"label": list(train)}, "train.csv", "line", **options)}
    if test is not None:
        tables["test"] = Table({"label": list(test)}, "test.csv", "line")
    names, found = read_labels(tables, "label", defined)
    return names, *(table.columns["label"] for table in found.values())


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (-1, -1),
        (3.0, 3),
        ("3", 3),
        (" 3 ", 3),
        ("3.0", 3),
        ("+3", 3),
        (3.5, None),
        ("3.5", None),
        ("03", None),
        ("3e0", None),
        ("three", None),
        ("", None),
        (True, None),
        (None, None),
        (math.nan, None),
        (math.inf, None),
        ("٣", None),
        ("1_000", None),
    ],
)
def test_whole_numbers(value, number):
    assert whole_number(value) == number


@pytest.mark.parametrize(
    ("train", "test", "names", "numbers"),
    [
        ([0, 1, 2], [2, 0], ("0", "1", "2"), [2, 0]),
        (["0", "1"], [1.0], ("0", "1"), [1]),
        ([1, 2, 3], ["3", "1"], ("1", "2", "3"), [2, 0]),
        (
            ["1", "2", "10"] + [str(n) for n in range(3, 10)],
            ["10"],
            tuple(map(str, range(1, 11))),
            [9],
        ),
        ([-1, 1], [1], ("-1", "1"), [1]),
        ([True, False], [True], ("False", "True"), [1]),
        ([True, False], ["True"], ("False", "True"), [1]),
        (["no", "yes"], ["yes"], ("no", "yes"), [1]),
        (["1", "2", "many"], [2], ("1", "2", "many"), [1]),
        ([1, 2.0, "many"], ["2"], ("1", "2", "many"), [1]),
        (["007", "7", "x"], ["7"], ("007", "7", "x"), [1]),
        (["US", "us", "Us"], ["us"], ("US", "Us", "us"), [2]),
        (["a ", "a"], ["a"], ("a", "a "), [0]),
        ([numpy.int64(1), numpy.int64(0)], [torch.tensor(1)], ("0", "1"), [1]),
        (["none", "one"], ["none"], ("none", "one"), [0]),
    ],
)
def test_classes_and_numbers(train, test, names, numbers):
    assert read(train, test)[0] == names
    assert read(train, test)[2] == numbers


def test_a_number_stands_for_the_same_class_whatever_the_other_files_hold():
    """A split that happens to hold digits only means the same beside a split with a name in it."""
    ratings = ["1", "2", "3", "4", "5"]
    for others in (ratings, [*ratings, "unrated"]):
        for written in (ratings, list(map(int, ratings)), list(map(float, ratings))):
            names, _, found = read(others, written)
            assert [names[number] for number in found] == ratings


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["a", None], "line 2.*missing"),
        (["a", math.nan], "line 2.*missing"),
        (["a", ""], "line 2.*empty"),
        (["a", "  "], "line 2.*empty"),
        (["a", "NA"], "'NA' is what programs write for a missing one"),
        (["1", "n/a"], "'n/a' is what programs write"),
        ([0, 1, 0.5], "line 3.*0.5 is a decimal number"),
        ([0, math.inf], "decimal"),
        ([[0, 1], [1, 0]], r"line 1.*\[0, 1\] is a list"),
        ([numpy.array([0, 1]), 0], "is a ndarray"),
        ([{"a": 1}, "b"], "is a dict"),
        ([date(2020, 1, 1), "b"], "is a date"),
        ([b"a", "b"], "is a bytes"),
        (["\ud83d", "b"], "lone surrogate"),
        ([0, 2], "must be 0, 1, ..., C-1.*found 0, 2"),
        ([2, 3], "must be"),
        ([0, 1, -1], "marked -1 have no label"),
        ([5, 1, 2, 3, 4, 55], "found 1, 2, 3, 4, 5, 55"),
        ([True, 1, 0], "true stands beside the number 1"),
        ([1.0, "2", False], "false stands beside the number 1.0"),
        (["0.5", "1.5"], "decimal numbers, such as '0.5'.*'class 0.5'"),
        (["1", "1.5e0"], "decimal numbers, such as '1.5e0'"),
        (["9" * 5000, "1"], "line 1.*more than 18 digits"),
        (["1", "9" * 400 + ".0"], "line 2.*more than 18 digits"),
        ([1, 10**400], "line 2.*more than 18 digits"),
        ([1, 10**5000], "line 2.*more than 18 digits"),
        ([1, 1e300], "line 2.*decimal"),
    ],
)
def test_what_is_no_label_is_refused_by_its_place(labels, reason):
    with pytest.raises(LabelError, match=f"train.csv.*{reason}"):
        read(labels)


def test_a_class_that_train_lacks_is_refused_with_row_and_value():
    with pytest.raises(
        LabelError, match="test.csv, line 2.*1 of 2 labels.*found 'c'.*must occur in train"
    ):
        read(["a", "b"], ["a", "c"])
    with pytest.raises(LabelError, match="found 3"):
        read([1, 2], [3, 1])


def test_a_task_that_defines_its_names_takes_names_or_positions():
    names = ("entailment", "neutral", "contradiction")
    for labels in (["neutral", "contradiction"], [1, 2], ["1", "2.0"], ["neutral", 2]):
        assert read([0, 1, 2], labels, names) == (names, [0, 1, 2], [1, 2])
    for wrong in ("Neutral", 3, -1):
        with pytest.raises(LabelError, match="or their numbers from 0"):
            read([0, 1, 2], [wrong], names)


def test_true_and_false_are_the_names_that_a_task_defines():
    assert read([True, False], ["True", 0], ("False", "True"))[1:] == ([1, 0], [1, 0])
    with pytest.raises(LabelError, match="found False, True"):
        read([True, False], defined=("no", "yes"))


def test_names_with_leading_zeros_stay_names_and_decimals_do_beside_a_name():
    assert read(["007", "08"])[0] == ("007", "08")
    assert read(["0.5", "half"])[0] == ("0.5", "half")


def test_names_of_a_class_label_keep_their_order_and_refuse_numbers():
    classes = {"class_names": {"label": ("spam", "ham")}}
    assert read(["ham", "spam"], ["ham"], **classes) == (("spam", "ham"), [1, 0], [1])
    with pytest.raises(LabelError, match="found 0"):
        read(["ham", "spam"], [0], **classes)  # position, or a name nobody gave? refused


def test_hidden_labels():
    def table(*labels):
        return Table({"label": list(labels)}, "x")

    hidden, kept = table(-1, -1), {"train": table(0, 1), "validation": table(1)}
    for test in (hidden, table("-1", "-1"), table(-1.0)):
        assert without_hidden(kept | {"test": test}, "label") == kept
    both = {"train": table(-1, 1), "test": hidden}
    assert without_hidden(both, "label") == both  # a class of train


@given(
    st.lists(st.sampled_from(["a", "b", "1", "2", "x y", "007"]), min_size=4, max_size=30),
    st.randoms(),
)
def test_order_and_split_do_not_matter(labels, random):
    shuffled = random.sample(labels, len(labels))
    try:
        names, first = read(labels)
        again, second = read(shuffled)
    except LabelError:
        with pytest.raises(LabelError):
            read(shuffled)
        return
    assert names == again
    assert [names[number] for number in first] == labels
    assert [names[number] for number in second] == shuffled


def test_names_that_look_alike():
    assert look_alikes(["US", "us", "other"]) == [["US", "us"]]
    assert look_alikes(["caf\u00e9", "cafe\u0301"]) == [["caf\u00e9", "cafe\u0301"]]
    assert look_alikes(["yes", "yes\u200b"]) == [["yes", "yes\u200b"]]
    assert look_alikes(["1", "many", "1.0", "1e0"]) == [["1", "1.0", "1e0"]]
    assert look_alikes(["a", "b", "9" * 400, "9" * 401, "1e999999999"]) == []


def test_missing_values_of_pandas_are_missing_labels():
    from lpft_nb.data.memory import read_memory

    frame = pandas.DataFrame({"text": ["a", "b"], "label": pandas.array([1, None], dtype="Int64")})
    with pytest.raises(LabelError, match="row 2.*missing"):
        read_labels(read_memory(frame), "label")
