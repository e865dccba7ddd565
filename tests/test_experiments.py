"""Experiment notebooks: the guard, the launcher, resuming, repeating."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from conftest import ROOT, WORDS, build_backbone_config, build_tokenizer
from lpft_nb import experiments
from lpft_nb.experiments import (
    ParameterError,
    RunFailed,
    check_parameters,
    convert,
    find_experiment,
    load_experiment,
    parse_parameters,
)
from lpft_nb.records import load_arrays, make_record, read_record, write_record

NOTEBOOK = ROOT / "nbs" / "experiments" / "lp_ft.ipynb"
SMALL = {
    "methods": ["LP", "FT"],
    "seeds": [0],
    "epochs": 1,
    "max_train": None,
    "max_length": 16,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict:
    "The parameters of a run of a second: a tiny random BERT on a dozen made-up sentences, with its own cache."
    import torch
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    model = AutoModel.from_config(build_backbone_config("bert"))
    model.save_pretrained(folder / "tiny")
    build_tokenizer().save_pretrained(folder / "tiny")
    (folder / "toy").mkdir()
    rows = [
        {"text": f"{word} {other}", "label": number % 2}
        for number, (word, other) in enumerate(zip(WORDS[:24], WORDS[24:48], strict=True))
    ]
    for split, part in {"train": rows[:12], "validation": rows[12:18], "test": rows[18:]}.items():
        (folder / "toy" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    os.environ["LPFT_CACHE"] = str(folder / "cache")
    return SMALL | {"task": str(folder / "toy"), "model": str(folder / "tiny")}


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory) -> tuple[dict, Path, list[Path]]:
    "One run of the real notebook through the launcher: request, executed notebook, records."
    request = small | {"output": str(tmp_path_factory.mktemp("runs"))}
    return request, *experiments.run_experiment("lp_ft", request)


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def first_code_only(target: Path) -> Path:
    "A copy of the experiment that stops after its guard and then leaves a mark: fast, and shows whether anything ran."
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    mark = nbformat.v4.new_code_cell(
        f"open({str(target.with_suffix('.ran'))!r}, 'w').write(repr(parameters))"
    )
    notebook.cells = [*code, mark]
    nbformat.write(notebook, target)
    return target


# what a parameters cell says


def test_parameters_cell_is_read_as_python_reads_it():
    source = code_cells(NOTEBOOK)[0].source
    namespace: dict = {}
    exec(source, namespace)
    declared = parse_parameters(source)
    assert {name: parameter.default for name, parameter in declared.items()} == {
        name: namespace[name] for name in declared
    }
    assert list(declared) == list(namespace["__annotations__"])
    assert all(parameter.help for parameter in declared.values())


def test_papermill_sees_the_same_parameters():
    declared = find_experiment("lp_ft").parameters
    seen = papermill.inspect_notebook(str(NOTEBOOK))
    assert list(seen) == list(declared)
    assert {name: entry["help"] for name, entry in seen.items()} == {
        name: parameter.help for name, parameter in declared.items()
    }


def test_defaults_pass_the_check():
    declared = find_experiment("lp_ft").parameters
    assert check_parameters(declared, {}) == {
        name: parameter.default for name, parameter in declared.items()
    }


@pytest.mark.parametrize(
    "source", ["a = 1", "a: int = 1; print(a)", "import os", "a: int", "a: int = 1\nb, c = 2, 3"]
)
def test_other_statements_are_refused(source):
    with pytest.raises(ParameterError, match="a parameters cell holds"):
        parse_parameters(source)


def test_notebook_without_tag_or_with_code_before_is_refused(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for change in ("tag", "before"):
        copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
        cells = [cell for cell in copy.cells if cell.cell_type == "code"]
        if change == "tag":
            cells[0].metadata.tags = []
        else:
            copy.cells.insert(0, nbformat.v4.new_code_cell("epochs = 3"))
        nbformat.write(copy, tmp_path / f"{change}.ipynb")
        with pytest.raises(ParameterError, match="expected one cell with the tag"):
            load_experiment(tmp_path / f"{change}.ipynb")


def test_unknown_experiment_names_the_known_ones():
    with pytest.raises(ParameterError, match="lp_ft"):
        find_experiment("lpft")


# conversion and checks

KINDS = (
    "int",
    "float",
    "str",
    "bool",
    "None",
    "list[int]",
    "list[str]",
    "dict[str, float]",
    "float or dict[str, float] or None",
)
SCALARS = (
    some.none()
    | some.booleans()
    | some.integers(-5, 5)
    | some.floats(allow_nan=False)
    | some.text(max_size=5)
)
VALUES = (
    SCALARS
    | some.lists(SCALARS, max_size=3)
    | some.dictionaries(some.text(max_size=3), SCALARS, max_size=3)
)


def fits(value, kind: str) -> bool:
    "A second way to say that a value has a kind."
    plain = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}
    if kind in plain:
        return type(value) is plain[kind]
    if kind.startswith("list"):
        return type(value) is list and all(fits(entry, kind[5:-1]) for entry in value)
    if kind == "dict[str, float]":
        return type(value) is dict and all(
            type(key) is str and type(entry) is float for key, entry in value.items()
        )
    return any(fits(value, option) for option in kind.split(" or "))


@given(VALUES, some.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_conversion_gives_the_kind_or_refuses(value, kind):
    try:
        converted = convert(value, kind)
    except TypeError:
        assert not fits(value, kind)
        return
    assert fits(converted, kind)
    if fits(value, kind) and not (isinstance(value, str) and "str" not in kind):
        assert converted == value


WRONG = [
    ({"sed": 3}, "sed: no such parameter; did you mean seeds"),
    ({"learning_rates": 1e-3}, "did you mean learning_rate"),
    ({"zzz": 3}, "there are task, protocol"),
    ({"seeds": "one"}, "expected list"),
    ({"seeds": []}, "at least one entry"),
    ({"seeds": [1, 1]}, "none twice"),
    ({"seeds": [-1]}, "numbers from 0"),
    ({"methods": ["LPFT"]}, "did you mean LP-FT"),
    ({"methods": []}, "at least one entry"),
    ({"epochs": 0}, "a positive number"),
    ({"epochs": "nan"}, "a positive number"),
    ({"epochs": True}, "got bool"),
    ({"epochs": None}, "expected float"),
    ({"epochs": {"TF": 3}}, "methods as keys"),
    ({"epochs": {"FT": -3}}, "a positive number"),
    ({"learning_rate": "fast"}, "expected float"),
    ({"learning_rate": float("inf")}, "a positive number"),
    ({"batch_size": 2.5}, "expected int"),
    ({"max_train": 0}, "a positive number"),
    ({"max_length": None}, "expected int"),
    ({"length_grouping": 1}, "expected bool"),
    ({"device": "gpu"}, "one of auto, cpu, cuda"),
    ({"dtype": "float16"}, "one of auto, float32, bfloat16"),
    ({"pooling": "max"}, "one of cls, last, mean"),
    ({"protocol": "papers"}, "did you mean paper"),
    ({"task": ""}, "some text"),
    ({"task": 7}, "expected str"),
    ({"lora_r": 0}, "a positive number"),
]
WRONG_SCALES = [
    ([], "at least one entry"),
    ([1, 1], "none twice"),
    ([0], "positive numbers"),
    ([-2.0], "positive numbers"),
    (["big"], "expected list"),
    ([float("nan")], "positive numbers"),
]


@pytest.mark.parametrize(("scale", "message"), WRONG_SCALES, ids=str)
def test_wrong_head_scales_are_named(scale, message):
    with pytest.raises(ParameterError, match=message):
        check_parameters(find_experiment("head_scale").parameters, {"head_scale": scale})


@pytest.mark.parametrize(("requested", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_parameters_are_named(requested, message):
    with pytest.raises(ParameterError, match=message):
        check_parameters(find_experiment("lp_ft").parameters, requested)


@pytest.mark.parametrize(("requested", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_launcher_refuses_before_a_kernel_starts(requested, message, monkeypatch):
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *a, **k: pytest.fail("papermill was started")
    )
    with pytest.raises(ParameterError, match=message):
        experiments.run_experiment("lp_ft", requested)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ParameterError, match=r"epochs.*sed.*task"):
        check_parameters(find_experiment("lp_ft").parameters, {"sed": 1, "epochs": -1, "task": 0})


# the guard, through plain papermill


def run_papermill(notebook: Path, target: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(target),
        "-k",
        "python3",
        "--no-progress-bar",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=target.parent
    )


def test_plain_papermill_runs_with_what_it_was_given(tmp_path):
    notebook = first_code_only(tmp_path / "guard.ipynb")
    answer = run_papermill(
        notebook,
        tmp_path / "out.ipynb",
        "-p",
        "seeds",
        "0,3",
        "-p",
        "learning_rate",
        "{FT: 5e-5}",
        "-p",
        "max_train",
        "None",
    )
    assert answer.returncode == 0, answer.stderr
    assert "unknown parameter" not in answer.stderr
    used = eval(notebook.with_suffix(".ran").read_text())
    assert (used["seeds"], used["learning_rate"], used["max_train"]) == ([0, 3], {"FT": 5e-5}, None)


@pytest.mark.parametrize(
    "wrong", [("sed", "3"), ("epochs", "-1"), ("seeds", "x")], ids=lambda pair: pair[0]
)
def test_plain_papermill_stops_at_the_guard(tmp_path, wrong):
    notebook = first_code_only(tmp_path / "guard.ipynb")
    answer = run_papermill(notebook, tmp_path / "out.ipynb", "-p", *wrong)
    assert answer.returncode != 0
    assert "ParameterError" in answer.stderr and wrong[0] in answer.stderr
    assert not notebook.with_suffix(".ran").exists()


def test_guard_notices_a_lost_tag(tmp_path):
    path = first_code_only(tmp_path / "guard.ipynb")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].metadata.tags = []
    nbformat.write(notebook, path)
    answer = run_papermill(path, tmp_path / "out.ipynb", "-p", "seeds", "3")
    assert answer.returncode != 0 and "lost its tag" in answer.stderr
    assert not path.with_suffix(".ran").exists()


def test_guard_reads_a_namespace_in_use():
    cell = 'epochs: float = 1  # help\ntask: str = "a"  # help\n'
    history = [
        "",
        cell,
        "# Parameters\nepochs = 2\n",
        "read",
        "frame = 3",
        "x = 1",
        cell,
        "epochs = 4",
        "%matplotlib inline",
        "y = 2",
        "guard",
    ]
    namespace = {"In": history, "epochs": 4, "task": "a", "frame": 3, "x": 1, "y": 2}
    assert experiments.read_parameters(namespace) == {"epochs": 4.0, "task": "a"}


def test_guard_without_parameters_cell():
    with pytest.raises(ParameterError, match="run the parameters cell first"):
        experiments.read_parameters({"In": ["", "x = 1", "guard"]})


# the whole notebook


def test_run_leaves_valid_records(finished):
    request, executed, records = finished
    assert executed.exists() and executed.parent == Path(request["output"]) / "lp_ft"
    read = [read_record(path) for path in records]
    assert [(record["method"], record["seed"], record["status"]) for record in read] == [
        ("LP", 0, "finished"),
        ("FT", 0, "finished"),
    ]
    for record in read:
        assert {"test", "validation"} <= {row["split"] for row in record["metrics"]}
        arrays = load_arrays(record, request["output"])
        assert arrays[f"logits/{record['stages'][-1]['name']}/test"].shape == (6, 2)
        assert not any("train" in name for name in arrays)
        assert request["task"] not in json.dumps(record) and request["model"] not in json.dumps(
            record
        )
    assert "epochs" not in read[0]["parameters"] and read[1]["parameters"]["epochs"] == 1
    assert not (Path(request["output"]) / "checkpoints" / records[0].stem).exists()


def test_executed_notebook_has_figures_and_no_error(finished):
    cells = code_cells(finished[1])
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [
        cell
        for cell in cells
        if any("image/svg+xml" in output.get("data", {}) for output in cell.outputs)
    ]
    assert len(figures) == 4
    for cell in figures:
        assert cell.metadata.mystnb.figure.caption and cell.metadata.mystnb.image.alt


def test_kernel_is_this_python(tmp_path, monkeypatch):
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(
        json.dumps(
            {"argv": ["/bin/false", "{connection_file}"], "display_name": "x", "language": "python"}
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    from jupyter_client.kernelspec import KernelSpecManager

    with experiments.own_kernel(tmp_path / "own", tmp_path / "report"):
        assert KernelSpecManager().get_kernel_spec("python3").argv[0] == sys.executable
    assert KernelSpecManager().get_kernel_spec("python3").argv[0] == "/bin/false"
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "foreign")


def planned(request: dict, **changes):
    parameters = check_parameters(find_experiment("lp_ft").parameters, request | changes)
    task = experiments.load_data(parameters)
    return experiments.plan_runs("lp_ft", parameters, task), task, parameters


def test_second_call_runs_nothing(finished, monkeypatch, capsys):
    runs, task, parameters = planned(finished[0])
    assert [run.path for run in runs] == finished[2]
    monkeypatch.setattr(
        experiments, "execute", lambda *a: pytest.fail("a finished run was repeated")
    )
    experiments.run_all(runs, task, parameters)
    assert capsys.readouterr().out.count("already there") == 2


def test_a_probe_is_the_same_run_whatever_the_epochs(finished):
    runs, _, _ = planned(finished[0], epochs=7, learning_rate=1e-3)
    assert [run.state for run in runs] == ["finished", "to run"]


def test_corrupt_or_failed_records_are_run_again(finished, tmp_path):
    runs, _, _ = planned(finished[0], output=str(tmp_path))
    assert [run.state for run in runs] == ["to run", "to run"]
    runs[0].path.parent.mkdir(parents=True)
    runs[0].path.write_text('{"schema_version": 1, ')
    write_record(
        make_record(**runs[1].identity, status="failed", error="x"), None, runs[1].path.parent
    )
    assert [run.state for run in runs] == ["to run", "failed"]


def test_killed_run_goes_on_and_ends_the_same(finished, tmp_path, monkeypatch, capsys):
    request, _, _ = finished
    runs, task, _ = planned(request, output=str(tmp_path), methods=["LP-FT"])
    from lpft_nb import stages

    whole, _, _ = planned(request, output=str(tmp_path / "whole"), methods=["LP-FT"])
    uninterrupted = read_record(experiments.execute(whole[0], task))
    original = stages.run_training

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run_training", killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.execute(runs[0], task)
    assert runs[0].state == "to run"
    monkeypatch.setattr(stages, "run_training", original)
    capsys.readouterr()
    again = read_record(experiments.execute(runs[0], task))
    assert "LP: taken from the output folder" in capsys.readouterr().out
    assert experiments.differences(uninterrupted, again, tolerance=0)["equal"].all()


def test_failure_is_recorded_and_raised(finished, tmp_path, monkeypatch):
    runs, task, _ = planned(finished[0], output=str(tmp_path))
    from lpft_nb import stages

    def fails(*arguments, **options):
        raise ArithmeticError("the loss is NaN at step 3")

    monkeypatch.setattr(stages, "run_stages", fails)
    with pytest.raises(ArithmeticError):
        experiments.execute(runs[1], task)
    record = read_record(runs[1].path)
    assert (
        record["status"] == "failed"
        and record["error"] == "ArithmeticError: the loss is NaN at step 3"
    )


def test_settings_by_method():
    declared = find_experiment("lp_ft").parameters
    parameters = check_parameters(
        declared,
        {
            "methods": ["LP", "FT", "LP-FT", "LoRA", "LP-LoRA"],
            "learning_rate": {"FT": 0.1},
            "device": "cpu",
        },
    )
    used = {method: experiments.settings_of(parameters, method) for method in parameters["methods"]}
    assert (
        used["FT"]["learning_rate"] == 0.1
        and used["LP-FT"]["learning_rate"] == experiments.METHOD_SETTINGS["LP-FT"]["learning_rate"]
    )
    assert (
        "lora_r" in used["LP-LoRA"]
        and "lora_r" not in used["LP-FT"]
        and "learning_rate" not in used["LP"]
    )
    names = {
        method: [stage.name for stage in experiments.stages_of(method, used[method])]
        for method in used
    }
    assert names == {
        "LP": ["LP"],
        "FT": ["FT"],
        "LP-FT": ["LP", "FT"],
        "LoRA": ["LoRA"],
        "LP-LoRA": ["LP", "LoRA"],
    }
    with pytest.raises(ParameterError, match="epochs"):
        experiments.settings_of(check_parameters(declared, {"epochs": {"FT": 1}}), "LP-FT")


def test_methods_are_those_of_the_stages():
    from lpft_nb import plot, stages

    assert tuple(stages.METHODS) == plot.METHODS


@pytest.mark.parametrize(
    "change",
    [{"task": "no-such-task"}, {"model": "no-such-model"}],
    ids=lambda change: next(iter(change)),
)
def test_unknown_task_or_model_is_a_parameter_error(small, change):
    with pytest.raises(ParameterError, match=f"{next(iter(change))}='no-such"):
        planned(small | change)


# afterwards


def test_what_ran_is_compared_with_the_request(finished):
    request, _, records = finished
    wanted = check_parameters(find_experiment("lp_ft").parameters, request)
    paths = [str(path) for path in records]
    experiments.check_used("lp_ft", wanted, wanted, paths)
    for used, files, message in (
        (wanted | {"epochs": 2.0}, paths, "epochs: asked for 1.0, used 2.0"),
        (wanted, paths[:1], "FT, seed 0"),
    ):
        with pytest.raises(RunFailed, match=message):
            experiments.check_used("lp_ft", wanted, used, files)
    with pytest.raises(RunFailed, match="FT, seed 0"):
        experiments.check_used("lp_ft", wanted | {"epochs": 2.0}, wanted | {"epochs": 2.0}, paths)


def test_repeated_run_has_no_differences(finished, tmp_path):
    request, _, records = finished
    original = read_record(records[1])
    like = experiments.parameters_like(original, find_experiment("lp_ft").parameters)
    paths = {name: request[name] for name in ("task", "model")}
    (run,), task, _ = planned(like | paths | {"output": str(tmp_path)})
    repeated = read_record(experiments.execute(run, task))
    table = experiments.differences(original, repeated, tolerance=0)
    assert repeated["run_id"] == original["run_id"] and table["equal"].all() and len(table) > 20
    assert experiments.surroundings(original, repeated) == []


def test_differences_are_found(finished):
    record = read_record(finished[2][1])
    for change in (
        lambda rows: rows[0].update(value=rows[0]["value"] + 1),
        lambda rows: rows.pop(0),
        lambda rows: rows.append({**rows[0], "stage": "new"}),
    ):
        other = json.loads(json.dumps(record))
        change(other["metrics"])
        assert (~experiments.differences(record, other)["equal"]).sum() == 1
    other = {**record, "versions": {**record["versions"], "torch": "0.1"}}
    assert experiments.surroundings(record, other) == [
        f"torch: {record['versions']['torch']} then, 0.1 now"
    ]


def test_a_metric_newer_than_the_record_is_no_difference_and_a_lost_one_is(finished):
    record = read_record(finished[2][1])
    older = json.loads(json.dumps(record))
    older["metrics"] = [row for row in older["metrics"] if row["metric"] != "nll"]
    table = experiments.differences(older, record, tolerance=0)
    assert table["equal"].all() and "nll" not in set(table["metric"]) and len(table) > 20
    assert set(experiments.differences(record, older)[lambda rows: ~rows["equal"]]["metric"]) == {
        "nll"
    }


# a head that is scaled before the training stage


def test_one_run_for_each_head_scale(small, tmp_path):
    declared = find_experiment("head_scale").parameters
    request = {
        **small,
        "methods": ["FT", "LP-FT"],
        "head_scale": [0.5, 10],
        "output": str(tmp_path),
    }
    parameters = check_parameters(declared, request)
    runs, sizes = experiments.plan_experiment("head_scale", parameters)
    assert sizes["train"] == 12 and len({run.name for run in runs}) == 4
    assert [(run.method, run.settings["head_scale"]) for run in runs] == [
        ("FT", 0.5),
        ("FT", 10.0),
        ("LP-FT", 0.5),
        ("LP-FT", 10.0),
    ]
    assert [[stage.name for stage in run.stages] for run in runs[1:3]] == [
        ["scale", "FT"],
        ["LP", "scale", "FT"],
    ]
    assert runs[1].stages[0].factor == 10 and experiments.training_steps(runs[0]) == 1
    task = experiments.load_data(parameters)
    experiments.run_all(runs, task, parameters)
    paths = [str(run.path) for run in runs]
    experiments.check_used("head_scale", parameters, parameters, paths)
    with pytest.raises(RunFailed, match="'head_scale': 10.0"):
        experiments.check_used("head_scale", parameters, parameters, [paths[0], *paths[2:]])
    norms = {}
    for path in paths:
        record = read_record(path)
        value = {
            (row["stage"], row["metric"]): row["value"]
            for row in record["metrics"]
            if row["split"] == "stage"
        }
        before = value["LP" if record["method"] == "LP-FT" else "start", "head_norm"]
        norms[record["method"], record["parameters"]["head_scale"]] = (
            value["scale", "head_norm"] / before
        )
    assert norms == pytest.approx(
        {(method, factor): factor for method in ("FT", "LP-FT") for factor in (0.5, 10.0)}, rel=1e-5
    )
    like = experiments.parameters_like(read_record(paths[1]), declared)
    assert check_parameters(declared, like)["head_scale"] == [10.0]


def test_a_probe_alone_is_no_run_of_head_scale(small):
    parameters = check_parameters(
        find_experiment("head_scale").parameters, small | {"methods": ["LP", "FT"]}
    )
    with pytest.raises(ParameterError, match="methods: expected FT, LP-FT"):
        experiments.requested_runs(parameters)


def test_records_made_before_the_head_scale_keep_their_names():
    record = next(
        read_record(path) for path in sorted((ROOT / "results" / "lp_ft").glob("*-FT-*.json"))
    )
    declared = find_experiment("lp_ft").parameters
    parameters = check_parameters(declared, experiments.parameters_like(record, declared))
    (found,) = experiments.requested_runs(parameters)
    assert found == (record["method"], record["seed"], record["parameters"])
