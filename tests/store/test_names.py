"""Names: a known one comes back, any other raises with what was probably meant."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb import plot
from lpft_nb import stages as stages_face
from lpft_nb.store.names import (
    EVERY_METHOD,
    LAYER_METHODS,
    METHODS,
    close_names,
    did_you_mean,
    one_of,
)

KNOWN = ["LP", "FT", "LP-FT", "LoRA"]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.text(max_size=8), unique=True, max_size=6), st.text(max_size=8))
def test_a_known_name_comes_back_and_no_other(known, name):
    for one in known:
        assert one_of(one, known, "thing") == one
    if name not in known:
        with pytest.raises(ValueError, match="unknown thing") as caught:
            one_of(name, known, "thing")
        assert repr(name) in str(caught.value)
    assert set(close_names(name, known)) <= set(known)


@pytest.mark.parametrize(
    ("name", "meant"), [("LPFT", "LP-FT"), ("ft", "FT"), ("lora", "LoRA"), ("LP_FT", "LP-FT")]
)
def test_the_name_that_was_meant_comes_first(name, meant):
    assert close_names(name, KNOWN)[0] == meant
    assert did_you_mean(name, KNOWN).startswith(f"did you mean {meant!r}")


def test_without_a_close_name_all_are_listed():
    assert did_you_mean("svm", KNOWN) == "there are: LP, FT, LP-FT, LoRA"
    assert did_you_mean("svm", []) == "there is none"


@pytest.mark.parametrize("wrong", [None, 3, ["FT"], ("FT",), b"FT"])
def test_what_is_no_text_is_shown_as_it_came(wrong):
    with pytest.raises(KeyError) as caught:
        one_of(wrong, KNOWN, "method", KeyError)
    assert repr(wrong) in str(caught.value)


def test_methods_are_named_once():
    assert list(METHODS) == ["LP", "FT", "LP-FT", "LoRA", "LP-LoRA"]
    assert all(tuple(name.split("-")) == stages for name, stages in METHODS.items())
    assert tuple(METHODS) == plot.METHODS and stages_face.METHODS is METHODS


def test_methods_of_one_layer_stand_apart():
    assert list(LAYER_METHODS) == ["LayerFT", "LP-LayerFT", "SCL-FT", "LP-SCL-FT"]
    assert list(EVERY_METHOD) == [*METHODS, *LAYER_METHODS]
    for name, stages in LAYER_METHODS.items():
        assert name.endswith(stages[-1]) and ("LP" in stages) == name.startswith("LP-")
