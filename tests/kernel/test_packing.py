"""How many examples and parts a room holds, and how much arithmetic that is."""

import pytest
import torch

from lpft_nb.kernel.gradient_factors import Factors, Vectors
from lpft_nb.kernel.packing import block_sizes, gram_flops, held_bytes, packed
from lpft_nb.kernel.plan import Part, Probe

PARTS = [
    Part(["head"], token_bytes=0, example_bytes=40, reserve=0),
    Part(["dense"], token_bytes=10, example_bytes=0, reserve=0),
    Part(["norm"], token_bytes=0, example_bytes=5, reserve=0),
    Part(["words"], token_bytes=3, example_bytes=7, reserve=0),
]


def probe_of(pieces):
    "A probe of two examples, four tokens long."
    return Probe(
        rules={},
        reasons={},
        parts=[],
        pieces=pieces,
        tokens=4,
        graph_bytes_per_token=0,
        seconds_per_token=0,
    )


def test_a_part_weighs_its_tokens_and_its_examples():
    assert held_bytes(PARTS[3], torch.tensor([2, 5, 1])) == 3 * 8 + 7 * 3


@pytest.mark.parametrize("room", [80, 100, 130, 200, 1000])
@pytest.mark.parametrize("sides", [1, 2])
def test_passes_keep_the_order_are_never_overfull_and_could_not_take_the_next_part(room, sides):
    lengths = [torch.tensor([3, 1])] * sides
    room *= sides
    passes = packed(PARTS, lengths, room)
    sizes = [sum(held_bytes(part, side) for side in lengths) for part in PARTS]
    weight = {part.names[0]: size for part, size in zip(PARTS, sizes)}
    assert [part for one_pass in passes for part in one_pass] == PARTS
    for one_pass, following in zip(passes, passes[1:] + [None]):
        held = sum(weight[part.names[0]] for part in one_pass)
        assert held <= room
        if following is not None:
            assert held + weight[following[0].names[0]] > room


@pytest.mark.parametrize(
    "room, expected",
    [
        (10**6, [8]),
        (8 * 40, [8]),  # everything at once, in one block
        (8 * 40 - 1, [2]),  # not quite: halves are held two at a time, and four and four do not fit
        (4 * 40, [2]),
        (2 * 40, [1]),
        (2 * 40 - 1, []),  # not even one example a side
    ],
)
def test_blocks_of_one_side_are_halved_until_two_of_them_fit(room, expected):
    lengths = [torch.ones(8, dtype=torch.long)]
    assert block_sizes(PARTS[:1], lengths, room) == expected


def test_blocks_of_two_sides_are_halved_together_and_the_longest_examples_count():
    lengths = [torch.tensor([1, 9, 1, 1]), torch.tensor([2, 2])]
    assert block_sizes(PARTS[1:2], lengths, 160) == [4, 2]
    assert block_sizes(PARTS[1:2], lengths, 159) == [2, 1]
    assert block_sizes(PARTS[1:2], lengths, 119) == [1, 1]
    assert block_sizes(PARTS[1:2], lengths, 109) == []


def test_the_arithmetic_of_vectors_is_counted_exactly():
    probed = probe_of({"bias": Vectors(torch.empty(2, 3, 5, device="meta"))})
    seven, four = torch.full((7,), 4), torch.full((4,), 4)
    assert gram_flops(probed, [seven]) == 7 * 7 * 3**2 * 5
    assert gram_flops(probed, [seven, four]) == 2 * 7 * 4 * 3**2 * 5


def test_the_arithmetic_of_a_matrix_is_that_of_its_cheaper_way_at_the_mean_length():
    from lpft_nb.kernel.contractions import flops_by_tokens, flops_by_writing_out

    found = Factors(torch.empty(2, 4, 6, device="meta"), torch.empty(2, 3, 4, 5, device="meta"))
    at_mean = [Factors(torch.empty(3, 8, 6), torch.empty(3, 3, 8, 5))]
    expected = min(flops_by_tokens(at_mean, None), flops_by_writing_out(at_mean, None))
    assert gram_flops(probe_of({"w": found}), [torch.tensor([7, 8, 9])]) == expected
