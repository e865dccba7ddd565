"""The gathered table is used exactly where it says what the JSON files say."""

import os
from pathlib import Path

import pandas as pd
import pytest

from toy_records import make, write_all

from lpft_nb import records
from lpft_nb.store import tables

LOADERS = {"metrics": records.load_results, "history": records.load_history}
VALUES = {"LP-FT": {0: 0.91, 1: 0.83}, "FT": {0: 0.72, 1: 0.64}}


@pytest.fixture
def json_reads(monkeypatch):
    "How many files were parsed, as a list that grows."
    parsed, parse = [], tables.parse_record
    monkeypatch.setattr(
        tables, "parse_record", lambda data, name: parsed.append(name) or parse(data, name)
    )
    return parsed


@pytest.fixture
def results(tmp_path):
    "A gathered folder with two experiments below it."
    folder = tmp_path / "results"
    write_all(folder / "lp_ft", VALUES)
    write_all(folder / "other", {"LP": {5: 0.5}}, max_train=None)
    records.gather(folder)
    return folder


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("below", ["", "lp_ft", "other"])
def test_both_ways_give_the_same_table(kind, below, results, json_reads):
    folder = results / below
    gathered = LOADERS[kind](folder)
    assert json_reads == []
    for place in tables.TABLES.values():
        (results / place.file).unlink()
    pd.testing.assert_frame_equal(gathered, LOADERS[kind](folder))
    assert len(json_reads) == gathered["run_id"].nunique() > 0
    assert gathered.attrs["skipped"] == []


def test_a_relative_folder_finds_its_table(results, json_reads, monkeypatch):
    monkeypatch.chdir(results / "lp_ft")
    assert len(records.load_results(".")) == len(records.load_results("../lp_ft")) > 0
    monkeypatch.chdir(results)
    assert len(records.load_results("lp_ft")) == len(records.load_results(Path("./lp_ft"))) > 0
    assert json_reads == []


def same_size(path):
    path.write_bytes(path.read_bytes().replace(b"0.91", b"0.19"))


def same_size_and_time(path):
    before = path.stat()
    same_size(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "edited, same size": same_size,
    "edited, same size and time": same_size_and_time,
    "removed": lambda path: path.unlink(),
    "damaged": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "one more": lambda path: records.write_record(make("FT", seed=9), None, path.parent),
    "renamed": lambda path: path.rename(path.with_name("best.json")),
    "moved": lambda path: path.rename(path.parents[1] / path.name),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("below", ["", "lp_ft"])
def test_a_changed_folder_is_read_as_json(change, below, results, json_reads):
    path = results / "lp_ft" / (make("LP-FT", 0)["run_id"] + ".json")
    assert path.is_file()
    CHANGES[change](path)
    frame = records.load_results(results / below)
    assert json_reads
    for place in tables.TABLES.values():
        (results / place.file).unlink()
    pd.testing.assert_frame_equal(frame, records.load_results(results / below))
    assert records.load_results(results / "other")["seed"].tolist() == [5, 5]


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table"])
def test_a_damaged_table_is_named_and_not_used(data, results, caplog, json_reads):
    expected = records.load_results(results)
    (results / "index.parquet").write_bytes(data)
    pd.testing.assert_frame_equal(records.load_results(results), expected)
    assert "index.parquet" in caplog.text and len(json_reads) == 5


def test_a_table_of_another_version_or_tool_is_not_used(results, json_reads, monkeypatch):
    monkeypatch.setattr(tables, "_TABLE_VERSION", tables._TABLE_VERSION + 1)
    assert len(records.load_results(results)) and len(json_reads) == 5
    records.load_results(results).to_parquet(results / "index.parquet")  # without our header
    assert len(records.load_results(results)) and len(json_reads) == 15


def test_what_was_skipped_is_named_at_every_reading(results, caplog, json_reads):
    (results / "lp_ft" / "foreign.json").write_text("{}")
    records.gather(results)
    for _ in range(2):
        frame = records.load_results(results)
        assert len(frame.attrs["skipped"]) == 1 and "foreign.json" in frame.attrs["skipped"][0]
    assert json_reads


def test_a_list_of_records(tmp_path, json_reads):
    expected = write_all(tmp_path, VALUES)
    paths = sorted(tmp_path.glob("*.json"), reverse=True)
    for given_list in (
        paths,
        [str(path) for path in paths],
        [records.read_record(path) for path in paths],
    ):
        pd.testing.assert_frame_equal(records.load_results(given_list), expected)
        assert len(records.load_history(given_list)) == 4 * len(paths)
        assert [one["run_id"] for one in records.read_records(given_list)[0]] == sorted(
            path.stem for path in paths
        )
    assert len(records.load_results([])) == 0


def test_a_list_is_asked_for_by_name_so_faults_raise(tmp_path):
    path = records.write_record(make(), None, tmp_path)
    half = tmp_path / "half.json"
    half.write_bytes(path.read_bytes()[:80])
    with pytest.raises(records.RecordError, match="half.json"):
        records.load_results([path, half])
    with pytest.raises(FileNotFoundError):
        records.load_results([tmp_path / "nowhere.json"])
    with pytest.raises(records.RecordError, match="seed"):
        records.load_results([make() | {"seed": "0"}])
    twice = records.load_results([path, make(accuracy=0.1, status="failed")])
    assert len(twice.attrs["skipped"]) == 1 and twice["status"].unique().tolist() == ["finished"]


@pytest.mark.parametrize("kind", LOADERS)
def test_the_published_tables_are_those_of_the_published_records(kind, json_reads):
    folder = Path(__file__).parents[2] / "results"
    gathered = LOADERS[kind](folder)
    assert json_reads == [], (
        f"{tables.TABLES[kind].file} is not that of the records: gather results/ again"
    )
    pd.testing.assert_frame_equal(gathered, LOADERS[kind](tables.read_records(folder)[0]))
