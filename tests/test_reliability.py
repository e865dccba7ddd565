"""Reliability tables and diagrams: counts, exact intervals, and empty bins that stay empty."""

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from test_calibration import nature

from lpft_nb.calibration import expected_calibration_error, maximum_calibration_error, top_label
from lpft_nb.reliability import (
    confidence_histogram,
    reliability_diagram,
    reliability_pair,
    reliability_panels,
    reliability_table,
)

COLUMNS = ["low", "high", "count", "confidence", "accuracy", "accuracy_low", "accuracy_high"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_table_against_a_loop_and_scipys_intervals(bins):
    logits, labels = nature(120, 1, factor=2.0)
    confidence, correct = top_label(logits, labels)
    table = reliability_table(logits, labels, bins, level=0.9)
    assert list(table.columns) == COLUMNS and len(table) == bins and table["count"].sum() == 120
    for index, row in enumerate(table.itertuples()):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        assert (
            row.count == inside.sum()
            and row.low == pytest.approx(index / bins)
            and row.high == pytest.approx((index + 1) / bins)
        )
        if not inside.any():
            assert np.isnan(
                [row.confidence, row.accuracy, row.accuracy_low, row.accuracy_high]
            ).all()
            continue
        expected = binomtest(int(correct[inside].sum()), int(inside.sum())).proportion_ci(
            0.9, method="exact"
        )
        assert (row.confidence, row.accuracy) == pytest.approx(
            (confidence[inside].mean(), correct[inside].mean())
        )
        assert (row.accuracy_low, row.accuracy_high) == pytest.approx(
            (expected.low, expected.high), abs=1e-9
        )


def test_table_adds_up_to_the_errors():
    logits, labels = nature(300, 2, factor=3.0)
    table = reliability_table(logits, labels)
    gaps = (table["confidence"] - table["accuracy"]).abs()
    assert (gaps * table["count"]).sum() / 300 == pytest.approx(
        expected_calibration_error(logits, labels)
    )
    assert gaps.max() == pytest.approx(maximum_calibration_error(logits, labels))


def test_bins_of_right_or_wrong_answers_alone_end_at_one_and_zero():
    logits = torch.tensor([[2.0, 0.0]] * 5 + [[0.5, 0.0]] * 3)
    table = reliability_table(logits, torch.tensor([0] * 5 + [1] * 3)).dropna()
    assert table["accuracy"].tolist() == [0.0, 1.0]
    assert table["accuracy_low"].tolist() == [0.0, pytest.approx(0.025 ** (1 / 5))]
    assert table["accuracy_high"].tolist() == [pytest.approx(1 - 0.025 ** (1 / 3)), 1.0]


def test_empty_bins_are_not_drawn_and_counts_are():
    logits, labels = nature(60, 3, classes=2)
    axes = plt.subplots()[1]
    table = reliability_diagram(axes, logits, labels, bins=15)
    full = table[table["count"] > 0]
    assert 0 < len(full) < 15
    assert [bar.get_x() for bar in axes.patches] == pytest.approx(full["low"].tolist())
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(full["accuracy"].tolist())
    assert [int(text.get_text()) for text in axes.texts] == full["count"].tolist()
    points = axes.containers[-1].lines[0]
    assert points.get_xdata() == pytest.approx(full["confidence"].to_numpy())


def test_histogram_holds_shares_and_two_lines():
    logits, labels = nature(60, 4)
    axes = plt.subplots()[1]
    confidence_histogram(axes, logits, labels)
    confidence, correct = top_label(logits, labels)
    assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(
        [confidence.mean(), correct.mean()]
    )


def test_panels_have_a_column_each_and_tell_the_error():
    logits, labels = nature(80, 5, factor=3.0)
    figure = reliability_pair(logits, logits / 3, labels)
    assert len(figure.axes) == 4
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles[
        0
    ] == f"before: ECE {100 * expected_calibration_error(logits, labels):.1f} %, n = 80" and titles[
        1
    ].startswith("after")
    assert (
        len(reliability_panels(dict.fromkeys("abc", logits), dict.fromkeys("abc", labels)).axes)
        == 6
    )
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 0}, "bins"),
        ({"level": 95}, "level"),
        ({"probabilities": True}, "probabilities"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    logits, labels = nature(30, 6)
    if arguments.pop("probabilities", False):
        logits = logits.softmax(1)
    with pytest.raises(ValueError, match=message):
        reliability_table(logits, labels, **arguments)


def test_panels_need_the_same_names():
    logits, labels = nature(30, 7)
    for pair in (({"a": logits}, {"b": labels}), ({}, {})):
        with pytest.raises(ValueError, match="same names"):
            reliability_panels(*pair)
