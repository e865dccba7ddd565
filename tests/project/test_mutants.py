"""The list of faults in scripts/mutants.py has not rotted; `make mutants` tries the faults themselves."""

import ast
import re

import mutants
import pytest
from repository import ROOT

TESTS = ROOT / "tests"
NAMES = [mutant.words for mutant in mutants.MUTANTS]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=NAMES)
def test_a_fault_can_be_put_in(mutant):
    assert mutants.occurrences(mutant) == 1, f"{mutant.old!r} must stand once in {mutant.file}"
    file = ROOT / "lpft_nb" / mutant.file
    source = file.read_text(encoding="utf-8")
    spoilt = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(spoilt)) != ast.dump(ast.parse(source))  # Python, and another program


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=NAMES)
def test_the_tests_that_must_catch_it_are_there(mutant):
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (TESTS / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), test


def test_every_room_has_a_fault_and_none_is_listed_twice():
    rooms = {path.parent.name for path in (ROOT / "lpft_nb").glob("*/__init__.py")}
    assert rooms <= {mutant.file.split("/")[0] for mutant in mutants.MUTANTS}
    assert len(set(NAMES)) == len(NAMES)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in mutants.MUTANTS}) == len(NAMES)


def test_a_survivor_and_a_broken_run_are_told_from_a_caught_fault(tmp_path, monkeypatch):
    "In a copy with a package of one line; pytest is played by a function."
    for folder in ("lpft_nb", "tests", "results"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    (tmp_path / "root" / "lpft_nb" / "one.py").write_text("number = 1\n")
    (tmp_path / "root" / "pyproject.toml").touch()
    monkeypatch.setattr(mutants, "ROOT", tmp_path / "root")
    tree = mutants.copy_tree(tmp_path / "copy")
    assert (tree / "results").is_symlink() and not (tree / "lpft_nb").is_symlink()

    def play(tree, tests):
        code = {"number = 2\n": 1, "number = 1.0\n": 0, "1\n": 2}
        return code[(tree / "lpft_nb" / "one.py").read_text()], "said"

    monkeypatch.setattr(mutants, "run_tests", play)
    for new, expected in {"number = 2": "caught", "number = 1.0": "survived", "1": "error"}.items():
        fault = mutants.Mutant("", "one.py", "number = 1", new, ("test_one.py::test_number",))
        assert mutants.outcome(fault, tree) == (expected, "said")
        assert (tree / "lpft_nb" / "one.py").read_text() == "number = 1\n"
    assert (tmp_path / "root" / "lpft_nb" / "one.py").read_text() == "number = 1\n"
