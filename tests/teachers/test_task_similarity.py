"""Measures of likeness: definitions by hand, invariances, the risk that one of them is, faults."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers_oracle import projector, randn, world

from lpft_nb.teachers.deep import deep_fine_tuned
from lpft_nb.teachers.similarity import task_alignment, task_distance
from lpft_nb.teachers.spans import risk, span_of

FEW = settings(deadline=None, max_examples=25)
close = torch.testing.assert_close


@FEW
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 300), st.floats(0, 2))
def test_distances_by_hand_and_as_a_risk(examples, dimension, seed, decay):
    inputs, spectrum, source, target = world(examples, dimension, seed, decay=decay)
    close(task_distance(source, target), torch.dist(source, target))
    weighted = (spectrum * (source - target).square()).sum().sqrt()
    close(task_distance(source, target, covariance=spectrum), weighted)
    span = span_of(inputs)
    projected = task_distance(source, target, covariance=spectrum, span=span)
    off = (target - source) - projector(inputs) @ (target - source)
    close(projected, (spectrum.sqrt() * off).norm(), atol=1e-7, rtol=1e-6)
    end = deep_fine_tuned(span, source, target, depth=1)
    close(projected.square(), risk(end, target, spectrum))
    close(task_distance(source, target, span=span), task_distance(target, source, span=span))
    assert task_distance(source, target, span=span) <= task_distance(source, target) * (1 + 1e-12)


@FEW
@given(st.integers(1, 8), st.integers(0, 300), st.floats(0.1, 9))
def test_alignment_sees_no_length_and_no_rotation(dimension, seed, factor):
    _, spectrum, source, target = world(2, dimension, seed, decay=1.0)
    turn = torch.linalg.qr(randn(dimension, dimension, seed=9)).Q
    value = task_alignment(source, target, covariance=spectrum)
    root = spectrum.sqrt()
    close(value, torch.cosine_similarity(root * source, root * target, dim=0))
    close(task_alignment(factor * source, target / factor, covariance=spectrum), value)
    close(task_alignment(-source, target, covariance=spectrum), -value)
    close(task_alignment(turn @ source, turn @ target, covariance=turn * spectrum @ turn.T), value)
    close(task_alignment(source, 2 * source, covariance=spectrum), torch.ones(()).double())


def test_what_no_test_input_shows_costs_nothing():
    source, target = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 5.0])
    assert task_distance(source, target, covariance=[1.0, 0.0]) == 0
    assert task_alignment(source, target, covariance=[1.0, 0.0]) == 1


REFUSED = {
    "a teacher of zero": (lambda: task_alignment(torch.zeros(2), randn(2)), "zero"),
    "unseen teacher": (
        lambda: task_alignment([0.0, 1.0], [1.0, 1.0], covariance=[1.0, 0.0]),
        "zero",
    ),
    "lengths": (lambda: task_distance(randn(2), randn(3)), "source"),
    "span": (lambda: task_distance(randn(3), randn(3), span=span_of(randn(1, 2))), "target"),
    "NaN": (lambda: task_distance([math.nan], [1.0]), "source"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        call()
