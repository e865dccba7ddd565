"""Runs: what is part of a name, that published names stay, what a failed or killed run leaves."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from damage import damaged
from lpft_nb.lab import runs as lab_runs
from lpft_nb.lab.launch import differences, parameters_like, with_its_pooling
from lpft_nb.lab.notebooks import find_experiment, list_experiments
from lpft_nb.lab.parameters import ParameterError, check_parameters, parse_parameters
from lpft_nb.lab.runs import (
    Run,
    execute,
    for_method,
    load_data,
    make_each,
    placed,
    plan_table,
    requested_runs,
    run_name,
    settings_of,
    stages_of,
    training_steps,
)
from lpft_nb.records import make_record, read_record, write_record

pytestmark = pytest.mark.usefixtures("warm_kernels")

EXPERIMENTS = {experiment.name: experiment for experiment in list_experiments()}
TASK = {"name": "made-up", "fingerprint": "f" * 16, "sizes": {"train": 12}}
MODEL = {"id": "tiny", "revision": None, "sha256": None, "pooling": "cls", "max_length": 16}
PUBLISHED = [
    path for name in EXPERIMENTS for path in sorted((ROOT / "results" / name).glob("*.json"))
]


def plan_of(name: str):
    "The function `plan` of an experiment, with nothing loaded."
    namespace: dict = {}
    exec(EXPERIMENTS[name].script, namespace)
    return namespace["plan"]


def names_of(experiment: str, requested: dict) -> list[str]:
    "The names of all runs of a request, for a made-up task and model."
    parameters = EXPERIMENTS[experiment].check(requested)
    return [
        run_name(dataclasses.replace(run, experiment=experiment, task=TASK, model=MODEL).identity)
        for run in plan_of(experiment)(parameters, None)
    ]


def lp_ft(request: dict, **changes):
    "Runs, task and parameters of a request."
    experiment = find_experiment("lp_ft")
    parameters = experiment.check(request | changes)
    return *experiment.plan(parameters), parameters


# names


def test_published_records_keep_their_names():
    if not PUBLISHED:
        pytest.skip("no published results here")
    moved = []
    for path in PUBLISHED:
        record = json.loads(path.read_text())
        experiment = EXPERIMENTS[record["experiment"]]
        parameters = experiment.check(parameters_like(record, experiment.parameters))
        (run,) = plan_of(experiment.name)(parameters, None)
        facts = {"experiment": experiment.name, "task": record["task"], "model": record["model"]}
        name = run_name(dataclasses.replace(run, **facts).identity)
        if name != record["run_id"] or record["parameters"] != run.settings:
            moved.append((record["run_id"], name))
    assert len(PUBLISHED) > 100 and moved == []


def test_published_records_hold_the_metrics_that_their_experiment_promises():
    for path in PUBLISHED:
        record = json.loads(path.read_text())
        there = {row["metric"] for row in record["metrics"]}
        assert set(EXPERIMENTS[record["experiment"]].metrics) <= there, path.name


OTHER = {  # another value for each parameter, of a run of LP-LoRA, which looks at all of them
    "task": "cb", "protocol": "paper", "max_train": 7, "model": "mpnet", "pooling": "mean",
    "max_length": 7, "methods": "LoRA", "seeds": 7, "seed": 7, "epochs": 7, "learning_rate": 0.7,
    "head_learning_rate": 0.7, "batch_size": 7, "length_grouping": False, "lora_r": 7,
    "lora_alpha": 7, "dtype": "bfloat16", "output": "elsewhere", "head_scale": 7,
    "max_kernel_train": 7, "max_test": 7, "solvers": "svc", "memory": "7GiB",
    "label_column": "stars", "text_columns": "body", "separator": "tab", "folds": 7, "penalty": 7,
    "repeats": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", ["lp_ft", "head_scale", "tangent_kernel"])
def test_every_parameter_changes_the_name_unless_its_type_says_otherwise(name):
    experiment = EXPERIMENTS[name]
    base = {"methods": "LP-LoRA", "device": "cpu"} | (
        {"head_scale": 3} if name == "head_scale" else {}
    )
    before, model = names_of(name, base), type(experiment.check({}))
    for parameter in experiment.parameters:
        # cuda cannot be asked for on a machine without it; which pooling it was, the model says
        if parameter in ("device", "pooling"):
            continue
        after = names_of(name, base | {parameter: OTHER[parameter]})
        assert (after == before) == ("free" in model.scopes(parameter)), parameter


@pytest.mark.parametrize(
    "scope",
    [
        "{}",
        "OfTraining[{}]",
        "OfLoRA[{}]",
        "OfLayer[{}]",
        "OfProbe[{}]",
        "IfGiven[{}]",
        "OfProbe[IfGiven[{}]]",
        "Free[{}]",
    ],
)
def test_a_new_parameter_is_in_the_name_without_a_line_elsewhere(scope):
    cell = f"""
methods: "Each[Method]" = ["LP", "FT", "LP-LoRA", "LP-SCL-FT"]  # which
seeds: "Each[Seed]" = [0]  # which
novelty: "{scope.format("Count")}" = 1  # not known to anything
"""
    declared = parse_parameters(cell)
    settings = [requested_runs(check_parameters(declared, {"novelty": n})) for n in (1, 2)]
    differs = {
        method: one != other for (method, _, one), (_, _, other) in zip(*settings, strict=True)
    }
    looks = {
        "{}": {"LP", "FT", "LP-LoRA", "LP-SCL-FT"},
        "OfTraining[{}]": {"FT", "LP-LoRA", "LP-SCL-FT"},
        "OfLoRA[{}]": {"LP-LoRA"},
        "OfLayer[{}]": {"LP-SCL-FT"},
        "OfProbe[{}]": {"LP", "LP-LoRA", "LP-SCL-FT"},
        "IfGiven[{}]": {"LP", "FT", "LP-LoRA", "LP-SCL-FT"},
        "OfProbe[IfGiven[{}]]": {"LP", "LP-LoRA", "LP-SCL-FT"},
        "Free[{}]": set(),
    }
    assert {method for method, different in differs.items() if different} == looks[scope]


def test_a_parameter_that_is_not_given_is_in_no_name():
    cell = """
methods: "Each[Method]" = ["LP", "FT"]  # which
seeds: "Each[Seed]" = [0]  # which
"""
    before = requested_runs(check_parameters(parse_parameters(cell), {}))
    later = cell + 'novelty: "OfProbe[IfGiven[Count]]" = None  # came later\n'
    declared = parse_parameters(later)
    assert requested_runs(check_parameters(declared, {})) == before
    (probe, tuned) = requested_runs(check_parameters(declared, {"novelty": 3}))
    assert probe[2] == {"novelty": 3} and tuned[2] == {}


def test_a_name_is_the_one_that_the_record_gets(tmp_path):
    identity = {
        "experiment": "lp_ft", "method": "FT", "seed": 0, "task": TASK, "model": MODEL,
        "parameters": {"task": str(tmp_path / "here"), "output": "x", "epochs": 1.0},
    }  # fmt: skip
    assert run_name(identity) == make_record(**identity)["run_id"]
    moved = identity | {"parameters": {"task": "/elsewhere/here", "epochs": 1.0}}
    assert run_name(moved) == run_name(identity)


# settings


def test_settings_by_method():
    parameters = EXPERIMENTS["lp_ft"].check(
        {
            "methods": ["LP", "FT", "LP-FT", "LoRA", "LP-LoRA"],
            "learning_rate": {"FT": 0.1},
            "device": "cpu",
        }
    )
    used = {method: settings_of(parameters, method) for method in parameters.methods}
    own = EXPERIMENTS["lp_ft"].parameters["learning_rate"].default
    assert used["FT"]["learning_rate"] == 0.1
    assert used["LP-FT"]["learning_rate"] == own["LP-FT"]
    assert "lora_r" in used["LP-LoRA"] and "lora_r" not in used["LP-FT"]
    assert "learning_rate" not in used["LP"] and "output" not in used["LP"]
    assert used["FT"]["device"] == "cpu" and used["FT"]["dtype"] == "float32"
    names = {method: [stage.name for stage in stages_of(method, used[method])] for method in used}
    assert names == {
        "LP": ["LP"],
        "FT": ["FT"],
        "LP-FT": ["LP", "FT"],
        "LoRA": ["LoRA"],
        "LP-LoRA": ["LP", "LoRA"],
    }
    assert stages_of("FT", used["FT"])[0].learning_rate == 0.1
    assert stages_of("LoRA", used["LoRA"])[0].r == 8


def test_methods_of_one_layer_have_their_stages_in_lp_ft():
    asked = ["LayerFT", "LP-LayerFT", "SCL-FT", "LP-SCL-FT"]
    request = {"methods": asked, "learning_rate": 0.1, "batch_size": 4, "device": "cpu"}
    parameters = EXPERIMENTS["lp_ft"].check(request)
    stages = {name: stages_of(name, settings_of(parameters, name)) for name in asked}
    assert {name: [one.name for one in found] for name, found in stages.items()} == {
        "LayerFT": ["LayerFT"],
        "LP-LayerFT": ["LP", "LayerFT"],
        "SCL-FT": ["SCL-FT"],
        "LP-SCL-FT": ["skip", "LP", "SCL-FT"],
    }
    for found in stages.values():
        assert (found[-1].learning_rate, found[-1].batch_size, found[-1].layer) == (0.1, 4, "auto")
    settings = settings_of(parameters, "LP-SCL-FT") | {"layer": 2, "collapse_share": 0.1}
    skip, _, last = stages_of("LP-SCL-FT", settings)
    assert skip.layer == last.layer == 2 and last.collapse_share == 0.1


def test_a_value_by_method_that_lacks_a_method():
    check = EXPERIMENTS["lp_ft"].check
    with pytest.raises(ParameterError, match="epochs.*expected a value for LP-FT"):
        settings_of(check({"epochs": {"FT": 1}}), "LP-FT")
    assert (
        for_method(check({"head_learning_rate": {"FT": 1}}), "head_learning_rate", "LP-FT") is None
    )
    own = EXPERIMENTS["lp_ft"].parameters["batch_size"].default
    assert for_method(check({"batch_size": None}), "batch_size", "FT") == own["FT"]
    assert for_method(check({"max_train": None}), "max_train", "FT") is None


def test_one_run_for_each_combination_seed_by_seed():
    parameters = EXPERIMENTS["head_scale"].check({"seeds": "0,1", "head_scale": "1,10"})
    assert [
        (method, seed, one["head_scale"]) for method, seed, one in requested_runs(parameters)
    ] == [
        (method, seed, factor)
        for seed in (0, 1)
        for method in ("FT", "LP-FT")
        for factor in (1.0, 10.0)
    ]


def test_runs_need_methods_and_seeds():
    declared = parse_parameters('seeds: "Each[Seed]" = 0  # which')
    with pytest.raises(ParameterError, match=r"one parameter Each\[Method\]"):
        requested_runs(check_parameters(declared, {}))


# the plan


def test_planning_loads_no_weights_and_starts_no_process(small_request, tmp_path, monkeypatch):
    from lpft_nb.classifier import Classifier

    monkeypatch.setattr(
        Classifier, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    runs, task, _ = lp_ft(small_request, seeds=list(range(250)), output=str(tmp_path))
    assert len({run.name for run in runs}) == 500 and task.num_labels == 2
    assert list(tmp_path.iterdir()) == []


def test_the_plan_describes_the_model_as_loading_it_would(small_request):
    from lpft_nb.lab.runs import load_model

    (run, *_), task, parameters = lp_ft(small_request)
    model = load_model(parameters, task, seed=0)
    source = {name: model.config.source.get(name) for name in ("id", "revision", "sha256")}
    assert run.model | source == run.model
    assert run.model["parameters"] == sum(one.numel() for one in model.parameters())
    assert (run.model["pooling"], run.model["max_length"]) == (model.config.pooling, 16)


@pytest.mark.parametrize(
    ("file", "part"), [("config.json", "configuration"), ("tokenizer_config.json", "tokenizer")]
)
def test_a_model_that_changed_after_the_plan_is_refused(small_request, tmp_path, file, part):
    folder = shutil.copytree(small_request["model"], tmp_path / "model")
    runs, task, _ = lp_ft(small_request, model=str(folder), output=str(tmp_path / "runs"))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"hidden_act": "relu"}))
    with pytest.raises(ParameterError, match=f"the {part} of 'model' changed after the run was"):
        lab_runs.execute(runs[0], task)
    assert runs[0].state == "failed"
    again, _, _ = lp_ft(small_request, model=str(folder), output=str(tmp_path / "runs"))
    assert {run.name for run in runs} & {run.name for run in again} == set()


def test_a_plan_without_runs_or_with_two_of_one_name_is_refused(tmp_path):
    parameters = EXPERIMENTS["calibration"].check({"output": str(tmp_path)})
    run = Run("FT", 0, {"a": 1}, task=TASK, model=MODEL)
    options = {"experiment": "x", "parameters": parameters, "task": None}
    with pytest.raises(ParameterError, match="makes no runs"):
        placed([], **options)
    with pytest.raises(ParameterError, match="twice"):
        placed([run, run], **options)
    assert [one.path.parent for one in placed([run], **options)] == [tmp_path / "x"]


def test_a_run_without_a_task_must_bring_its_model_and_its_make(tmp_path):
    parameters = EXPERIMENTS["calibration"].check({"output": str(tmp_path)})
    options = {"experiment": "x", "parameters": parameters, "task": None}
    with pytest.raises(ParameterError, match="expected a model in each run"):
        placed([Run("FT", 0, {"a": 1}, task=TASK)], **options)
    with pytest.raises(ParameterError, match="expected a task to train on"):
        make_each(placed([Run("FT", 0, {"a": 1}, task=TASK, model=MODEL)], **options))


@pytest.mark.parametrize("change", [{"task": "no-such-task"}, {"model": "no-such-model"}], ids=str)
def test_unknown_task_or_model_is_a_parameter_error(small_request, change):
    with pytest.raises(ParameterError, match=f"{next(iter(change))}='no-such"):
        lp_ft(small_request | change)


def test_steps_are_counted_by_hand(small_request):
    request = small_request | {"methods": ["LP", "FT", "LP-FT"], "epochs": 2.5, "batch_size": 5}
    runs, _, _ = lp_ft(request)
    assert [training_steps(run) for run in runs] == [0, 8, 8]  # 12 sentences: 3 steps an epoch
    assert plan_table(runs)["stages"].tolist() == ["LP", "FT", "LP → FT"]


# making


def test_second_call_runs_nothing(finished_run, monkeypatch, capsys):
    request, _, records = finished_run
    runs, task, _ = lp_ft(request)
    assert [run.path for run in runs] == records
    monkeypatch.setattr(lab_runs, "execute", lambda *a: pytest.fail("a finished run was repeated"))
    make_each(runs, task)
    assert capsys.readouterr().out.count("already there") == 2


def test_a_probe_is_the_same_run_whatever_the_epochs(finished_run):
    runs, _, _ = lp_ft(finished_run[0], epochs=7, learning_rate=1e-3)
    assert [run.state for run in runs] == ["finished", "to run"]


def test_corrupt_or_failed_records_are_run_again(small_request, tmp_path):
    runs, _, _ = lp_ft(small_request, output=str(tmp_path))
    assert [run.state for run in runs] == ["to run", "to run"]
    runs[0].path.parent.mkdir(parents=True)
    runs[0].path.write_text('{"schema_version": 1, ')
    failed = make_record(**runs[1].identity, status="failed", error="x")
    write_record(failed, None, runs[1].path.parent)
    assert [run.state for run in runs] == ["to run", "failed"]


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_a_run_counts_as_finished_with_undamaged_record_and_arrays_only(
    finished_run, tmp_path, ending, caplog
):
    """Every file that a run leaves, damaged in every way: the run is named and made again."""
    request, _, records = finished_run
    output = Path(shutil.copytree(request["output"], tmp_path / "runs"))
    (run, *_), _, _ = lp_ft(request, output=str(output))
    assert run.state == "finished" and run.path.name == records[0].name
    for how in damaged(run.path.with_suffix(ending)):
        caplog.clear()
        assert run.state == "to run", how
        assert run.name in caplog.text or (ending, how) == (".json", "removed"), how
    assert run.state == "finished"


def test_a_failure_never_replaces_a_finished_record(finished_run, tmp_path, caplog):
    request, _, _ = finished_run
    output = Path(shutil.copytree(request["output"], tmp_path / "runs"))
    (run, *_), _, _ = lp_ft(request, output=str(output))
    before = run.path.read_bytes()
    failed = make_record(**run.identity, status="failed", error="no disk left")
    assert write_record(failed, None, run.path.parent) == run.path
    assert run.path.read_bytes() == before and "does not replace it" in caplog.text


def test_an_analysis_that_writes_another_record_is_noticed(tmp_path):
    parameters = EXPERIMENTS["calibration"].check({"output": str(tmp_path)})
    run = Run("FT", 0, {"a": 1}, make=lambda run: tmp_path / "other.json", task=TASK, model=MODEL)
    runs = placed([run], experiment="x", parameters=parameters, task=None)
    with pytest.raises(RuntimeError, match=r"written as other\.json"):
        make_each(runs)


def test_killed_run_goes_on_and_ends_the_same(small_request, tmp_path, monkeypatch, capsys):
    from lpft_nb import stages

    request = small_request | {"methods": ["LP-FT"]}
    (run,), task, _ = lp_ft(request, output=str(tmp_path))
    (whole,), _, _ = lp_ft(request, output=str(tmp_path / "whole"))
    uninterrupted = read_record(execute(whole, task))
    original = stages.FineTune.run

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages.FineTune, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(run, task)
    assert run.state == "to run"
    monkeypatch.setattr(stages.FineTune, "run", original)
    capsys.readouterr()
    again = read_record(execute(run, task))
    assert "LP: taken from the output folder" in capsys.readouterr().out
    assert differences(uninterrupted, again, tolerance=0)["equal"].all()


def test_failure_is_recorded_and_raised(small_request, tmp_path, monkeypatch):
    from lpft_nb import stages

    runs, task, _ = lp_ft(small_request, output=str(tmp_path))

    def fails(*arguments, **options):
        raise ArithmeticError("the loss is NaN at step 3")

    monkeypatch.setattr(stages, "run_stages", fails)
    with pytest.raises(ArithmeticError):
        execute(runs[1], task)
    record = read_record(runs[1].path)
    assert record["status"] == "failed"
    assert record["error"] == "ArithmeticError: the loss is NaN at step 3"


def test_repeated_run_has_no_differences(finished_run, tmp_path):
    request, _, records = finished_run
    original = read_record(records[1])
    like = parameters_like(original, EXPERIMENTS["lp_ft"].parameters)
    paths = {name: request[name] for name in ("task", "model")}
    (run,), task, _ = lp_ft(like | paths | {"output": str(tmp_path)})
    repeated = read_record(execute(run, task))
    table = differences(original, repeated, tolerance=0)
    assert repeated["run_id"] == original["run_id"] and table["equal"].all() and len(table) > 20


def test_a_repetition_names_the_pooling_where_a_default_has_changed(finished_run):
    _, _, records = finished_run
    original = read_record(records[1])
    asked = {"model": "minilm", "pooling": None}
    assert original["model"]["pooling"] == "cls"  # a BERT that states nothing
    assert with_its_pooling(asked, original)["pooling"] == "cls"  # minilm's own is the mean
    as_mean = original | {"model": original["model"] | {"pooling": "mean"}}
    assert with_its_pooling(asked, as_mean) == asked
    for named in ({"model": "minilm"}, {"model": "minilm", "pooling": "last"}):
        assert with_its_pooling(named, original) == named


# a head that is scaled before the training stage


def test_the_head_is_scaled_just_before_training(small_request, tmp_path):
    experiment = EXPERIMENTS["head_scale"]
    request = small_request | {
        "methods": ["FT", "LP-FT"],
        "head_scale": [0.5, 10],
        "output": str(tmp_path),
    }
    parameters = experiment.check(request)
    runs, task = experiment.plan(parameters)
    assert task.sizes["train"] == 12 and len({run.name for run in runs}) == 4
    assert [[stage.name for stage in run.stages] for run in runs[1:3]] == [
        ["scale", "FT"],
        ["LP", "scale", "FT"],
    ]
    assert runs[1].stages[0].factor == 10 and training_steps(runs[0]) == 1
    make_each(runs, task)
    for run in runs:
        record = read_record(run.path)
        rows = [row for row in record["metrics"] if row["split"] == "stage"]
        value = {(row["stage"], row["metric"]): row["value"] for row in rows}
        before = value["LP" if run.method == "LP-FT" else "start", "head_norm"]
        factor = run.settings["head_scale"]
        assert value["scale", "head_norm"] / before == pytest.approx(factor, rel=1e-5)
    like = parameters_like(read_record(runs[1].path), experiment.parameters)
    assert experiment.check(like)["head_scale"] == [10.0]


def test_a_probe_alone_is_no_run_of_head_scale(small_request):
    experiment = EXPERIMENTS["head_scale"]
    parameters = experiment.check(small_request | {"methods": ["LP", "FT"]})
    with pytest.raises(ParameterError, match="methods: expected FT, LP-FT"):
        list(plan_of("head_scale")(parameters, load_data(parameters)))


def test_a_pooling_that_is_asked_for_and_the_models_own_are_one_run(tmp_path):
    """None and the name of what None means give one name; another pooling is another model."""
    names = {}
    for pooling in (None, "mean", "cls"):
        asked = {"task": "docstring-kind", "max_train": 9, "methods": "LP", "pooling": pooling}
        runs, _ = EXPERIMENTS["lp_ft"].plan(EXPERIMENTS["lp_ft"].check(asked))
        names[pooling] = [run.name for run in runs]
    assert names[None] == names["mean"] != names["cls"]
