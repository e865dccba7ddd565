"""What makes a record old: code, versions and cells, in both directions; never comments, layout or prose."""

import json

import pytest
from toy_experiment import SCRIPT, write_toy

from lpft_nb.lab import code_in_use
from lpft_nb.lab.code_in_use import changes, code_fingerprint, code_state, file_fingerprint

SOURCE = '''"A module."

def f(x, factor=2):
    "Double."
    return factor * x  # twice


class A:
    """Text."""

    size = 3
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# twice", "# doubled"),
        ('"A module."', '"Another text."'),
        ('    "Double."\n', ""),
        ("factor * x", "(factor\n            * x)"),
        ("\n\n\nclass", "\n\n# a comment\n\nclass"),
        ('"""Text."""', '"T"'),
    ],
)
def test_words_and_layout_change_nothing(old, new):
    assert code_fingerprint(SOURCE.replace(old, new)) == code_fingerprint(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("factor * x", "x * factor"),
        ("factor=2", "factor=3"),
        ("size = 3", "size = '3'"),
        ("def f", "def g"),
    ],
)
def test_code_changes_it_in_both_directions(old, new):
    changed = SOURCE.replace(old, new)
    assert code_fingerprint(changed) != code_fingerprint(SOURCE)
    assert code_fingerprint(changed.replace(new, old)) == code_fingerprint(SOURCE)


def test_prose_of_a_notebook_changes_nothing_and_a_cell_does(tmp_path):
    path = write_toy(tmp_path)
    before = file_fingerprint(path)
    write_toy(tmp_path, prose="Other words.")
    assert file_fingerprint(path) == before
    write_toy(tmp_path, script=SCRIPT + "\n\n\nNEW = 1")
    assert file_fingerprint(path) != before
    path.unlink()
    assert file_fingerprint(path) == "gone"


def test_what_has_changed_is_named(tmp_path, monkeypatch):
    path = write_toy(tmp_path)
    module = tmp_path / "room.py"
    module.write_text(SOURCE)
    monkeypatch.setattr(code_in_use, "module_path", lambda name: module)
    state = code_state(path, ["lpft_nb.room"], {"torch": "2.12", "numpy": "2.0"})
    state = json.loads(json.dumps(state))
    assert changes(state, path, {"torch": "2.12", "numpy": "2.0"}) == []
    module.write_text(SOURCE.replace("factor * x", "factor + x"))
    write_toy(tmp_path, script=SCRIPT + "\n\n\nNEW = 1")
    assert changes(state, path, {"torch": "2.13", "scipy": "1.0"}) == [
        "code of toy.ipynb",
        "code of lpft_nb.room",
        "numpy 2.0 → absent",
        "scipy absent → 1.0",
        "torch 2.12 → 2.13",
    ]
    module.unlink()
    assert "code of lpft_nb.room" in changes(state, path, state["versions"])
