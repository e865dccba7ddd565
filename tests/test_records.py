"""Records: what was written comes back, everything else is refused by name; comparisons agree with SciPy."""

import contextlib
import copy
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lpft_nb import records
from lpft_nb.store.cache import content_hash, write_tensors

SURROUNDINGS = {"versions": {"torch": "0"}, "python": "3", "git_commit": None, "hardware": {}}


def make(
    method="LP-FT",
    seed=0,
    accuracy=0.8,
    task="toy",
    stages=None,
    status="finished",
    model="tiny",
    fingerprint="f0",
    **parameters,
):
    stages = stages or {"LP": ["LP"], "FT": ["FT"], "LP-FT": ["LP", "FT"]}[method]
    metrics = [
        {
            "stage": stage,
            "split": split,
            "metric": metric,
            "value": accuracy - 0.1 * (len(stages) - 1 - place) - shift,
        }
        for place, stage in enumerate(stages)
        for split, shift in (("test", 0.0), ("ood/other", 0.3))
        for metric in ("accuracy",)
    ]
    return records.make_record(
        experiment="lp_ft", method=method, seed=seed, parameters={"max_train": 100, "epochs": 3, "learning_rate": 1e-5} | parameters,
        task={"name": task, "fingerprint": fingerprint, "sizes": {"train": 90}, "label_names": ["/a", "output"], "class_counts": {"output": 3}},
        model={"id": model, "revision": None, "sha256": "ab" * 32, "pooling": "mean", "max_length": 128},
        stages=[{"name": stage, "seconds": 1.5} for stage in stages], metrics=metrics,
        history=[{"stage": stages[-1], "step": step, "epoch": step / 3, "metric": "loss", "value": 1 / (1 + step)} for step in range(4)],
        wall_seconds=2.0, peak_memory_bytes=10, status=status, surroundings=SURROUNDINGS,
    )  # fmt: skip


def write_all(folder, values, **changes):
    for method, of_method in values.items():
        for seed, value in of_method.items():
            records.write_record(make(method, seed, value, **changes), None, folder)
    return records.load_results(folder)


# --- intervals --------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda number: round(number, 6))


@settings(deadline=None, max_examples=80)
@given(st.lists(numbers, min_size=2, max_size=12), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_scipys(values, level):
    mean, low, high = records.confidence_interval(values, level)
    error = stats.sem(values)
    expected = (
        stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=error)
        if error > 0
        else (np.mean(values),) * 2
    )
    np.testing.assert_allclose(
        (mean, low, high),
        (np.mean(values), *expected),
        rtol=1e-9,
        atol=1e-9 * max(map(abs, values), default=0),
    )
    assert low <= mean <= high


@settings(deadline=None, max_examples=40)
@given(st.lists(numbers, min_size=2, max_size=8), st.floats(0.1, 10), st.floats(-5, 5))
def test_interval_moves_and_scales_with_its_values(values, scale, shift):
    before = np.array(records.confidence_interval(values))
    after = np.array(records.confidence_interval([scale * value + shift for value in values]))
    np.testing.assert_allclose(after, scale * before + shift, rtol=1e-6, atol=1e-6)


def test_interval_by_hand():
    assert records.confidence_interval([1.0, 3.0]) == pytest.approx(
        (2, 2 - 12.7062047361747, 2 + 12.7062047361747)
    )
    single = records.confidence_interval(torch.tensor([4.0]))
    assert single.mean == 4 and math.isnan(single.low) and math.isnan(single.high)
    assert all(math.isnan(value) for value in records.confidence_interval([1.0, float("nan"), 2.0]))
    assert all(math.isnan(value) for value in records.confidence_interval([1.0, float("inf")]))


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([], 0.95),
        ([[1.0, 2.0]], 0.95),
        (3.0, 0.95),
        ([1, 2], 95),
        ([1, 2], 0),
        ([1, 2], float("nan")),
    ],
)
def test_interval_refuses(values, level):
    with pytest.raises(ValueError, match="expected"):
        records.confidence_interval(values, level)


# --- names ------------------------------------------------------------------------------------------------------------


def test_run_id_is_readable_keys_and_the_hash():
    configuration = {"b": [1, None], "a": "x"}
    keys = {
        "experiment": "lp_ft",
        "task": "cb",
        "model": "org/mini LM",
        "method": "LP-FT",
        "seed": 3,
    }
    assert (
        records.run_id(keys, configuration)
        == f"lp_ft-cb-mini_LM-LP-FT-s3-{content_hash(configuration)[:8]}"
    )


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["task", "model", "method", "seed"]), st.text(max_size=60), min_size=1
    )
)
def test_run_id_is_always_a_file_name(keys):
    name = records.run_id(keys, {})
    assert (
        re.fullmatch(records._NAME["pattern"], name) and Path(name).name == name and len(name) < 200
    )


@pytest.mark.parametrize(
    "path",
    [("seed",), ("method",), ("experiment",), ("parameters", "epochs"), ("parameters", "new"), ("task", "fingerprint"), ("task", "name"),
     ("model", "id"), ("model", "sha256"), ("model", "revision"), ("model", "pooling"), ("model", "max_length")],
)  # fmt: skip
def test_every_part_of_the_configuration_changes_the_name(path):
    record = make()
    changed = copy.deepcopy(record)
    part = changed
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = 77
    assert records.record_id(changed) != records.record_id(record)


def test_results_and_surroundings_do_not_change_the_name():
    record = make()
    other = make(accuracy=0.1) | {
        "wall_seconds": 99.0,
        "versions": {},
        "status": "failed",
        "created": "2000-01-01T00:00:00+00:00",
    }
    assert records.record_id(other) == record["run_id"]
    partial = {
        name: record[name]
        for name in ("experiment", "method", "seed", "parameters", "task", "model")
    }
    assert records.record_id(partial) == record["run_id"]
    assert make(learning_rate=np.float64(1e-5))["run_id"] == record["run_id"]


# --- plain and portable values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/a/data/cb", "cb"), ("/home/a/data/cb/", "cb"), ("~/cb", "cb"), ("../data/cb", "cb"), ("./cb", "cb"), (r"C:\data\cb", "cb"),
     ("C:/data/cb", "cb"), (r"\\server\cb", "cb"), ("file:///data/cb", "cb"), (Path("/data/cb"), "cb"), (Path("a/b"), "b")],
)  # fmt: skip
def test_paths_lose_their_folders(path, expected):
    assert records.portable({"a": [path]}) == {"a": [expected]}


@pytest.mark.parametrize(
    "value",
    [
        "cb",
        "nyu-mll/glue",
        r"\.layer\.\d+",
        ".*query",
        "a.b",
        "",
        "https://example.org/x",
        "f(x) = Vφ/2",
        1e-5,
        None,
        True,
        [1, "a"],
    ],
)
def test_other_values_stay(value):
    assert records.portable({"a": value}) == {"a": value}


def test_portable_drops_the_output_everywhere():
    assert records.portable({"output": "/x", "a": {"output": "/y", "b": 1}}) == {"a": {"b": 1}}


def test_labels_are_not_taken_for_paths_or_outputs(tmp_path):
    record = records.read_record(records.write_record(make(), None, tmp_path))
    assert record["task"]["label_names"] == ["/a", "output"] and record["task"]["class_counts"] == {
        "output": 3
    }


def test_a_machine_path_is_refused(tmp_path):
    for part, value in (
        ("parameters", {"task": "/home/a/cb"}),
        ("model", {"id": "~/model"}),
        ("task", make()["task"] | {"source": {"path": "/data/cb"}}),
    ):
        record = make() | {part: value}
        with pytest.raises(records.RecordError, match=f"{part}: expected no paths"):
            records.write_record(record | {"run_id": records.record_id(record)}, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plain_values():
    value = {
        1: np.int64(2),
        "a": (np.float32(0.5), torch.tensor([1, 2]), np.bool_(True), pandas.NA, float("-inf")),
    }
    assert records.plain(value) == {"1": 2, "a": [0.5, [1, 2], True, None, "-inf"]}
    assert records.plain([np.float64("nan"), np.inf], records._null) == [None, None]
    with pytest.raises(TypeError, match="expected text"):
        records.plain({"a": {1, 2}})


def test_an_infinite_penalty_is_not_a_missing_one():
    assert make(penalty=float("inf"))["run_id"] != make(penalty=None)["run_id"]


# --- the environment --------------------------------------------------------------------------------------------------


def test_environment_names_no_host_user_or_folder():
    text = json.dumps(records.environment(), allow_nan=False)
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert len(private) < 4 or private not in text
    assert records.environment()["versions"][
        "torch"
    ] == torch.__version__ or torch.__version__.startswith(
        records.environment()["versions"]["torch"]
    )
    assert records.environment()["hardware"]["logical_cores"] == os.cpu_count()


def test_without_git_there_is_no_commit(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    assert records._git_commit() is None
    assert capfd.readouterr() == ("", "")


def test_commit_of_the_checkout_and_its_changes(tmp_path, monkeypatch):
    package = tmp_path / "lpft_nb"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(
        records.importlib.util,
        "find_spec",
        lambda name: type("Spec", (), {"origin": str(package / "__init__.py")}),
    )
    assert records._git_commit() is None  # no checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "empty"], check=True)
    assert records._git_commit() is None  # a checkout, but the package is not part of it
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert records._git_commit() == head
    (package / "__init__.py").write_text("changed = 1")
    assert records._git_commit() == head + "-dirty"


# --- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    record = make()
    path = records.write_record(record, None, tmp_path / "new" / "folder")
    assert path.name == record["run_id"] + ".json"
    assert records.read_record(path) == record
    assert records.load_arrays(record, tmp_path) == {}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_record_is_strict_json_with_one_row_a_line(tmp_path):
    path = records.write_record(make(), None, tmp_path)
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert sum('"metric"' in line for line in path.read_text().splitlines()) == len(
        record["metrics"]
    ) + len(record["history"])
    assert (
        path.read_bytes()
        == records.write_record(records.read_record(path), None, tmp_path / "b").read_bytes()
    )


def test_arrays_come_back_bit_by_bit(tmp_path):
    arrays = {
        "logits/FT/test": torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-45]]),
        "kernel": torch.randn(2, 3, 2, 3, dtype=torch.float64).transpose(0, 2),
        "kept": torch.arange(4),
    }
    axes = {"kernel": "example,class,example,class", "kept": "example"}
    path = records.write_record(make(), arrays, tmp_path / "deep", axes)
    record = records.read_record(path)
    loaded = records.load_arrays(record, tmp_path)
    assert loaded.keys() == arrays.keys()
    for name in arrays:
        assert loaded[name].dtype == arrays[name].dtype and loaded[name].shape == arrays[name].shape
        assert (
            loaded[name]
            .contiguous()
            .view(torch.uint8)
            .equal(arrays[name].contiguous().view(torch.uint8))
        )
    header = path.with_suffix(".safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert (
        json.loads(metadata["axes"]) == axes | {"logits/FT/test": "example,class"}
        and metadata["run_id"] == record["run_id"]
    )


def test_axes_must_fit_the_shape(tmp_path):
    with pytest.raises(records.RecordError, match="axes"):
        records.write_record(make(), {"kernel": torch.zeros(2, 3, 2, 3)}, tmp_path)
    assert not list(tmp_path.glob("*"))


def test_missing_damaged_and_foreign_arrays(tmp_path):
    path = records.write_record(make(), {"logits": torch.zeros(2, 2)}, tmp_path)
    record, arrays = records.read_record(path), path.with_suffix(".safetensors")
    good = arrays.read_bytes()
    arrays.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(records.RecordError, match="damaged"):
        records.load_arrays(record, tmp_path)
    arrays.write_bytes(good[:20])
    with pytest.raises(records.RecordError, match="not a complete"):
        records.load_arrays(record, tmp_path)
    write_tensors(arrays, {"logits": torch.zeros(2, 2)}, {"run_id": "another"})
    with pytest.raises(records.RecordError, match="belongs to"):
        records.load_arrays(record, tmp_path)
    arrays.unlink()
    with pytest.raises(records.RecordError, match="missing"):
        records.load_arrays(record, tmp_path)


def test_values_that_are_not_finite_come_back_as_nan(tmp_path):
    record = make() | {
        "metrics": [
            {"stage": "FT", "split": "test", "metric": "nll", "value": value}
            for value in (np.nan, np.inf, 1)
        ]
    }
    record["history"] = [
        {"stage": "FT", "step": 1, "epoch": float("nan"), "metric": "loss", "value": float("inf")}
    ]
    path = records.write_record(record, None, tmp_path)
    assert [row["value"] for row in records.read_record(path)["metrics"]] == [None, None, 1]
    np.testing.assert_array_equal(records.load_results(tmp_path)["value"], [np.nan, np.nan, 1.0])
    assert records.load_history(tmp_path)[["epoch", "value"]].isna().all(axis=None)


def test_metrics_may_be_a_table(tmp_path):
    rows = make()["metrics"]
    record = records.make_record(**{name: make()[name] for name in ("experiment", "method", "seed", "parameters", "task", "model", "stages")},
                                 metrics=pandas.DataFrame(rows), surroundings=SURROUNDINGS)  # fmt: skip
    assert record["metrics"] == rows


# --- faults -----------------------------------------------------------------------------------------------------------


def changed(**entries):
    return json.dumps(make() | entries).encode()


def without(name):
    record = make()
    del record[name]
    return json.dumps(record).encode()


FAULTS = {
    "empty": (b"", "cannot be read"),
    "cut off": (json.dumps(make()).encode()[:-40], "cut off"),
    "not text": (b"\xff\xfe\x00{}", "cannot be read"),
    "deeply nested": (b"[" * 100_000, "cannot be read"),
    "NaN": (changed(wall_seconds=float("nan")), "not JSON"),
    "a list": (b"[1, 2]", "not a record"),
    "foreign": (b'{"name": "a package"}', "not a record"),
    "older schema": (changed(schema_version=0), "schema version 1, got 0"),
    "newer schema": (changed(schema_version=2), "schema version 1, got 2"),
    "edited parameters": (changed(parameters={"epochs": 99}), "edited or foreign"),
    "edited seed": (changed(seed=1), "edited or foreign"),
    "edited fingerprint": (changed(task=make()["task"] | {"fingerprint": "x"}), "edited or foreign"),
    "another name": (changed(run_id="something-else"), "edited or foreign"),
    "a name that leaves the folder": (changed(run_id="../up"), "run_id"),
    "arrays elsewhere": (changed(arrays="other.safetensors"), "arrays"),
    "arrays outside": (changed(arrays="/etc/passwd"), "arrays"),
    "unknown entry": (changed(remark="good"), "remark"),
    "missing entry": (without("metrics"), "metrics"),
    "seed as text": (changed(seed="0"), "seed"),
    "huge seed": (changed(seed=2**70), "seed"),
    "unknown status": (changed(status="running"), "status"),
    "no stage name": (changed(stages=[{}]), "name"),
    "metric as text": (changed(metrics=[{"stage": "FT", "split": "test", "metric": "accuracy", "value": "0.9"}]), "metrics[0].value"),
    "metric as truth": (changed(metrics=[{"stage": "FT", "split": "test", "metric": "accuracy", "value": True}]), "metrics[0].value"),
    "metric with more": (changed(metrics=[{"stage": "FT", "split": "test", "metric": "accuracy", "value": 1, "x": 2}]), "metrics[0]"),
    "metric no row": (changed(metrics=[0.9]), "metrics[0]"),
    "history without step": (changed(history=[{"stage": "FT", "metric": "loss", "value": 1}]), "history[0]"),
    "lone surrogate": (json.dumps(make() | {"parameters": {"a": "\ud800"}}).encode(), "surrogates"),
    "machine path": (changed(parameters={"task": "/home/a/cb"}), ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_refused_by_name_and_skipped(fault, tmp_path, caplog):
    data, message = FAULTS[fault]
    good = make(seed=5)
    records.write_record(good, None, tmp_path)
    path = tmp_path / (make()["run_id"] + ".json")
    path.write_bytes(data)
    with pytest.raises(records.RecordError) as caught:
        records.read_record(path)
    assert path.name in str(caught.value) and message in str(caught.value)
    with caplog.at_level(logging.WARNING, "lpft_nb"):
        frame = records.load_results(tmp_path)
    assert set(frame["run_id"]) == {good["run_id"]}
    assert len(frame.attrs["skipped"]) == 1 and path.name in frame.attrs["skipped"][0]
    assert path.name in caplog.text
    assert records.load_history(tmp_path)["run_id"].nunique() == 1


@pytest.mark.parametrize(
    "fault",
    [
        "older schema",
        "edited seed",
        "unknown entry",
        "seed as text",
        "metric as text",
        "unknown status",
    ],
)
def test_a_faulty_record_is_not_written(fault, tmp_path):
    with pytest.raises(records.RecordError):
        records.write_record(json.loads(FAULTS[fault][0]), None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_renamed_file_and_a_broken_link_are_skipped(tmp_path):
    path = records.write_record(make(), None, tmp_path)
    path.rename(tmp_path / "best.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.json").mkdir()
    frame = records.load_results(tmp_path)
    assert len(frame) == 0 and len(frame.attrs["skipped"]) == 3
    assert list(frame.columns) == list(records.RESULT_COLUMNS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(list(records.SCHEMA["properties"])),
    json_values,
    st.sampled_from([None, "train", "name", "id", "max_train", "epochs"]),
)
def test_whatever_stands_in_a_file_reading_a_folder_never_fails(
    tmp_path_factory, name, value, inner
):
    record = make()
    if inner is not None and isinstance(record.get(name), dict):
        record[name] = record[name] | {inner: value}
    else:
        record[name] = value
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.suppress(
        Exception
    ):  # the name that fits, so that it is not refused for its name alone
        record["run_id"] = records.record_id(record) if name != "run_id" else value
    fitting = (
        isinstance(record["run_id"], str)
        and Path(record["run_id"]).name == record["run_id"]
        and "\0" not in record["run_id"]
    )
    (folder / f"{record['run_id'] if fitting else 'x'}.json").write_text(json.dumps(record))
    records.load_results(folder)
    records.load_history(folder)


def test_schema_is_itself_valid_and_strict():
    jsonschema.Draft202012Validator.check_schema(records.SCHEMA)
    assert records.SCHEMA["additionalProperties"] is False
    assert set(make()) <= set(records.SCHEMA["properties"])


# --- killed, full, read-only ------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys, torch
from lpft_nb import records
from lpft_nb.store import cache
record, folder, survive = json.load(open(sys.argv[1])), sys.argv[2], int(sys.argv[3])
replace, count = os.replace, 0
def killing(source, target):
    global count
    if count == survive:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    replace(source, target)
cache.os.replace = killing
records.write_record(record, {"logits": torch.ones(3, 2)}, folder)
"""


@pytest.mark.parametrize("survive", [0, 1])
def test_killed_between_writing_and_renaming(survive, tmp_path):
    (tmp_path / "record.txt").write_text(json.dumps(make()))
    folder = tmp_path / "runs"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "record.txt"), str(folder), str(survive)]
    )
    assert killed.returncode == -9
    frame = records.load_results(folder)
    assert len(frame) == 0 and frame.attrs["skipped"] == []  # nothing half-made is seen
    path = records.write_record(
        make(), {"logits": torch.ones(3, 2)}, folder
    )  # and the next run is not in its way
    assert torch.equal(
        records.load_arrays(records.read_record(path), folder)["logits"], torch.ones(3, 2)
    )


def test_an_older_record_survives_a_full_disk(tmp_path, monkeypatch):
    path = records.write_record(make(accuracy=0.5), None, tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        records.write_record(make(accuracy=0.9), None, tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        records.write_record(make(), None, tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_raises_and_can_be_read(tmp_path):
    records.write_record(make(), None, tmp_path)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            records.write_record(make(seed=1), None, tmp_path)
        assert records.load_results(tmp_path)["run_id"].nunique() == 1
    finally:
        tmp_path.chmod(0o755)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_table_by_hand(tmp_path):
    record = make("LP-FT", seed=2, accuracy=0.9, epochs={"LP-FT": 7, "FT": 5}, max_train=None)
    records.write_record(record, None, tmp_path / "deep" / "er")
    frame = records.load_results(tmp_path)
    assert list(frame.columns) == list(records.RESULT_COLUMNS)
    rows = {(row.stage, row.split): row for row in frame.itertuples()}
    assert set(rows) == {("LP", "test"), ("LP", "ood/other"), ("FT", "test"), ("FT", "ood/other")}
    last = rows["FT", "test"]
    assert (last.value, last.final, rows["LP", "test"].final) == (0.9, True, False)
    assert (last.run_id, last.experiment, last.task, last.model, last.method, last.seed) == (
        record["run_id"],
        "lp_ft",
        "toy",
        "tiny",
        "LP-FT",
        2,
    )
    assert (
        last.epochs == 7
        and last.max_train is pandas.NA
        and last.n_train == 90
        and last.status == "finished"
    )
    history = records.load_history(tmp_path)
    np.testing.assert_allclose(history["value"], [1, 1 / 2, 1 / 3, 1 / 4])
    assert (history["seed"] == 2).all() and (history["stage"] == "FT").all()


def test_a_failed_run_has_no_final_rows(tmp_path):
    records.write_record(make(status="failed") | {"error": "diverged at step 3"}, None, tmp_path)
    frame = records.load_results(tmp_path)
    assert len(frame) == 4 and not frame["final"].any()


def test_configuration_ignores_the_seed_and_sees_the_rest(tmp_path):
    for record in (make(seed=0, seeds=[0], methods=["FT"], device="cpu"), make(seed=1, seeds=[1]), make(seed=2, learning_rate=1e-4),
                   make(seed=3, learning_rate={"LP-FT": 1e-5, "FT": 9.0})):  # fmt: skip
        records.write_record(record, None, tmp_path)
    of_seed = records.load_results(tmp_path).groupby("seed")["configuration"].first()
    assert of_seed[0] == of_seed[1] == of_seed[3] != of_seed[2]


def test_one_run_found_twice_counts_once(tmp_path, caplog):
    newer = make(accuracy=0.9) | {"created": "2031-01-01T00:00:00+00:00"}
    records.write_record(newer, None, tmp_path / "a")
    records.write_record(make(accuracy=0.5), None, tmp_path / "b")
    records.write_record(
        make(accuracy=0.1, status="failed") | {"created": "2032-01-01T00:00:00+00:00"},
        None,
        tmp_path / "c",
    )
    frame = records.load_results(tmp_path)
    assert frame.loc[frame["final"] & (frame["split"] == "test"), "value"].tolist() == [0.9]
    assert len(frame.attrs["skipped"]) == 2 and "found twice" in caplog.text


def test_find_results(tmp_path, monkeypatch):
    monkeypatch.delenv("LPFT_RESULTS", raising=False)
    (tmp_path / "results").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert records.find_results().resolve() == (tmp_path / "results").resolve()
    assert len(records.load_results()) == 0
    monkeypatch.setenv("LPFT_RESULTS", str(tmp_path / "a"))
    assert records.find_results() == tmp_path / "a"
    monkeypatch.setenv("LPFT_RESULTS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        records.load_results()
    monkeypatch.delenv("LPFT_RESULTS")
    monkeypatch.setattr(records.Path, "is_dir", lambda path: False)
    with pytest.raises(FileNotFoundError, match="LPFT_RESULTS"):
        records.find_results()


# --- comparisons ------------------------------------------------------------------------------------------------------

accuracies = st.lists(st.floats(0, 1).map(lambda value: round(value, 3)), min_size=3, max_size=6)


@settings(deadline=None, max_examples=40)
@given(st.data(), accuracies)
def test_compare_is_the_paired_t_test(data, a):
    b = data.draw(
        st.lists(
            st.floats(0, 1).map(lambda value: round(value, 3)), min_size=len(a), max_size=len(a)
        )
    )
    rows = [dict(task="t", model="m", method=method, seed=seed, final=True, split="test", metric="accuracy", value=value)
            for method, values in (("A", a), ("B", b)) for seed, value in enumerate(values)]  # fmt: skip
    frame = pandas.DataFrame(rows).sample(frac=1, random_state=0)
    row = records.compare(frame, "A", "B").iloc[0]
    differences = np.subtract(a, b)
    assert row["n"] == len(a) and row["difference"] == pytest.approx(differences.mean(), abs=1e-12)
    if np.ptp(differences) > 1e-9:
        test = stats.ttest_rel(a, b)
        interval = test.confidence_interval(0.95)
        np.testing.assert_allclose(
            (row["low"], row["high"]), (interval.low, interval.high), rtol=1e-7, atol=1e-12
        )
        if abs(test.pvalue - 0.05) > 1e-9:
            assert row["verdict"] == (
                "open" if test.pvalue > 0.05 else "higher" if test.statistic > 0 else "lower"
            )
    other = records.compare(frame, "B", "A").iloc[0]
    assert (other["difference"], other["low"], other["high"]) == pytest.approx(
        (-row["difference"], -row["high"], -row["low"]), abs=1e-12
    )


VALUES = {"LP-FT": {0: 0.9, 1: 0.8, 2: 0.85}, "FT": {0: 0.7, 1: 0.65, 2: 0.6}}


def test_compare_takes_the_last_stage_of_each_method(tmp_path):
    row = records.compare(write_all(tmp_path, VALUES), "LP-FT", "FT").iloc[0]
    assert (
        row["difference"] == pytest.approx(0.2)
        and row["n"] == 3
        and row["verdict"] == "higher"
        and row["dropped"] == ""
    )
    assert (row["task"], row["model"], row["a"], row["b"], row["metric"], row["split"]) == (
        "toy",
        "tiny",
        "LP-FT",
        "FT",
        "accuracy",
        "test",
    )


def test_compare_one_row_a_cell(tmp_path):
    write_all(tmp_path, VALUES)
    frame = write_all(tmp_path, {method: {seed: 1 - value for seed, value in of_method.items()} for method, of_method in VALUES.items()},
                      task="other", fingerprint="f1")  # fmt: skip
    table = records.compare(frame, "LP-FT", "FT", split="ood/other").set_index("task")
    assert table["difference"].to_dict() == pytest.approx({"toy": 0.2, "other": -0.2})
    assert table["verdict"].to_dict() == {"toy": "higher", "other": "lower"}


def test_seeds_without_a_partner_are_left_out_and_named(tmp_path, caplog):
    frame = write_all(tmp_path, {"LP-FT": {0: 0.9, 1: 0.8, 2: 0.7}, "FT": {1: 0.6, 2: 0.6, 7: 0.1}})
    row = records.compare(frame, "LP-FT", "FT").iloc[0]
    assert (
        row["n"] == 2
        and row["difference"] == pytest.approx(0.15)
        and row["dropped"] == "LP-FT: 0; FT: 7"
    )
    assert "left out" in caplog.text
    alone = records.compare(
        write_all(tmp_path / "alone", {"LP-FT": {0: 0.9}, "FT": {1: 0.6}}), "LP-FT", "FT"
    ).iloc[0]
    assert alone["n"] == 0 and math.isnan(alone["difference"]) and alone["verdict"] == "open"


def test_one_seed_and_missing_values_are_open(tmp_path):
    single = records.compare(
        write_all(tmp_path / "a", {"LP-FT": {0: 0.9}, "FT": {0: 0.1}}), "LP-FT", "FT"
    ).iloc[0]
    assert single["n"] == 1 and single["verdict"] == "open" and math.isnan(single["low"])
    missing = records.compare(
        write_all(tmp_path / "b", {"LP-FT": {0: 0.9, 1: float("nan")}, "FT": {0: 0.1, 1: 0.1}}),
        "LP-FT",
        "FT",
    ).iloc[0]
    assert math.isnan(missing["difference"]) and missing["verdict"] == "open"


def test_failed_runs_do_not_enter(tmp_path):
    write_all(tmp_path, VALUES)
    records.write_record(make("FT", 3, 0.0, status="failed"), None, tmp_path)
    records.write_record(make("LP-FT", 3, 1.0), None, tmp_path)
    assert (
        records.compare(records.load_results(tmp_path), "LP-FT", "FT").loc[0, "dropped"]
        == "LP-FT: 3"
    )


MIXTURES = {
    "training examples": (dict(max_train=500), "max_train 100 and 500"),
    "all and some examples": (dict(max_train=None), "max_train"),
    "data": (dict(fingerprint="other"), "fingerprint f0 and other"),
    "learning rate": (dict(learning_rate=0.5), "learning_rate is 0.5 and 1e-05"),
    "new parameter": (dict(warmup=3), "warmup is 3 and null"),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixed_settings_are_refused(mixture, tmp_path):
    changes, message = MIXTURES[mixture]
    write_all(tmp_path, VALUES)
    frame = write_all(tmp_path, {"FT": {3: 0.5}, "LP-FT": {3: 0.5}}, **changes)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        records.compare(frame, "LP-FT", "FT")
    assert "task toy, model tiny" in str(caught.value)


def test_methods_trained_on_different_data_are_refused(tmp_path):
    write_all(tmp_path, {"LP-FT": VALUES["LP-FT"]})
    frame = write_all(tmp_path, {"FT": VALUES["FT"]}, max_train=500)
    with pytest.raises(ValueError, match="max_train 100 and 500"):
        records.compare(frame, "LP-FT", "FT")


def test_a_column_in_by_separates_settings(tmp_path):
    write_all(tmp_path, VALUES)
    frame = write_all(tmp_path, VALUES, max_train=500)
    table = records.compare(frame, "LP-FT", "FT", by=("task", "model", "max_train"))
    assert table["max_train"].tolist() == [100, 500] and (table["n"] == 3).all()


def test_two_values_a_seed_are_refused():
    rows = [
        dict(
            task="t",
            model="m",
            method=method,
            seed=0,
            final=True,
            split="test",
            metric="accuracy",
            value=0.5,
        )
        for method in "AAB"
    ]
    with pytest.raises(ValueError, match=r"one value of A per seed, got several for seeds \[0\]"):
        records.compare(pandas.DataFrame(rows), "A", "B")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("LPFT", "FT"), "no method 'LPFT'.*LP-FT"), (("LP-FT", "LoRA"), "no method 'LoRA'.*FT"), (("LP-FT", "FT", "acuracy"), "no metric 'acuracy'.*accuracy"),
     (("LP-FT", "FT", "accuracy", "tset"), "no split 'tset'.*test")],
)  # fmt: skip
def test_misspelt_names_are_answered_with_close_ones(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        records.compare(write_all(tmp_path, VALUES), *arguments)


# --- publishing -------------------------------------------------------------------------------------------------------


def outcomes(source, target, **options):
    return dict(
        records.publish(source, target, **options)[["run_id", "outcome"]].itertuples(index=False)
    )


def test_publish_copies_once_and_gathers(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    good = records.write_record(make(), {"logits": torch.ones(3, 2)}, runs / "x")
    failed = records.write_record(make(seed=1, status="failed"), None, runs)
    (runs / "broken.json").write_text("{")
    assert outcomes(runs, results) == {good.stem: "published", failed.stem: "refused"}
    assert sorted(path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()) == [
        "index.parquet", f"lp_ft/{good.stem}.json", f"lp_ft/{good.stem}.safetensors",
    ]  # fmt: skip
    record = records.read_record(results / "lp_ft" / good.name)
    assert torch.equal(records.load_arrays(record, results)["logits"], torch.ones(3, 2))
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert outcomes(runs, results)[good.stem] == "unchanged"
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    gathered = pandas.read_parquet(results / "index.parquet")
    pandas.testing.assert_frame_equal(
        gathered, records.load_results(results), check_dtype=False, check_categorical=False
    )


def test_publish_never_replaces_another_record(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    records.write_record(make(accuracy=0.5), None, results / "lp_ft")
    path = records.write_record(make(accuracy=0.9), None, runs)
    before = (results / "lp_ft" / path.name).read_bytes()
    assert outcomes(runs, results) == {path.stem: "refused"}
    assert (results / "lp_ft" / path.name).read_bytes() == before


def test_large_arrays_stay_behind(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    path = records.write_record(make(), {"logits": torch.ones(300, 2)}, runs)
    table = records.publish(runs, results, largest="1KiB")
    assert table.loc[0, "outcome"] == "published" and "stay behind" in table.loc[0, "reason"]
    assert records.read_record(results / "lp_ft" / path.name)["arrays"] is None
    assert not list(results.rglob("*.safetensors"))
    assert outcomes(runs, results, largest="1KiB") == {path.stem: "unchanged"}


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_publish_refuses_missing_and_damaged_arrays(damage, tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    arrays = records.write_record(make(), {"logits": torch.ones(3, 2)}, runs).with_suffix(
        ".safetensors"
    )
    arrays.unlink() if damage == "missing" else arrays.write_bytes(arrays.read_bytes()[:-1])
    assert outcomes(runs, results) == {arrays.stem: "refused"}
    assert not results.exists()


def test_gather_is_deterministic_and_holds_no_folder(tmp_path):
    write_all(tmp_path / "some_folder", VALUES)
    (tmp_path / "some_folder" / "foreign.json").write_text("{}")
    path = records.gather(tmp_path / "some_folder")
    first = path.read_bytes()
    assert records.gather(tmp_path / "some_folder").read_bytes() == first
    assert str(tmp_path).encode() not in first and b"foreign.json" not in first
