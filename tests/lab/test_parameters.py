"""Named types and the check of parameters: what is accepted, what is refused with which words, what papermill sees."""

import json

import jsonschema
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as some
from pydantic import ValidationError

from lpft_nb.lab.notebooks import list_experiments
from lpft_nb.lab.parameters import (
    ParameterError,
    check_parameters,
    declared_model,
    parameters_of_file,
    parameters_schema,
    parse_parameters,
)
from lpft_nb.store import names

EXPERIMENTS = {experiment.name: experiment for experiment in list_experiments()}


def one(kind: str, value):
    "The value of a parameter of this kind, checked."
    declared = parse_parameters(f'x: "{kind}" = None  # help')
    return check_parameters(declared, {"x": value})["x"]


# what a cell says


def parameters_cell(experiment) -> str:
    cells = json.loads(experiment.path.read_text())["cells"]
    return next(
        "".join(cell["source"])
        for cell in cells
        if "parameters" in cell["metadata"].get("tags", [])
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_parameters_cell_is_read_as_python_reads_it(name):
    source, namespace = parameters_cell(EXPERIMENTS[name]), {}
    exec(source, namespace)
    declared = EXPERIMENTS[name].parameters
    assert {key: one.default for key, one in declared.items()} == {
        key: namespace[key] for key in declared
    }
    assert {key: one.kind for key, one in declared.items()} == namespace["__annotations__"]
    assert all(0 < len(one.help) <= 60 for one in declared.values())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_papermill_sees_the_same_parameters(name):
    declared = EXPERIMENTS[name].parameters
    seen = papermill.inspect_notebook(str(EXPERIMENTS[name].path))
    assert list(seen) == list(declared)
    for key, entry in seen.items():
        assert (entry["help"], entry["inferred_type_name"]) == (
            declared[key].help,
            declared[key].kind,
        )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_defaults_pass_the_check(name):
    declared = EXPERIMENTS[name].parameters
    checked = check_parameters(declared, {}).model_dump()
    for key, parameter in declared.items():
        assert checked[key] in (parameter.default, [parameter.default]), key


OF_THEIR_OWN = {  # what a run is asked for differs: which methods there are, what a seed draws
    "methods": set(EXPERIMENTS),
    "seeds": set(EXPERIMENTS),
    "head_scale": {"head_preparation"},  # after the probe
    "penalty": {"head_preparation", "linear_teachers", "sample_size"},  # of another fit
    "poolings": {"neural_collapse"},  # of its probes alone
    "repeats": {"sample_size"},  # training sets, no folds
    "max_test": {"kernel_view"},  # of the task, not of a kernel alone
    "examples": {"kernel_view"},  # of which gradients are compared
    "epochs": {"head_preparation", "masked_readout"},  # of methods with a probe, of none
    "learning_rate": {"masked_readout"},
    "batch_size": {"masked_readout"},
    "max_length": {"masked_readout"},  # of a piece; nothing is cut
}


def test_a_name_has_one_type_and_one_help_text_in_all_experiments():
    meanings: dict = {}
    for name, experiment in EXPERIMENTS.items():
        for parameter in experiment.parameters.values():
            if name not in OF_THEIR_OWN.get(parameter.name, ()):
                meanings.setdefault(parameter.name, set()).add((parameter.kind, parameter.help))
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    "source",
    ["a = 1", 'a: "Count" = 1; print(a)', "import os", 'a: "Count"', 'a: "Count" = 1\nb, c = 2, 3'],
)
def test_other_statements_are_refused(source):
    with pytest.raises(ParameterError, match="a parameters cell holds"):
        parse_parameters(source)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Cuont", "did you mean 'Count'"),
        ("Maybe[Cuont]", "did you mean 'Count'"),
        ("int or None", "names and brackets"),
        ("Count[3]", "Count"),
        ("Maybe[", "Maybe"),
    ],
)
def test_an_unknown_type_is_named(kind, message):
    with pytest.raises(ParameterError, match=message):
        one(kind, 1)


def test_parameters_are_frozen_and_have_no_others():
    parameters = EXPERIMENTS["lp_ft"].check({})
    with pytest.raises(ValidationError):
        parameters.task = "cb"
    with pytest.raises(ValidationError):
        declared_model(EXPERIMENTS["lp_ft"].parameters)(unknown=3)
    assert parameters["task"] == parameters.task and "unknown" not in parameters


# conversion


def _by_hand(kind: str, value):
    "A second way to say what a value becomes; raises TypeError where it has not the kind at all."
    if kind.startswith("Maybe["):
        return None if value is None else _by_hand(kind[6:-1], value)
    if kind.startswith("Some["):
        if value is None or isinstance(value, (dict, str)):
            raise TypeError
        values = value if isinstance(value, list) else [value]
        found = [_by_hand(kind[5:-1], entry) for entry in values]
        if not found or len(set(found)) < len(found):
            raise ValueError
        return found
    if kind == "ByMethod[Positive]":
        if isinstance(value, dict):
            if not value.keys() <= set(names.EVERY_METHOD):
                raise ValueError
            return {key: _by_hand("Positive", entry) for key, entry in value.items()}
        return _by_hand("Positive", value)
    types = {"Count": int, "Seed": int, "Positive": (int, float), "Flag": bool, "Text": str}
    if not isinstance(value, types[kind]) or isinstance(value, bool) != (kind == "Flag"):
        raise TypeError
    allowed = {
        "Count": lambda: value > 0,
        "Seed": lambda: 0 <= value < 2**32,
        "Positive": lambda: 0 < value < float("inf"),
        "Text": lambda: value.strip(),
        "Flag": lambda: True,
    }
    if not allowed[kind]():
        raise ValueError
    return float(value) if kind == "Positive" else value


KINDS = (
    "Count",
    "Seed",
    "Positive",
    "Flag",
    "Text",
    "Maybe[Positive]",
    "Some[Count]",
    "Some[Seed]",
    "Maybe[Some[Positive]]",
    "ByMethod[Positive]",
    "Maybe[ByMethod[Positive]]",
)
SCALARS = (
    some.none()
    | some.booleans()
    | some.integers(-5, 5)
    | some.integers(2**32 - 2, 2**32 + 2)
    | some.floats(allow_nan=False)
)
KEYS = some.sampled_from(["FT", "LP-FT", "LPFT", "x"])
VALUES = SCALARS | some.lists(SCALARS, max_size=3) | some.dictionaries(KEYS, SCALARS, max_size=3)


@given(VALUES, some.sampled_from(KINDS))
def test_a_value_becomes_what_its_kind_says_or_is_refused(value, kind):
    try:
        expected = _by_hand(kind, value)
    except (TypeError, ValueError):
        with pytest.raises(ParameterError, match="x="):
            one(kind, value)
        return
    found = one(kind, value)
    assert found == expected and type(found) is type(expected)


@given(SCALARS.filter(lambda value: value is not None), some.sampled_from(KINDS))
def test_a_text_of_a_command_line_is_the_value_that_it_stands_for(value, kind):
    if kind == "Text":
        return
    try:
        expected = one(kind, value)
    except ParameterError:
        with pytest.raises(ParameterError):
            one(kind, str(value))
        return
    assert one(kind, str(value)) == expected


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("Some[Seed]", "0,1,2", [0, 1, 2]),
        ("Some[Seed]", "[0, 1]", [0, 1]),
        ("Some[Seed]", "7", [7]),
        ("Each[Method]", "LP,LP-FT", ["LP", "LP-FT"]),
        ("Maybe[ByMethod[Positive]]", "{FT: 5e-5, LP-FT: 5e-6}", {"FT": 5e-5, "LP-FT": 5e-6}),
        ("Maybe[ByMethod[Positive]]", "None", None),
        ("Maybe[Count]", "None", None),
        ("Maybe[Pooling]", "mean", "mean"),
        ("Flag", "false", False),
        ("Positive", "5e-5", 5e-5),
        ("Text", "7", "7"),
        ("Size", "2GiB", "2GiB"),
        ("Size", 1000, "1000"),
        ("Some[Text]", "'a, b', c", ["a, b", "c"]),
        ("Some[Text]", "['a, b', \"c \"]", ["a, b", "c "]),
        ("Some[Text]", '"a, b", c', ["a, b", "c"]),
        ("Some[Text]", "['a', 'b']", ["a", "b"]),
        ("Positive", ".5", 0.5),
        ("Positive", "1e3", 1000.0),
        ("Count", "10", 10),
        ("IfGiven[Text]", None, None),
        ("IfGiven[Count]", "3", 3),
    ],
)
def test_texts(kind, text, value):
    assert one(kind, text) == value


OTHERWISE = ["010", "0x10", "0o10", "0b1", "1_000", "1:30", "１０", "+-1", "1e", ""]


@pytest.mark.parametrize("text", OTHERWISE)
@pytest.mark.parametrize("kind", ["Count", "Positive", "Seed", "Some[Seed]", "Some[Count]"])
def test_a_number_is_decimal_or_refused(kind, text):
    """YAML would read some of these as eight, sixteen, ninety and a thousand."""
    for written in (text, f"[{text}]") if kind.startswith("Some") else (text,):
        with pytest.raises(ParameterError, match="x="):
            one(kind, written)
    with pytest.raises(ParameterError):
        one("ByMethod[Positive]", f"{{FT: {text or '-'}}}")


def test_a_leading_zero_is_refused_with_a_hint():
    for kind, text in (("Seed", "010"), ("Some[Seed]", "010,011"), ("Positive", "010")):
        with pytest.raises(ParameterError, match="without leading zeros, such as 10"):
            one(kind, text)


@pytest.mark.parametrize("kind", ["Name", "Folder", "Free[Folder]", "Maybe[Folder]"])
def test_the_home_folder_is_expanded_once(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert one(kind, "~/x") == str(tmp_path / "x")
    assert one(kind, one(kind, "~/x")) == str(tmp_path / "x") and one("Text", "~/x") == "~/x"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x: 010", "010"),
        ("x: 1:30", "1:30"),
        ("x: 1_000", "1_000"),
        ("x: 0x1F", "0x1F"),
        ("x: yes", "yes"),
        ("x: 2020-01-01", "2020-01-01"),
        ("x: 10", 10),
        ("x: -3", -3),
        ("x: 5e-5", 5e-5),
        ("x: 0.5", 0.5),
        ("x: 1.", 1.0),
        ("x: true", True),
        ("x: null", None),
        ("x: None", None),
        ("x: ~", None),
        ("x:", None),
        ("x: ~/runs", "~/runs"),
        ("x: {FT: 010, LP-FT: 1e-3}", {"FT": "010", "LP-FT": 1e-3}),
        ("x: [0, 010]", [0, "010"]),
    ],
)
def test_a_file_of_parameters_has_decimal_numbers(text, found, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    value = parameters_of_file(tmp_path / "p.yaml")["x"]
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x: 1\nx: 2\n", "'x' stands in it twice"),
        (b"x: {FT: 1, FT: 2}\n", "'FT' stands in it twice"),
        (b"a: 1\n# f\xfcr\n", "p.yaml, line 2: no UTF-8 text"),
        (b"x: [", "cannot read the parameter file"),
        (b"words", "expected lines of `name: value`, found str"),
        (b"x: !!python/object/apply:os.system [ls]", "cannot read the parameter file"),
        (b"x: !!int abc", "a tag \\(!\\) stands before a value.*line 1"),
        (b"x: !!float abc", "a tag"),
        (b"x: 1\ny: !!timestamp abc", "a tag.*line 2"),
        (b"x: !!str 5", "a tag"),
        (b"x: " + b"9" * 5000, "cannot read the parameter file"),
        (b"x: " + b"[" * 3000, "cannot read the parameter file"),
        (b"", "expected lines of `name: value`, found nothing"),
        (b"1: 2", "expected the names of parameters, found 1 as a name"),
    ],
)
def test_a_file_that_is_none_says_why(content, message, tmp_path):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ParameterError, match=message):
        parameters_of_file(tmp_path / "p.yaml")


def test_a_file_that_cannot_be_is_an_error():
    for path in ("~nosuchuser/p.yaml", "a\0b", "x" * 500):
        with pytest.raises(ParameterError, match="cannot read the parameter file"):
            parameters_of_file(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"cells": [{}]}', '{"cells": []}', "\0"])
def test_a_broken_notebook_among_the_experiments_is_named(content, monkeypatch, tmp_path):
    monkeypatch.setenv("LPFT_EXPERIMENTS", str(tmp_path))
    (tmp_path / "mine.ipynb").write_text(content)
    with pytest.raises(ParameterError, match=r"mine.ipynb: expected (a notebook|one cell)"):
        list_experiments()


def test_a_folder_of_experiments_that_is_none_is_an_error(monkeypatch):
    for folder in ("~nosuchuser/x", "x" * 500):
        monkeypatch.setenv("LPFT_EXPERIMENTS", folder)
        with pytest.raises(ParameterError, match="expected a folder"):
            list_experiments()


# what is refused, and with which words

WRONG = [
    ({"sed": 3}, "sed: no such parameter; did you mean 'seeds'"),
    ({"learning_rates": 1e-3}, "did you mean 'learning_rate'"),
    ({"zzz": 3}, "there are: task, protocol"),
    ({"seeds": "one"}, "expected list"),
    ({"seeds": []}, "at least one entry"),
    ({"seeds": [1, 1]}, "none twice"),
    ({"seeds": [-1]}, "numbers from 0"),
    ({"methods": ["LPFT"]}, "did you mean 'LP-FT'"),
    ({"methods": []}, "at least one entry"),
    ({"epochs": 0}, "a positive number"),
    ({"epochs": "nan"}, "expected float"),
    ({"epochs": True}, "got bool"),
    ({"epochs": None}, "expected float"),
    ({"epochs": {"TF": 3}}, "methods as keys"),
    ({"epochs": {"FT": -3}}, "a positive number"),
    ({"epochs": "{FT: 1, FT: 2}"}, "each key once .'FT' stands in it twice"),
    ({"epochs": "{FT: " + "[" * 3000}, "expected float or dict"),
    ({"epochs": 10**400}, "a number of fewer digits"),
    ({"epochs": -(10**400)}, "a number of fewer digits"),
    ({"epochs": "1" + "0" * 400}, "a positive number"),
    ({"learning_rate": "fast"}, "expected float"),
    ({"learning_rate": float("inf")}, "a positive number"),
    ({"batch_size": 2.5}, "expected int"),
    ({"max_train": 0}, "a positive number"),
    ({"max_length": None}, "expected int"),
    ({"length_grouping": 1}, "expected bool"),
    ({"device": "gpu"}, "one of auto, cpu, cuda"),
    ({"dtype": "float16"}, "one of auto, float32, bfloat16"),
    ({"pooling": "max"}, "one of cls, last, mean"),
    ({"protocol": "papers"}, "did you mean 'paper'"),
    ({"task": ""}, "some text"),
    ({"task": 7}, "expected str"),
    ({"lora_r": 0}, "a positive number"),
]
OF_OTHERS = [
    ("head_scale", {"head_scale": []}, "at least one entry"),
    ("head_scale", {"head_scale": [1, 1]}, "none twice"),
    ("head_scale", {"head_scale": [0]}, "positive numbers"),
    ("head_scale", {"head_scale": [-2.0]}, "positive numbers"),
    ("head_scale", {"head_scale": ["big"]}, "expected list"),
    ("head_scale", {"head_scale": [float("nan")]}, "positive numbers"),
    ("tangent_kernel", {"memory": "two"}, "a size such as"),
    ("tangent_kernel", {"memory": "0"}, "a size above zero"),
    ("tangent_kernel", {"solvers": ["row"]}, "did you mean 'rows'"),
    ("tangent_kernel", {"max_kernel_train": 0}, "a positive number"),
    ("tangent_kernel", {"seed": -1}, "numbers from 0"),
    ("tangent_kernel", {"max_test": "many"}, "expected int or None"),
    ("calibration", {"task": ""}, "some text"),
    ("calibration", {"methods": ["LPFT"]}, "did you mean 'LP-FT'"),
    ("calibration", {"seeds": []}, "at least one entry"),
    ("calibration", {"repairs": ["temprature"]}, "did you mean 'temperature'"),
    ("calibration", {"repairs": []}, "at least one entry"),
    ("calibration", {"bins": 0}, "a positive number"),
    ("calibration", {"bins": 2.5}, "expected int"),
    ("calibration", {"resamples": 0}, "a positive number"),
    ("calibration", {"level": 1.0}, "between 0 and 1"),
    ("calibration", {"bootstrap_seed": -1}, "from 0"),
    ("calibration", {"head_factors": [0]}, "positive numbers"),
    ("calibration", {"source": ["a", "a"]}, "none twice"),
    ("calibration", {"record": "x"}, "did you mean 'records'"),
    ("calibration", {"epochs": 3}, "no such parameter"),
]


@pytest.mark.parametrize(
    ("name", "requested", "message"),
    [("lp_ft", *case) for case in WRONG] + OF_OTHERS,
    ids=lambda value: str(value)[:30],
)
def test_wrong_parameters_are_named(name, requested, message):
    with pytest.raises(ParameterError, match=message) as raised:
        EXPERIMENTS[name].check(requested)
    (given_name,) = requested
    assert str(raised.value).startswith(given_name) and len(str(raised.value).splitlines()) == 1


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ParameterError, match=r"epochs.*sed.*task"):
        EXPERIMENTS["lp_ft"].check({"sed": 1, "epochs": -1, "task": 0})


# the schema


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_schema_takes_the_defaults_and_has_the_help(name):
    declared = EXPERIMENTS[name].parameters
    schema = parameters_schema(declared)
    jsonschema.validate(check_parameters(declared, {}).model_dump(), schema)
    assert list(schema["properties"]) == list(declared)
    for key, parameter in declared.items():
        assert schema["properties"][key]["description"] == parameter.help


@pytest.mark.parametrize(
    "wrong",
    [{"zzz": 3}, {"seeds": [-1]}, {"epochs": 0}, {"device": "gpu"}, {"methods": ["LPFT"]}],
    ids=str,
)
def test_the_schema_refuses_what_the_check_refuses(wrong):
    schema = parameters_schema(EXPERIMENTS["lp_ft"].parameters)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


# types that live with their subject


def test_solvers_and_repairs_are_those_of_their_modules():
    from lpft_nb import kernel_machines, temperature

    schemas = {
        name: parameters_schema(EXPERIMENTS[name].parameters)["properties"]
        for name in ("tangent_kernel", "calibration")
    }
    solvers = schemas["tangent_kernel"]["solvers"]["items"]["enum"]
    assert solvers == list(kernel_machines.ALL_SOLVERS)
    assert set(solvers) == {*kernel_machines.SOLVERS, "rows"}
    assert schemas["calibration"]["repairs"]["items"]["enum"] == list(temperature.REPAIRS)


def test_the_methods_are_those_of_the_stages():
    from lpft_nb import plot, stages

    schema = parameters_schema(EXPERIMENTS["lp_ft"].parameters)["properties"]
    assert schema["methods"]["items"]["enum"] == list(names.EVERY_METHOD)
    assert list(names.EVERY_METHOD) == [*names.METHODS, *names.LAYER_METHODS]
    assert stages.METHODS is names.METHODS and tuple(names.METHODS) == plot.METHODS


def test_a_list_of_names_is_a_type():
    declared = parse_parameters('x: "Some[Colour]" = ["red"]  # help', {"Colour": ("red", "blue")})
    assert check_parameters(declared, {"x": "blue"})["x"] == ["blue"]
    with pytest.raises(ParameterError, match="one of red, blue"):
        check_parameters(declared, {"x": "green"})
