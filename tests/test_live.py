"""The figure with a slider: its states are the lines' points, and what cannot be drawn is refused."""

import json
import re
from html import unescape

import numpy as np
import pytest

from lpft_nb.live import live_lines

WORDS = {"xlabel": "x", "said": "x {:g}", "caption": "c", "alt": "a & b"}


def states_of(figure):
    return json.loads(unescape(re.search(r'data-live="([^"]*)"', figure)[1]))


def test_states_are_the_points_of_the_lines():
    x, first, second = [1.0, 10.0, 100.0], [0.0, 1.0, 4.0], [4.0, 2.0, 0.0]
    figure = live_lines(x, {"up": first, "down": second}, start=1, log=True, **WORDS)
    states = states_of(figure)
    assert [state["x"] for state in states] == [40, 225, 410]
    assert [state["y"] for state in states] == [[190, 20], [147.5, 105], [20, 190]]
    assert states[1]["text"] == "x 10: up 1, down 2"
    assert figure._repr_html_() == figure and 'data-start="1"' in figure
    assert 'transform="translate(225.0,0)"' in figure and "a &amp; b" in figure
    drawn = re.findall(r'<polyline class="(?:first|second)" points="([^"]*)"', figure)
    assert drawn[-2] == "40.0,190.0 225.0,147.5 410.0,20.0"


def test_the_top_of_the_axis_can_be_chosen_and_zeros_draw_a_flat_line():
    assert states_of(live_lines([0, 1], {"a": [0, 0.5]}, top=1.0, **WORDS))[1]["y"] == [105]
    assert states_of(live_lines([0, 1], {"a": [0, 0]}, **WORDS))[1]["y"] == [190]


@pytest.mark.parametrize(
    ("x", "lines", "start"),
    [
        ([0, 1], {}, 0),
        ([0, 1], {"a": [1, 2], "b": [1, 2], "c": [1, 2]}, 0),
        ([0, 1], {"a": [1, 2, 3]}, 0),
        ([1, 0], {"a": [1, 2]}, 0),
        ([0, 1], {"a": [1, np.nan]}, 0),
        ([0, 1], {"a": [1, -2]}, 0),
        ([0, 1], {"a": [1, 2]}, 2),
    ],
)
def test_refuses(x, lines, start):
    with pytest.raises(ValueError, match="expected"):
        live_lines(x, lines, start=start, **WORDS)
