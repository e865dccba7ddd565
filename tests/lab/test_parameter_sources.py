"""One truth, written as a cell, a file, a command line and papermill's injected cell: it comes back, or an error names it."""

import nbformat
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as some
from papermill.cli import _resolve_type
from papermill.parameterize import parameterize_notebook

from lpft_nb.command_line import requested_parameters
from lpft_nb.experiments import ParameterError
from lpft_nb.lab.notebooks import read_parameters
from lpft_nb.lab.parameters import check_parameters, parameters_of_file, parse_parameters
from lpft_nb.store.names import METHODS

DEFAULTS = {
    "Text": "a", "Name": "a", "Count": 1, "Positive": 1.0, "Seed": 0, "Share": 0.5, "Folds": 2, "Flag": True,
    "Size": "1GiB", "Method": "LP", "Pooling": "mean",
}  # fmt: skip
TRICKY = (
    "010", "0x10", "1e3", "1.5", "-0", "yes", "no", "on", "null", "~", "true", "True", "nan", "inf", ".5", "1_000", "0",
    "12:30", "2026-01-02", "a: b", "a # b", "- a", "{a", "[a", "a,b", "a, b", '"a"', "'a'", " a", "a ", "=", "<<", "!x",
    "&a", "*a", "%", "@", "`", "|", ">", "?", "é", "日本", "a\\b", "~/a", "a'b", 'a"b', "a\nb", "\t", "{FT: 1}", "[1]",
)  # fmt: skip
TEXTS = some.one_of(some.sampled_from(TRICKY), some.text(min_size=1, max_size=8)).filter(
    lambda text: text.strip() and text != "None" and not text.startswith("~") and "\0" not in text
)
VALUES = {
    "Text": TEXTS,
    "Name": TEXTS,
    "Count": some.integers(1, 10**6),
    "Positive": some.floats(1e-12, 1e12),
    "Seed": some.integers(0, 2**32 - 1),
    "Share": some.floats(1e-6, 0.999),
    "Folds": some.integers(2, 99),
    "Flag": some.booleans(),
    "Size": some.sampled_from(["1GiB", "512MB", "1000", "1.5GiB"]),
    "Method": some.sampled_from(sorted(METHODS)),
    "Pooling": some.sampled_from(["cls", "last", "mean"]),
}


@some.composite
def declarations(draw):
    "A type of the parameters cell, a default, and a true value of it."
    plain = draw(some.sampled_from(sorted(VALUES)))
    kind, default, value = plain, DEFAULTS[plain], draw(VALUES[plain])
    shape = draw(some.sampled_from(["one", "some", "by method"]))
    if shape == "some":
        distinct = some.lists(VALUES[plain], min_size=1, max_size=4, unique=True)
        kind, default, value = f"Some[{plain}]", [default], draw(distinct)
    elif shape == "by method" and plain in ("Count", "Positive"):
        keys = some.sampled_from(sorted(METHODS))
        kind, value = f"ByMethod[{plain}]", draw(some.dictionaries(keys, VALUES[plain], min_size=1))
    if draw(some.booleans()):
        kind, default = f"Maybe[{kind}]", None
        value = draw(some.one_of(some.none(), some.just(value)))
    return kind, default, value


def cell(kind, default):
    return f'other: "Text" = "kept"  # untouched\nx: "{kind}" = {default!r}  # what is tried'


# --- the writers ---------------------------------------------------------------------------------------------------


def from_cell(kind, default, value, folder):
    return check_parameters(parse_parameters(cell(kind, value)), {})


def from_file(kind, default, value, folder):
    (folder / "p.yaml").write_text(yaml.safe_dump({"x": value}, sort_keys=False), "utf-8")
    return check_parameters(
        parse_parameters(cell(kind, default)), parameters_of_file(folder / "p.yaml")
    )


def entry(value):
    "One value in a list on a command line, in quotes where it is more than a word."
    text = str(value)
    return (
        text
        if text.replace(".", "").replace("-", "").isalnum()
        else f'"{text.replace(chr(34), 2 * chr(34))}"'
    )


def on_a_command_line(value):
    "As a person would write it."
    if isinstance(value, list):
        return ",".join(map(entry, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {one}" for key, one in value.items()) + "}"
    return str(value)


def from_command_line(kind, default, value, folder):
    requested = requested_parameters([["x", on_a_command_line(value)]], None)
    return check_parameters(parse_parameters(cell(kind, default)), requested)


def injected(kind, default, value):
    "What a notebook reads after papermill has put a cell with the value behind the parameters cell."
    book = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "p", "language": "python"},
            "papermill": {},
        }
    )
    book.cells = [
        nbformat.v4.new_code_cell(
            cell(kind, default), metadata={"tags": ["parameters"], "papermill": {}}
        ),
        nbformat.v4.new_code_cell("lab = experiment(globals())", metadata={"tags": []}),
    ]
    sources = [one.source for one in parameterize_notebook(book, {"x": value}).cells]
    namespace = {}
    for source in sources[:-1]:
        exec(source, namespace)
    return read_parameters(namespace | {"In": ["", *sources]})


def from_papermill(kind, default, value, folder):
    return injected(kind, default, value)


def from_papermill_text(kind, default, value, folder):
    "`papermill -p x TEXT`, which makes numbers of what looks like one."
    return injected(kind, default, _resolve_type(on_a_command_line(value)))


WRITERS = [from_cell, from_file, from_command_line, from_papermill, from_papermill_text]


def same(found, value):
    return type(found) is type(value) and repr(found) == repr(value)


WORDS = {"true", "false", "null", "nan", "inf", "infinity"}  # of YAML and papermill


def plain(value):
    "Whether nothing in a value can be taken for anything else on a command line."
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return all(
        not isinstance(text, str)
        or (text.isascii() and text.isalpha() and text.lower() not in WORDS)
        for text in texts
    )


@pytest.mark.parametrize("write", WRITERS)
@settings(deadline=None, max_examples=150)
@given(declared=declarations())
@example(declared=("Seed", 0, 10))
@example(declared=("Some[Text]", ["a"], ["a,b", "c"]))
@example(declared=("Maybe[ByMethod[Positive]]", None, {"LP-FT": 1e-05, "FT": 2.0}))
def test_a_value_comes_back_or_is_refused_by_name(write, declared, tmp_path_factory):
    kind, default, value = declared
    try:
        found = write(kind, default, value, tmp_path_factory.getbasetemp())
    except ParameterError as error:
        assert "x=" in str(error)
        assert write not in (from_cell, from_papermill) and not plain(value)
        return
    assert found["other"] == "kept" and same(found["x"], value)
