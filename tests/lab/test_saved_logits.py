"""Calibration in records and from saved logits: judged against plain Python, from the right split, never a plausible number."""

import json
import math
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.optimize import minimize_scalar

from conftest import ROOT
from lpft_nb import experiments
from lpft_nb.calibration import calibration_metrics
from lpft_nb.training.calibration_rows import calibration_rows, fit_or_reason
from lpft_nb.lab.head_norm import at_head_norm, head_scale_table
from lpft_nb.lab.saved_logits import find_sources, judge, last_logits, saved_calibration
from lpft_nb.experiments import ParameterError, RunFailed, find_experiment
from lpft_nb.records import RecordError, load_results, make_record, read_record, write_record

pytestmark = pytest.mark.usefixtures("warm_kernels")

SPLITS = {"validation": 60, "test": 90, "ood/other": 40}
QUICK = {"task": "made-up", "methods": ["FT", "LP-FT"], "seeds": [0, 1], "resamples": 20}


def made_up(seed: int, factor: float = 3.0, classes: int = 3) -> tuple[dict, dict]:
    "Logits that are `factor` times too large, and labels, by split."
    generator = torch.Generator().manual_seed(seed)
    logits, labels = {}, {}
    for split, examples in SPLITS.items():
        honest = 1.5 * torch.randn(examples, classes, generator=generator)
        labels[split] = torch.multinomial(honest.softmax(dim=1), 1, generator=generator).squeeze(1)
        logits[split] = factor * honest
    return logits, labels


def write_run(
    folder: Path, method: str, seed: int, labels=None, experiment="lp_ft", **parameters
) -> dict:
    "A finished run's record with logits, as `lp_ft` leaves it, from before calibration was part of it."
    logits, own_labels = made_up(100 * seed + len(method))
    labels = own_labels | (labels or {})
    task = {"name": "made-up", "fingerprint": "f" * 16, "sizes": {"train": 10, **SPLITS}}
    model = {"id": "tiny", "revision": None, "sha256": None, "pooling": "cls", "max_length": 16}
    accuracy = {
        split: (logits[split].argmax(1) == labels[split]).double().mean().item() for split in SPLITS
    }
    metrics = [
        {"stage": "FT", "split": split, "metric": "accuracy", "value": value}
        for split, value in accuracy.items()
    ]
    metrics += [
        {"stage": "FT", "split": "stage", "metric": "head_norm", "value": 2.0},
        {"stage": "FT", "split": "test", "metric": "feature_change", "value": 1.0},
    ]
    record = make_record(
        experiment=experiment,
        method=method,
        seed=seed,
        parameters={"task": "made-up", "epochs": 1.0} | parameters,
        task=task,
        model=model,
        stages=[{"name": "FT"}],
        metrics=metrics,
    )
    arrays = {f"logits/FT/{split}": logits[split] for split in SPLITS} | {
        f"labels/{split}": labels[split] for split in SPLITS
    }
    path = write_record(
        record,
        arrays,
        folder / experiment,
        {name: "example" for name in arrays if name.startswith("labels/")},
    )
    return read_record(path)


@pytest.fixture
def records(tmp_path) -> Path:
    folder = tmp_path / "records"
    for method in ("FT", "LP-FT"):
        for seed in (0, 1):
            write_run(folder, method, seed)
    return folder


def parameters_for(records: Path, output: Path, **changes):
    request = QUICK | {"records": str(records), "output": str(output)} | changes
    return find_experiment("calibration").check(request)


def plan(parameters) -> list:
    "The runs of the experiment, with the names of their records."
    return find_experiment("calibration").plan(parameters)[0]


# what a stage's end records


def plain_ece(logits, labels, bins=15) -> float:
    "ECE with (lo, hi] bins, example by example."
    held = [[] for _ in range(bins)]
    for row, label in zip(np.asarray(logits, dtype=np.float64), np.asarray(labels), strict=True):
        odds = np.exp(row - row.max())
        confidence = (odds / odds.sum()).max()
        held[min(bins - 1, math.ceil(confidence * bins) - 1)].append(
            (confidence, row.argmax() == label)
        )
    return sum(abs(sum(confidence - right for confidence, right in one)) for one in held) / len(
        labels
    )


@given(some.integers(0, 1000), some.floats(0.3, 5))
@settings(max_examples=15, deadline=None)
def test_rows_agree_with_plain_python_and_an_independent_minimiser(seed, factor):
    logits, labels = made_up(seed, factor)
    rows, reason = calibration_rows(
        "FT", {"train": logits["test"], **logits}, {"train": labels["test"], **labels}
    )
    value = {(row["split"], row["metric"]): row["value"] for row in rows}
    assert reason == "" and all(row["stage"] == "FT" for row in rows)
    nll = lambda log: torch.nn.functional.cross_entropy(
        logits["validation"].double() / math.exp(log), labels["validation"]
    ).item()
    best = minimize_scalar(nll, bounds=(-5, 5), method="bounded", options={"xatol": 1e-10})
    assert value["validation", "temperature"] == pytest.approx(math.exp(best.x), rel=1e-4)
    for split in ("test", "ood/other"):
        assert value[split, "ece"] == pytest.approx(
            plain_ece(logits[split], labels[split]), abs=1e-9
        )
        scaled = logits[split].double() / value["validation", "temperature"]
        assert value[split, "ece_after_temperature"] == pytest.approx(
            plain_ece(scaled, labels[split]), abs=1e-9
        )
        assert value[split, "nll_after_temperature"] == pytest.approx(
            torch.nn.functional.cross_entropy(scaled, labels[split]).item(), rel=1e-12
        )


def test_each_number_comes_from_a_split_that_may_say_it():
    logits, labels = made_up(0)
    rows = pd.DataFrame(
        calibration_rows(
            "FT", {"train": logits["test"], **logits}, {"train": labels["test"], **labels}
        )[0]
    )
    after = rows["metric"].str.endswith("_after_temperature")
    assert set(rows["split"]) == {"validation", "test", "ood/other"} and set(
        rows[after]["split"]
    ) == {"test", "ood/other"}
    assert not rows.duplicated(["split", "metric"]).any()
    assert "nll" not in set(rows["metric"])  # `classification_metrics` writes it
    assert {name.removesuffix("_after_temperature") for name in rows[after]["metric"]} == {
        *rows[~after & (rows["split"] == "test")]["metric"],
        "nll",
    }


def unusable(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    "Validation logits and labels on which no temperature can be fitted."
    logits, labels = made_up(0)
    logits, labels = logits["validation"], labels["validation"]
    onehot = torch.nn.functional.one_hot(labels, 3)
    return {
        "one class": (logits, torch.ones_like(labels)),
        "separable": (logits + 100 * onehot, labels),
        "against the labels": (logits - 100 * onehot, labels),
        "constant": (torch.full_like(logits, 2.0), labels),
    }[kind]


@pytest.mark.parametrize("kind", ["one class", "separable", "against the labels", "constant"])
def test_without_a_temperature_there_is_a_reason_and_no_number(kind, recwarn):
    logits, labels = made_up(0)
    given, truth = unusable(kind)
    scaling, reason = fit_or_reason(given, truth)
    assert scaling is None and len(reason) > 20 and "returned" not in reason
    rows, said = calibration_rows(
        "FT", logits | {"validation": given}, labels | {"validation": truth}
    )
    assert said == reason and len(recwarn) == 0
    for row in rows:
        if row["metric"] != "confidence_auroc":  # empty where every answer is right
            assert math.isnan(row["value"]) == ("temperature" in row["metric"]), row
    assert len(rows) == len(calibration_rows("FT", logits, labels)[0])


def test_other_errors_are_not_taken_for_a_reason():
    logits, labels = made_up(0)
    with pytest.raises(ValueError, match="NaN"):
        fit_or_reason(logits["validation"] * math.nan, labels["validation"])
    with pytest.raises(ValueError, match="probabilities"):
        fit_or_reason(logits["validation"].softmax(dim=1), labels["validation"])


# which records


def test_sources_are_one_record_for_each_method_and_seed(records, tmp_path):
    found = find_sources(parameters_for(records, tmp_path))
    assert [(record["method"], record["seed"]) for record in found] == [
        ("FT", 0),
        ("LP-FT", 0),
        ("FT", 1),
        ("LP-FT", 1),
    ]


def test_missing_ambiguous_and_foreign_sources_are_refused(records, tmp_path):
    def refused(message, **changes):
        with pytest.raises(ParameterError, match=message):
            find_sources(parameters_for(records, tmp_path, **changes))

    refused("no finished run of FT with seed 5", seeds=[5])
    refused("no finished run of LoRA with seed 0", methods=["LoRA"])
    refused("runs of: made-up", task="another")
    refused("has the name lp_ft-x", source=["lp_ft-x"])
    with pytest.raises(ParameterError, match="expected a folder"):
        find_sources(parameters_for(tmp_path / "nowhere", tmp_path))
    other = write_run(records, "FT", 0, learning_rate=0.5)
    refused("several runs of one method and seed", methods=["FT"], seeds=[0])
    (chosen,) = find_sources(
        parameters_for(records, tmp_path, methods=["FT"], seeds=[0], source=[other["run_id"]])
    )
    assert chosen["parameters"]["learning_rate"] == 0.5


def test_a_scaled_head_is_judged_by_name_only(records, tmp_path):
    scaled = write_run(records, "FT", 0, experiment="head_scale", head_scale=10.0)
    assert (
        find_sources(parameters_for(records, tmp_path, methods=["FT"], seeds=[0]))[0]["experiment"]
        == "lp_ft"
    )
    (chosen,) = find_sources(
        parameters_for(records, tmp_path, methods=["FT"], seeds=[0], source=[scaled["run_id"]])
    )
    assert chosen["run_id"] == scaled["run_id"]


def test_failed_runs_and_runs_without_logits_do_not_count(tmp_path):
    folder = tmp_path / "records"
    record = write_run(folder, "FT", 0)
    write_record(record, None, folder / "lp_ft")
    with pytest.raises(ParameterError, match="no finished run with logits"):
        find_sources(parameters_for(folder, tmp_path))


def test_a_record_whose_logits_are_lost_is_an_error(records, tmp_path):
    run = plan(parameters_for(records, tmp_path))[0]
    (records / "lp_ft" / f"{run.settings['source'][0]}.safetensors").unlink()
    with pytest.raises(RecordError, match="missing"):
        judge(run, folder=records)


# judging


def test_rows_of_a_judged_run(records, tmp_path):
    parameters = parameters_for(records, tmp_path / "out")
    run = plan(parameters)[0]
    record = read_record(judge(run, folder=records))
    assert (
        record["run_id"] == run.name
        and record["experiment"] == "calibration"
        and record["parameters"]["source"] == run.settings["source"]
    )
    value = {(row["split"], row["metric"]): row["value"] for row in record["metrics"]}
    assert len(value) == len(record["metrics"])
    source = read_record(next(records.rglob(f"{run.settings['source'][0]}.json")))
    stage, logits, labels = last_logits(source, records)
    for split in SPLITS:
        for name, number in calibration_metrics(logits[split], labels[split]).items():
            assert value[split, name] == pytest.approx(number, rel=1e-12)
            assert {f"{name}_low", f"{name}_high"} <= {
                metric for where, metric in value if where == split
            }
    assert value["test", "accuracy"] == next(
        row["value"]
        for row in source["metrics"]
        if (row["metric"], row["split"]) == ("accuracy", "test")
    )
    for repair in parameters.repairs:
        scaling, reason = fit_or_reason(logits["validation"], labels["validation"], repair)
        assert reason == "" and record["stages"] == [
            {"name": "FT", "not_fitted": dict.fromkeys(parameters.repairs, "")}
        ]
        after = calibration_metrics(scaling.apply(logits["ood/other"]), labels["ood/other"])
        assert value["ood/other", f"ece_after_{repair}"] == pytest.approx(after["ece"], rel=1e-12)
        assert ("validation", f"ece_after_{repair}") not in value
    assert value["test", "accuracy_after_temperature"] == value["test", "accuracy"]
    for factor in parameters.head_factors:
        assert value["test", f"ece_head_times_{factor:g}"] == pytest.approx(
            calibration_metrics(factor * logits["test"], labels["test"])["ece"], rel=1e-12
        )
    assert value["stage", "head_norm"] == 2.0 and value["test", "feature_change"] == 1.0


def test_scaling_the_head_is_the_temperature(records, tmp_path):
    logits, labels = made_up(3)
    scaling, _ = fit_or_reason(logits["validation"], labels["validation"])
    by_head = calibration_metrics(
        logits["test"].double() * (1 / scaling.temperature), labels["test"]
    )
    by_temperature = calibration_metrics(scaling.apply(logits["test"].double()), labels["test"])
    assert by_head == pytest.approx(by_temperature, rel=1e-9, nan_ok=True)


def test_the_same_analysis_has_the_same_name_and_numbers_anywhere(records, tmp_path):
    first, second = (plan(parameters_for(records, tmp_path / name))[0] for name in ("a", "b"))
    assert first.name == second.name
    one, two = (read_record(judge(run, folder=records)) for run in (first, second))
    assert one["metrics"] == two["metrics"]
    other = plan(parameters_for(records, tmp_path / "a", bins=10))[0]
    assert other.name != first.name


def test_a_run_without_a_temperature_is_recorded_and_not_averaged(tmp_path):
    folder = tmp_path / "records"
    for seed, labels in (
        (0, None),
        (1, {"validation": torch.zeros(SPLITS["validation"], dtype=torch.int64)}),
    ):
        write_run(folder, "FT", seed, labels)
    runs = plan(parameters_for(folder, tmp_path / "out", methods=["FT"]))
    reasons = [read_record(judge(run, folder=folder))["stages"][0]["not_fitted"] for run in runs]
    assert set(reasons[0].values()) == {""} and "one class" in reasons[1]["temperature"]
    frame = load_results(tmp_path / "out")
    assert (
        frame[(frame["seed"] == 1) & frame["metric"].str.contains("after_temperature")]["value"]
        .isna()
        .all()
    )
    assert (
        frame[(frame["seed"] == 0) & (frame["metric"] == "ece_after_temperature")]["value"]
        .notna()
        .all()
    )
    saved = saved_calibration(folder)
    assert list(saved.attrs["no_temperature"].values()) == [reasons[1]["temperature"]]


def test_saved_logits_of_records_older_than_the_rows(records):
    frame = saved_calibration(records, tasks=["made-up"], splits=("test",))
    assert frame["run_id"].nunique() == 4 and set(frame[frame["metric"] == "ece"]["split"]) == {
        "test",
        "validation",
    }
    source = next(
        record
        for record in map(read_record, sorted(records.rglob("*.json")))
        if record["method"] == "FT" and record["seed"] == 0
    )
    _, logits, labels = last_logits(source, records)
    mine = frame[(frame["run_id"] == source["run_id"]) & (frame["split"] == "test")].set_index(
        "metric"
    )["value"]
    assert mine["ece"] == pytest.approx(
        calibration_metrics(logits["test"], labels["test"])["ece"], rel=1e-12
    )
    assert saved_calibration(records, tasks=["other"]).empty


def test_published_records_can_be_judged():
    results = ROOT / "results" / "lp_ft"
    if not results.is_dir():
        pytest.skip("no published results here")
    for run in plan(find_experiment("calibration").check({"records": str(ROOT / "results")})):
        source = read_record(results / f"{run.settings['source'][0]}.json")
        assert {"validation", "test"} <= set(last_logits(source, results)[1])


# a metric against the head norm


def scaled_rows(method: str, factor: float, seed: int, norm: float, value: float) -> list[dict]:
    shared = {
        "run_id": f"{method}-{factor}-{seed}",
        "method": method,
        "seed": seed,
        "parameters": json.dumps({"head_scale": factor}),
    }
    return [
        shared
        | {
            "stage": "scale",
            "split": "stage",
            "metric": "head_norm",
            "value": norm,
            "final": False,
        },
        shared
        | {"stage": "FT", "split": "stage", "metric": "head_norm", "value": 99.0, "final": True},
        shared | {"stage": "FT", "split": "test", "metric": "ece", "value": value, "final": True},
    ]


def test_metric_against_the_norm_at_which_training_starts():
    frame = pd.DataFrame(
        [
            row
            for seed in (0, 1, 2)
            for factor in (10.0, 0.5)
            for row in scaled_rows("LP-FT", factor, seed, 6 * factor + seed, factor + seed)
        ]
    )
    points = at_head_norm(frame, "ece", "test")
    assert points["factor"].tolist() == [0.5, 10.0] and points["n"].tolist() == [3, 3]
    assert points["norm"].tolist() == [4.0, 61.0] and points["mean"].tolist() == [1.5, 11.0]
    assert (points["high"] - points["low"]).iloc[0] == pytest.approx(
        2 * 4.302653 / math.sqrt(3), rel=1e-5
    )
    assert head_scale_table(frame, ["ece"])["ece"].str.split().str[0].tolist() == [
        "1.500",
        "11.000",
    ]
    with pytest.raises(ValueError, match="no row of 'eec'"):
        at_head_norm(frame, "eec", "test")


def test_a_seed_without_a_value_leaves_the_mean_empty():
    frame = pd.DataFrame(
        [
            row
            for seed, value in ((0, 0.1), (1, math.nan))
            for row in scaled_rows("FT", 1.0, seed, 1.0, value)
        ]
    )
    assert at_head_norm(frame, "ece", "test")["mean"].isna().all()


# the whole notebook


def test_the_notebook_judges_reports_and_is_repeated(records, tmp_path, monkeypatch):
    request = QUICK | {"records": str(records), "output": str(tmp_path / "runs")}
    executed, paths = experiments.run_experiment("calibration", request)
    assert [path.parent.name for path in paths] == ["calibration"] * 4
    cells = [
        cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"
    ]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 3
    record = read_record(paths[0])
    experiment = find_experiment("calibration")
    like = experiments.parameters_like(record, experiment.parameters)
    places = {"records": str(records), "output": str(tmp_path / "again")}
    (repetition,) = plan(experiment.check(like | places))
    assert repetition.name == record["run_id"]
    assert repetition.task["sizes"] == SPLITS | {"train": 10}
    again = read_record(judge(repetition, folder=records))
    assert experiments.differences(record, again, tolerance=0)["equal"].all()
    wanted, other = experiment.check(request), experiment.check(request | {"bins": 10})
    files = [str(path) for path in paths]
    experiments.check_used(wanted, wanted.model_dump(), files)
    for asked, found in ((wanted, files[1:]), (other, files)):
        with pytest.raises(RunFailed, match="FT, seed 0"):
            experiments.check_used(asked, asked.model_dump(), found)
    assert experiments.plan_table(plan(wanted))["state"].tolist() == ["finished"] * 4
