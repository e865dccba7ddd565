"""Inner products of gradients from their factors: against gradients that are written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_oracle import random_factors
from lpft_nb.kernel.contractions import (
    Workspace,
    add_by_tokens,
    add_by_writing_out,
    add_gram,
    add_inner_products,
    examples_at_once,
)
from lpft_nb.kernel.gradient_factors import Rows, Vectors, dense


def random_rows(seed, n, c, t, vocabulary, width, dead=0.2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, vocabulary, (n, t), generator=g)
    cotangent = torch.randn(n, c, t, width, generator=g, dtype=torch.float64)
    return Rows(ids, cotangent * (torch.rand(n, 1, t, 1, generator=g) > dead))


def written(pieces, shape):
    return torch.cat([dense(piece, shape).flatten(0, 1) for piece in pieces])


def check_products(left, right, shape, run):
    a = written(left, shape)
    b = a if right is None else written(right, shape)
    start = torch.randn(len(a), len(b), dtype=torch.float64)
    out = start.clone()
    run(left, right, out)
    expected = start + a @ b.T
    if right is None:
        out, expected = out.triu(), expected.triu()
    torch.testing.assert_close(out, expected)


def with_room(add, size):
    return lambda left, right, out: add(left, right, out, workspace=Workspace(size))


WAYS = {
    "tokens": with_room(add_by_tokens, 10**6),
    "token by token": with_room(add_by_tokens, 1),
    "written": with_room(add_by_writing_out, 10**6),
    "row by row": with_room(add_by_writing_out, 1),
    "cheaper": with_room(add_inner_products, 10**6),
}


@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("two_sides", [False, True])
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_matrices(run, two_sides, data):
    c, height, width = (data.draw(st.integers(1, 5)) for _ in range(3))
    sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3)
    sides = [
        [random_factors(i, n, c, t, height, width) for i, (n, t) in enumerate(data.draw(sizes))]
        for _ in range(1 + two_sides)
    ]
    check_products(sides[0], sides[1] if two_sides else None, torch.Size([height, width]), run)


@pytest.mark.parametrize("two_sides", [False, True])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_table_rows(two_sides, data):
    c, vocabulary, width = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 3)),
    )
    sizes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=2)
    sides = [
        [
            random_rows(7 * s + i, n, c, t, vocabulary, width)
            for i, (n, t) in enumerate(data.draw(sizes))
        ]
        for s in range(1 + two_sides)
    ]
    check_products(
        sides[0],
        sides[1] if two_sides else None,
        torch.Size([vocabulary, width]),
        lambda l, r, o: add_inner_products(l, r, o, workspace=None),
    )


def test_table_rows_that_never_meet_and_that_are_all_zero():
    left, right = random_rows(0, 2, 2, 3, 4, 3, dead=0), random_rows(1, 2, 2, 3, 4, 3, dead=0)
    left.ids, right.ids = (
        torch.tensor([[0, 0, 1], [1, 1, 1]]),
        torch.tensor([[2, 3, 2], [-1, -1, -1]]),
    )
    check_products(
        [left],
        [right],
        torch.Size([4, 3]),
        lambda l, r, o: add_inner_products(l, r, o, workspace=None),
    )
    empty = Rows(left.ids, torch.zeros_like(left.cotangent))
    for sides in (([empty], None), ([empty], [right]), ([left], [empty])):
        check_products(
            *sides, torch.Size([4, 3]), lambda l, r, o: add_inner_products(l, r, o, workspace=None)
        )


@pytest.mark.parametrize("rows", [1, 95, 97, 200, 333])
def test_half_a_gram_matrix(rows):
    table, out = (
        torch.randn(rows, 7, dtype=torch.float64),
        torch.zeros(rows + 2, rows + 3, dtype=torch.float64),
    )
    add_gram(table, None, out[1:-1, 1:-2])
    torch.testing.assert_close(out[1:-1, 1:-2].triu(), (table @ table.T).triu())
    assert not out[0].any() and not out[-1].any() and not out[:, 0].any() and not out[:, -2:].any()


def test_vectors():
    left = [Vectors(torch.randn(n, 2, 5, dtype=torch.float64)) for n in (3, 1)]
    for right in (None, left[:1]):
        check_products(
            left,
            right,
            torch.Size([5]),
            lambda l, r, o: add_inner_products(l, r, o, workspace=None),
        )


@pytest.mark.parametrize("two_sides", [False, True])
def test_products_through_tokens_stay_within_the_workspace(two_sides):
    left, right = (
        [random_factors(0, 60, 3, 7, 4, 5)],
        [random_factors(1, 50, 3, 9, 4, 5)] if two_sides else None,
    )
    workspace = Workspace(400_000)
    add_by_tokens(
        left,
        right,
        torch.zeros(180, 150 if two_sides else 180, dtype=torch.float64),
        workspace=workspace,
    )
    assert workspace.space.numel() * 8 == 400_000
    assert examples_at_once(left, right, workspace) == 4
    assert examples_at_once(left, right, Workspace(10**9)) == (207 if two_sides else 4)
