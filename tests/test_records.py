"""Many records: tables, paired comparisons that agree with SciPy, publishing."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from toy_records import make, write_all

from lpft_nb import records
from lpft_nb.store.tables import current_index

# --- tables ---


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
        and last.max_train is pd.NA
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


# --- comparisons ---


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
    frame = pd.DataFrame(rows).sample(frac=1, random_state=0)
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
        records.compare(pd.DataFrame(rows), "A", "B")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("LPFT", "FT"), "no method 'LPFT'.*LP-FT"), (("LP-FT", "LoRA"), "no method 'LoRA'.*FT"), (("LP-FT", "FT", "acuracy"), "no metric 'acuracy'.*accuracy"),
     (("LP-FT", "FT", "accuracy", "tset"), "no split 'tset'.*test")],
)  # fmt: skip
def test_misspelt_names_are_answered_with_close_ones(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        records.compare(write_all(tmp_path, VALUES), *arguments)


# --- publishing ---


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
        "history.parquet", "index.parquet", f"lp_ft/{good.stem}.json", f"lp_ft/{good.stem}.safetensors",
    ]  # fmt: skip
    record = records.read_record(results / "lp_ft" / good.name)
    assert torch.equal(records.load_arrays(record, results)["logits"], torch.ones(3, 2))
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert outcomes(runs, results)[good.stem] == "unchanged"
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    gathered = pd.read_parquet(results / "index.parquet")
    pd.testing.assert_frame_equal(
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


def test_the_current_index_is_made_once_and_again_when_a_record_comes(tmp_path):
    assert current_index(tmp_path) is None and not list(tmp_path.iterdir())
    write_all(tmp_path / "lp_ft", {"FT": {0: 0.5}})
    index = current_index(tmp_path)
    assert index == tmp_path / "index.parquet" and len(pd.read_parquet(index)) == 2
    before = index.stat().st_ino
    assert current_index(tmp_path) == index and index.stat().st_ino == before
    assert current_index(tmp_path / "lp_ft") == index  # the folder above holds these
    write_all(tmp_path / "lp_ft", {"FT": {1: 0.6}})
    assert current_index(tmp_path) == index and index.stat().st_ino != before
    assert pd.read_parquet(index)["seed"].nunique() == 2


@pytest.mark.parametrize("apart", ["tries", "grids/other"])
def test_tries_and_other_grids_are_in_no_index(apart, tmp_path):
    write_all(tmp_path, {"FT": {0: 0.5}})
    write_all(tmp_path / apart, {"FT": {7: 0.9}})
    assert set(pd.read_parquet(current_index(tmp_path))["seed"]) == {0}
    assert set(records.load_results(tmp_path / apart)["seed"]) == {7}
