"""Metrics: scikit-learn and torchmetrics as oracles, invariances, and input that must be refused."""

import logging

import numpy as np
import pytest
import scipy.special
import torch
import torchmetrics.functional.classification as torchmetrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from lpft_nb.metrics import (
    check_logits,
    classification_metrics,
    confusion_matrix,
    looks_like_probabilities,
    matthews,
    warn_once,
)

FEW = settings(deadline=None, max_examples=40)


def sample(examples, classes, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(examples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (examples,), generator=generator)


@st.composite
def judged(draw):
    "Logits without ties and labels; classes may be missing from the labels."
    classes, examples = draw(st.integers(2, 5)), draw(st.integers(1, 30))
    logits, labels = sample(examples, classes, draw(st.integers(0, 10_000)))
    return logits, labels % draw(st.integers(1, classes))


@pytest.mark.parametrize(
    ("examples", "classes", "seed"), [(200, 2, 0), (200, 3, 1), (57, 5, 2), (8, 4, 3)]
)
def test_equals_sklearn(examples, classes, seed):
    logits, labels = sample(examples, classes, seed)
    ours, guess = classification_metrics(logits, labels, extra=("matthews",)), logits.argmax(1)
    assert ours["accuracy"] == pytest.approx(
        sklearn_metrics.accuracy_score(labels, guess), abs=1e-12
    )
    if len(labels.unique()) == classes:
        assert ours["balanced_accuracy"] == pytest.approx(
            sklearn_metrics.balanced_accuracy_score(labels, guess), abs=1e-12
        )
    assert ours["macro_f1"] == pytest.approx(
        sklearn_metrics.f1_score(labels, guess, average="macro"), abs=1e-12
    )
    assert ours["matthews"] == pytest.approx(
        sklearn_metrics.matthews_corrcoef(labels, guess), abs=1e-12
    )
    loss = sklearn_metrics.log_loss(labels, logits.softmax(1), labels=range(classes))
    assert ours["nll"] == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (4, 1)])
def test_equals_torchmetrics(classes, seed):
    logits, labels = sample(300, classes, seed)
    ours = classification_metrics(
        logits, labels, extra=("matthews", "f1") if classes == 2 else ("matthews",)
    )
    expected = {
        "accuracy": torchmetrics.multiclass_accuracy(logits, labels, classes, average="micro"),
        "balanced_accuracy": torchmetrics.multiclass_accuracy(
            logits, labels, classes, average="macro"
        ),
        "macro_f1": torchmetrics.multiclass_f1_score(logits, labels, classes, average="macro"),
        "matthews": torchmetrics.multiclass_matthews_corrcoef(logits, labels, classes),
    }
    if classes == 2:
        expected["f1"] = torchmetrics.binary_f1_score(logits.argmax(1), labels)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value.item(), abs=1e-6), name


def test_brute_force_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    ours = classification_metrics(logits, torch.tensor([0, 1, 1, 1]), extra=("f1", "matthews"))
    assert ours["accuracy"] == 0.75
    assert ours["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert ours["f1"] == pytest.approx(0.8)  # precision 1, recall 2/3
    assert ours["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert ours["matthews"] == pytest.approx(2 / np.sqrt(2 * 3 * 1 * 2))
    margins = [2.0, 1.0, -1.0, 3.0]
    assert ours["nll"] == pytest.approx(
        np.mean([np.log1p(np.exp(-margin)) for margin in margins]), abs=1e-7
    )
    counts = {"count_0": 1, "count_1": 3, "predicted_0": 2, "predicted_1": 2}
    assert {name: ours[name] for name in counts} == counts
    assert all(type(value) is float for value in ours.values())


@FEW
@given(judged())
def test_missing_classes_follow_sklearn(case):
    logits, labels = case
    assume(len(logits) > 1)
    ours, guess = classification_metrics(logits, labels), logits.argmax(1)
    recalls = sklearn_metrics.recall_score(
        labels, guess, average=None, labels=labels.unique(), zero_division=0
    )
    assert ours["balanced_accuracy"] == pytest.approx(recalls.mean(), abs=1e-12)
    present = np.union1d(labels, guess)
    expected = sklearn_metrics.f1_score(
        labels, guess, average="macro", labels=present, zero_division=0
    )
    assert ours["macro_f1"] == pytest.approx(expected, abs=1e-12)


@FEW
@given(judged(), st.randoms(use_true_random=False))
def test_renaming_classes_changes_nothing(case, random):
    logits, labels = case
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    names = torch.tensor(order).argsort()
    plain = classification_metrics(logits, labels, extra=("matthews",))
    renamed = classification_metrics(logits[:, order], names[labels], extra=("matthews",))
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "nll", "matthews"):
        assert renamed[name] == pytest.approx(plain[name], abs=1e-10), name
    assert [renamed[f"count_{k}"] for k in range(len(order))] == [
        plain[f"count_{k}"] for k in order
    ]


@FEW
@given(judged(), st.floats(-50, 50))
def test_a_constant_in_each_row_changes_nothing(case, constant):
    logits, labels = case
    shift = constant * torch.linspace(-1, 1, len(logits), dtype=torch.float64)[:, None]
    plain, shifted = (
        classification_metrics(logits, labels),
        classification_metrics(logits + shift, labels),
    )
    assert shifted == pytest.approx(plain, abs=1e-9)


@FEW
@given(judged())
def test_ranges_counts_and_order_of_rows(case):
    logits, labels = case
    ours = classification_metrics(logits, labels, extra=("matthews",))
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert 0 <= ours[name] <= 1, name
    assert -1 - 1e-12 <= ours["matthews"] <= 1 + 1e-12
    assert ours["nll"] >= 0
    classes = range(logits.shape[1])
    assert (
        sum(ours[f"count_{k}"] for k in classes)
        == sum(ours[f"predicted_{k}"] for k in classes)
        == len(labels)
    )
    assert classification_metrics(
        logits.flip(0), labels.flip(0), extra=("matthews",)
    ) == pytest.approx(ours, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_run_in_float64(dtype):
    logits, labels = sample(500, 3, 4)
    stored = logits.to(dtype)
    ours = classification_metrics(stored, labels)
    assert ours["nll"] == pytest.approx(
        sklearn_metrics.log_loss(labels, stored.double().softmax(1)), abs=1e-12
    )


def test_large_logits_do_not_overflow():
    logits, labels = sample(20, 3, 5, spread=1e5)
    rows = logits.numpy()
    expected = (scipy.special.logsumexp(rows, axis=1) - rows[range(20), labels]).mean()
    assert 1e4 < expected == pytest.approx(classification_metrics(logits, labels)["nll"], rel=1e-12)


def test_accepts_arrays_and_tensors_that_need_gradients():
    logits, labels = sample(20, 3, 6)
    expected = classification_metrics(logits, labels)
    assert classification_metrics(logits.numpy(), labels.numpy().astype(np.int32)) == expected
    assert classification_metrics(logits.clone().requires_grad_(), labels) == expected


def test_ties_go_to_the_lowest_class():
    ours = classification_metrics(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    assert (ours["predicted_0"], ours["accuracy"]) == (4, 0.5)
    assert ours["nll"] == pytest.approx(np.log(3))


def test_constant_labels_or_predictions_have_no_correlation():
    labels = torch.tensor([0, 1, 1])
    assert matthews(confusion_matrix(torch.zeros(3, dtype=torch.long), labels, 2)) == 0
    assert matthews(confusion_matrix(labels, torch.zeros(3, dtype=torch.long), 2)) == 0


def test_a_missing_class_is_reported_once(caplog):
    warn_once.cache_clear()
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="lpft_nb"):
        for _ in range(3):
            ours = classification_metrics(logits, torch.tensor([0, 0, 1, 1, 0]))
    assert len(caplog.records) == 1 and "[2]" in caplog.text
    assert ours["count_2"] == 0


GOOD, LABELS = sample(6, 3, 7)
REFUSED = {
    "probabilities": (GOOD.softmax(1), LABELS, "look like probabilities"),
    "bfloat16 probabilities": (GOOD.softmax(1).bfloat16(), LABELS, "look like probabilities"),
    "two decimals": ((GOOD.softmax(1) * 100).round() / 100, LABELS, "look like probabilities"),
    "percents": (100 * GOOD.softmax(1), LABELS, "look like probabilities"),
    "whole percents": ((100 * GOOD.softmax(1)).round(), LABELS, "look like probabilities"),
    "votes": (torch.tensor([[3, 4, 0], [7, 0, 0], [2, 2, 3]] * 2), LABELS, "look like prob"),
    "one-hot": (torch.eye(3)[LABELS], LABELS, "look like probabilities"),
    "integer one-hot": (torch.eye(3)[LABELS].long(), LABELS, "look like probabilities"),
    "NaN": (
        GOOD.clone().index_fill_(0, torch.tensor([2]), torch.nan),
        LABELS,
        r"NaN.*1 of 6 rows, first \[2\]",
    ),
    "infinity": (GOOD.clone().index_fill_(0, torch.tensor([2]), torch.inf), LABELS, "infinity"),
    "one class": (GOOD[:, :1], LABELS * 0, "at least two classes"),
    "empty": (GOOD[:0], LABELS[:0], "empty"),
    "one dimension": (GOOD[0], LABELS, r"shape \(N, C\)"),
    "label too large": (GOOD, torch.full((6,), 3), r"0\.\.2.*\[3\]"),
    "ignored label": (GOOD, torch.tensor([0, 1, 2, -100, 0, 1]), r"\[-100\]"),
    "float labels": (GOOD, LABELS.double(), "must be integers"),
    "boolean labels": (GOOD, LABELS > 0, "must be integers"),
    "column of labels": (GOOD, LABELS[:, None], r"shape \(6,\)"),
    "too few labels": (GOOD, LABELS[:5], r"shape \(6,\)"),
}


def test_many_classes_in_two_decimals_are_probabilities():
    "Rounding each of 77 numbers moves their sum by far more than one percent."
    generator = torch.Generator().manual_seed(0)
    rounded = (torch.randn(50, 77, generator=generator).softmax(1) * 100).round() / 100
    assert (rounded.sum(1) - 1).abs().max() > 0.01
    assert looks_like_probabilities(rounded) and looks_like_probabilities(100 * rounded)


@pytest.mark.parametrize(
    "logits",
    [
        5 * torch.eye(3),
        torch.tensor([[1.0, 3.0], [2.0, 2.0]]),
        torch.tensor([[3.0, 1.0], [2.0, 2.0], [4.0, 1.0]]),
        torch.tensor([[0.2, 0.5], [0.1, 0.7], [0.6, 0.6]]),
        torch.tensor([[60.0, 30.0], [55.0, 61.0], [50.0, 49.0]]),
        torch.tensor([[-0.1, 1.1], [0.5, 0.5], [0.2, 0.8]]),
    ],
)
def test_logits_that_only_remind_of_probabilities_pass(logits):
    assert not looks_like_probabilities(logits)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    logits, labels, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        classification_metrics(logits, labels)


def test_log_probabilities_and_single_odd_rows_pass():
    check_logits(GOOD.log_softmax(1), LABELS)
    check_logits(
        torch.tensor([[2.0, -1.0], [-0.5, 1.5]]), torch.tensor([0, 1])
    )  # rows sum to 1, but not nonnegative
    mixed = torch.cat([GOOD, GOOD[:1].softmax(1)])
    logits, labels = check_logits(mixed, torch.cat([LABELS, LABELS[:1]]))
    assert logits.dtype == torch.float64 and labels.dtype == torch.int64


def test_extra_metrics_are_checked():
    with pytest.raises(ValueError, match="unknown metric 'mathews': did you mean 'matthews'"):
        classification_metrics(GOOD, LABELS, extra=("mathews",))
    with pytest.raises(ValueError, match="use macro_f1"):
        classification_metrics(GOOD, LABELS, extra=("f1",))


PROBABILITIES = torch.tensor(
    [[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.05, 0.05, 0.9]], dtype=torch.float64
)


@pytest.mark.parametrize(
    "disguise",
    [
        lambda p: p,
        lambda p: p.float(),
        lambda p: p - 1e-9,
        lambda p: (100 * p).round(),
        lambda p: (100 * p)[:1].round(),
        lambda p: (100 * p)[:2].round(),
        lambda p: 100 * p,
        lambda p: 1000 * p,
        lambda p: 255 * p,
        lambda p: (10 * p).round() / 10,
        lambda p: torch.tensor([[4.0, 1.0, 0.0], [0.0, 5.0, 0.0], [2.0, 2.0, 1.0]]),
        lambda p: torch.full((5, 20), 0.05).round(decimals=1) + torch.eye(5, 20).mul(0.8),
    ],
)
def test_probabilities_are_known_in_every_disguise(disguise):
    logits = disguise(PROBABILITIES)
    with pytest.raises(ValueError, match="look like probabilities"):
        check_logits(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize(
    "logits",
    [
        10 * torch.eye(3),
        torch.full((4, 3), 2.0),
        torch.tensor([[49.3, 51.2]]),
        torch.tensor([[0.9, 1.2], [3.0, 0.1], [2.0, 2.0]]),
        PROBABILITIES.log(),
    ],
)
def test_logits_are_no_probabilities(logits):
    check_logits(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(3, 2, dtype=torch.complex64),
        torch.ones(3, 2) > 0,
        np.ma.masked_array(np.ones((3, 2)), mask=np.eye(3, 2)),
    ],
)
def test_what_is_no_real_number_is_refused(logits):
    with pytest.raises(ValueError, match=r"must be real numbers|masked"):
        check_logits(logits, [0, 1, 0])


def test_unsigned_labels_are_integers_too():
    labels = torch.tensor([0, 1, 1], dtype=torch.uint64)
    assert check_logits(torch.randn(3, 2), labels)[1].tolist() == [0, 1, 1]
