"""One record: what was written comes back, everything else is refused by name."""

import contextlib
import copy
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from damage import damaged
from toy_records import SURROUNDINGS, make

from lpft_nb import records
from lpft_nb.store import record as record_module
from lpft_nb.store.cache import content_hash, unsealed, write_tensors

# --- names ---


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
    assert re.fullmatch(record_module._NAME, name) and Path(name).name == name and len(name) < 200


@pytest.mark.parametrize(
    "path",
    [("seed",), ("method",), ("experiment",), ("parameters", "epochs"), ("parameters", "new"), ("task", "fingerprint"), ("task", "name"),
     ("model", "id"), ("model", "sha256"), ("model", "revision"), ("model", "pooling"), ("model", "max_length"),
     ("model", "config_sha256"), ("model", "tokenizer_sha256")],
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


# --- round trip ---


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
                                 metrics=pd.DataFrame(rows), surroundings=SURROUNDINGS)  # fmt: skip
    assert record["metrics"] == rows


# --- faults ---


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
    st.sampled_from(list(records.Record.model_fields)),
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


cells = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
)
some_row = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("stage", "split", "metric", "value", "x"), cells)
)
good_row = st.fixed_dictionaries({"stage": st.text(max_size=3), "split": st.just("test"), "metric": st.just("nll"), "value": st.none() | st.integers(-3, 3) | st.floats()})  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(good_row | some_row | cells, max_size=4))
def test_columns_at_once_and_row_by_row_agree(rows):
    def verdict(kind):
        try:
            TypeAdapter(kind).validate_python(rows)
        except ValidationError as error:
            return error.errors(include_url=False)[0]["loc"]
        return None

    rows_type = list[record_module.MetricRow]
    at_once = record_module._at_once(record_module.MetricRow)
    assert verdict(Annotated[rows_type, at_once]) == verdict(rows_type)


def test_schema_is_strict_and_holds_what_is_written():
    assert (
        records.Record.model_config["extra"] == "forbid" and records.Record.model_config["strict"]
    )
    assert set(make()) == set(records.Record.model_fields)


@pytest.mark.parametrize(
    ("entry", "value", "place"),
    [("task", {"name": "cb", "sizes": {}}, "task.fingerprint"), ("model", {}, "model.id"), ("stages", [{"name": 1}], r"stages\[0\].name"),
     ("wall_seconds", True, "wall_seconds"), ("wall_seconds", -1, "wall_seconds"), ("seed", 1.0, "seed"), ("seed", True, "seed"),
     ("schema_version", True, "schema_version|schema version"), ("arrays", 3, "arrays"), ("versions", [], "versions"),
     ("created", "yesterday", "created"), ("peak_memory_bytes", 1.5, "peak_memory_bytes")],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(entry, value, place):
    with pytest.raises(records.RecordError, match=place):
        records.check_record(make() | {entry: value})


def test_published_records_keep_their_names_and_are_read():
    "Every record in results/ is read, unchanged, under the name that its configuration gives."
    folder = Path(__file__).parents[2] / "results"
    found = [path for path in folder.rglob("*.json") if "benchmarks" not in path.parts]
    assert len(found) >= 200
    for path in found[::5]:
        record = records.read_record(path)
        assert records.record_id(record) == path.stem
        written, published = records.record_text(record), path.read_bytes()
        assert unsealed(written)[0] == unsealed(published)[0]  # older ones have no checksum


# --- killed, full, read-only ---


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


# --- damaged in one place


def test_a_changed_bit_anywhere_in_a_record_is_noticed(tmp_path):
    "A number of a metric, a key, the checksum itself: whatever changes, the file is refused by name."
    path = records.write_record(make(), None, tmp_path)
    for how in damaged(path, bits=400):
        if how != "removed":
            with pytest.raises(records.RecordError, match=path.stem):
                records.read_record(path)
    assert records.is_finished(path)


def test_a_changed_bit_anywhere_in_the_arrays_is_noticed(tmp_path):
    "Values, names, shapes, and what the header says of run and axes."
    path = records.write_record(make(), {"logits/FT/test": torch.randn(5, 3)}, tmp_path)
    record = records.read_record(path)
    for _ in damaged(path.with_suffix(".safetensors"), bits=400):
        with pytest.raises(records.RecordError):
            records.load_arrays(record, tmp_path)
        assert not records.is_finished(path)
    assert records.is_finished(path)
