"""Sweep files: what they say, what is refused with which words, and every published run behind those in the repository."""

import itertools

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some
from repository import ROOT
from toy_experiment import use_toy

from lpft_nb.lab.notebooks import list_experiments
from lpft_nb.lab.parameters import ParameterError
from lpft_nb.lab.sweep_file import calls_of, matches, read_sweep, sweep_schema
from lpft_nb.lab.sweep_plan import plan_sweep

SWEEPS = ROOT / "sweeps"
FILES = sorted(path for path in SWEEPS.rglob("*.yaml") if "profiles" not in path.parts)
NAMES = [path.relative_to(SWEEPS).with_suffix("").as_posix() for path in FILES]
WAITING = (
    "paper_b",
    "paper_e",
)  # grids that wait for a machine: said in the first line, file by file
FULL = ("paper_a_full", "paper_c_full")  # at the papers' size: for a GPU and a hub


@pytest.fixture
def read(tmp_path, monkeypatch):
    use_toy(tmp_path / "toys", monkeypatch)

    def one(**said):
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump({"experiment": "toy"} | said))
        return read_sweep(path)

    return one


# --- the files of the repository -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_published_run_is_found_by_its_name(path, shared_data, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LPFT_DATA", str(shared_data))
    sweep = read_sweep(path)
    try:
        own = ROOT / "results" / "grids" / path.parent.name  # other features and rates, or no task
        plan = plan_sweep(sweep, own if own.is_dir() else ROOT / "results")
    except ParameterError as error:
        pytest.skip(f"task or model are not at hand: {error}"[:100])
    missing = [job.name for job in plan.to_make]
    said = path.read_text().startswith("# NOT RUN.")
    assert path.parent.name in WAITING or said == (path.parent.name in FULL)
    assert bool(missing) == said


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_keep_to_the_schema(path):
    said = yaml.safe_load(path.read_text())
    experiment = next(one for one in list_experiments() if one.name == said["experiment"])
    schema = sweep_schema(experiment)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(said, schema)
    for wrong in ({"epoch": 3}, {"axes": {"tsk": ["cb"]}}, {"resources": {"gpus": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(said | wrong, schema)


def test_a_file_without_an_experiment_goes_by_its_name(tmp_path):
    for stem, name in (("rte_full", "lp_ft"), ("head_scale_cb", "head_scale"), ("x", "lp_ft")):
        path = tmp_path / f"{stem}.yaml"
        path.write_text("task: cb\n")
        assert read_sweep(path).experiment.name == name


# --- the grid ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(some.data())
def test_the_grid_is_every_combination_but_the_excluded(tmp_path_factory, data):
    choose = lambda values, **options: data.draw(
        some.lists(some.sampled_from(values), min_size=1, unique=True, **options)
    )
    values, methods, seeds = choose([1, 2, 3]), choose(["LP", "FT", "LoRA"]), choose([0, 1, 5])
    rates = choose([0.5, 1.0, 4.0])
    some_of = {"value": choose([1, 2, 3]), "methods": choose(["LP", "FT", "LoRA"])}
    excluded = {name: some_of[name] for name in choose(["value", "methods"])}
    said = dict(experiment="toy", value=values, methods=methods, seeds=seeds)
    said |= dict(axes={"rate": rates}, exclude=[excluded])
    folder = tmp_path_factory.getbasetemp() / "grid"
    with pytest.MonkeyPatch.context() as patch:
        use_toy(folder, patch)
        path = folder / "grid.yaml"
        path.write_text(yaml.safe_dump(said))
        expected = [
            dict(rate=rate, seeds=[seed], methods=[method], value=[value])
            for rate, seed, method, value in itertools.product(rates, seeds, methods, values)
            if not (
                value in excluded.get("value", [value])
                and method in excluded.get("methods", [method])
            )
        ]
        if not expected:
            with pytest.raises(ParameterError, match="every run is excluded"):
                calls_of(read_sweep(path))
            return
        assert [call.requested for call in calls_of(read_sweep(path))] == expected


def test_later_overrides_go_over_earlier_ones(read):
    sweep = read(
        value=[1, 2],
        methods=["LP", "FT"],
        override=[
            {"when": {"value": 2}, "set": {"rate": 3.0}},
            {"when": {"value": 2, "methods": "FT"}, "set": {"rate": 4.0}},
        ],
    )
    rates = {
        (call.requested["value"][0], call.requested["methods"][0]): call.requested.get("rate")
        for call in calls_of(sweep)
    }
    assert rates == {(1, "LP"): None, (1, "FT"): None, (2, "LP"): 3.0, (2, "FT"): 4.0}


def test_a_condition_looks_at_defaults_too():
    default = {"rate": 1.0}.get
    assert matches({}, {"rate": 1.0}, default) and not matches({}, {"rate": 2.0}, default)
    assert matches({"seeds": [3]}, {"seeds": [3, 4]}, default)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"experiment": "toys"}, "did you mean 'toy'"),
        ({"experiment": 3}, "expected the name of one"),
        ({"vlaue": 1}, "did you mean 'value'"),
        ({"axis": {"value": [1]}}, "did you mean 'axes'"),
        ({"axes": {"vlaue": [1]}}, "did you mean 'value'"),
        ({"axes": {"rate": 1.0}}, "rate: expected a list of values"),
        ({"axes": {"rate": []}}, "rate: expected a list of values"),
        ({"axes": {"rate": [1.0, "fast"]}}, "rate='fast': expected float"),
        ({"axes": {"rate": [-1]}}, "expected a positive number"),
        ({"axes": [1]}, "axes: expected lines of"),
        ({"rate": 1.0, "axes": {"rate": [1.0]}}, "given twice: rate"),
        ({"output": "there"}, "name it with --output"),
        ({"exclude": {"value": 1}}, "exclude: expected a list"),
        ({"exclude": [{"vlaue": 1}]}, "did you mean 'value'"),
        ({"exclude": [{}]}, "expected e.g."),
        ({"override": [{"when": {"value": 1}}]}, "override: set=.*Field required"),
        ({"override": [{"if": {"value": 1}, "set": {"rate": 2.0}}]}, "no 'if' here"),
        ({"override": [{"when": {"value": 1}, "set": {"rate": "x"}}]}, "rate='x'"),
        ({"resources": {"gpus": 1}}, "did you mean 'gpu'"),
        ({"resources": {"memory": "much"}}, "resources: memory='much'"),
        ({"resources": {"cpu": 0}}, "resources: cpu=0"),
        ({"tune": {"values": {"rate": [1.0]}}}, "tune: seeds=.*Field required"),
        ({"tune": {"values": {"rat": [1.0]}, "seeds": [7]}}, "did you mean 'rate'"),
        ({"tune": {"values": {"rate": [0]}, "seeds": [7]}}, "expected a positive number"),
    ],
)
def test_wrong_files_are_refused_with_words(read, said, message):
    with pytest.raises(ParameterError, match=message):
        read(**said)
