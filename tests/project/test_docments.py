"""Every public argument says what it is; what does not yet is listed in docments.json, a debt that only shrinks."""

import json

from docments import DEBT, lowered, survey, undocumented

MODULE = """
def shown(
    first,  # (N, C) what it is
    # above: what it is
    second: "int | None" = None,
    *,
    third=(
        1,
    ),
    **rest,  # what they are
):
    inside = 1  # not an argument
    def inner(hidden): ...


def _helper(free): ...


class Public:
    def __init__(self, free): ...
    def method(self, bare, *bares): ...  # one comment for two


class _Private:
    def method(self, free): ...
"""


def test_arguments_without_a_comment_are_found():
    missing, number = undocumented(MODULE)
    assert missing == ["shown(third)"] and number == 6
    bare = MODULE.replace("  # one comment for two", "").replace("    # above: what it is\n", "")
    assert undocumented(bare)[0] == [
        "shown(second)",
        "shown(third)",
        "method(bare)",
        "method(bares)",
    ]


def test_a_debt_never_rises_and_goes_when_it_is_paid():
    found = {"a": (["f(x)"], 3), "b": ([], 2), "c": (["f(x)", "f(y)"], 2)}
    assert lowered({"a": 2, "b": 1, "c": 1, "gone": 4}, found) == {"a": 1, "c": 1}


def test_no_module_owes_more_comments_than_it_did():
    debt = json.loads(DEBT.read_text(encoding="utf-8"))
    risen = {
        name: f"{len(missing)} where {debt.get(name, 0)} are allowed: {missing}"
        for name, (missing, _) in survey().items()
        if len(missing) > debt.get(name, 0)
    }
    assert not risen, "say behind each argument what it is (shape, unit)"
