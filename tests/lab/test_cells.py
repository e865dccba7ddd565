"""One line a cell: means and intervals by hand, and nothing averaged but seeds."""

import math

import pytest

from toy_records import make, write_all

from lpft_nb import records
from lpft_nb.lab.cells import cells, differing, in_order, results_table, run_table, value_text

VALUES = {0: 0.80, 1: 0.84, 2: 0.88}
HALF = 4.302652729911275 * 0.04 / math.sqrt(3)  # Student's quantile for two degrees of freedom


def final(frame, split="test"):
    return frame[frame["final"] & (frame["split"] == split)]


def test_mean_and_interval_by_hand(tmp_path):
    frame = write_all(tmp_path, {"FT": VALUES})
    (row,) = cells(final(frame)).itertuples()
    assert (row.mean, row.low, row.high) == pytest.approx((0.84, 0.84 - HALF, 0.84 + HALF))
    assert (row.n, row.method, row.pooling, row.stage, row.metric) == (3, "FT", "mean", "FT", "accuracy")  # fmt: skip


def test_the_table_of_a_terminal(tmp_path):
    frame = write_all(tmp_path, {"FT": VALUES, "LP-FT": {0: 0.545}})
    table = [line.split() for line in results_table(frame).splitlines()]
    assert table[0] == ["experiment", "task", "model", "pooling", "method", "split", "accuracy", "n"]  # fmt: skip
    told = {(row[4], row[5]): row[6:] for row in table[1:]}
    assert told["FT", "test"] == ["0.840", "±", f"{HALF:.3f}", "3"]
    assert told["LP-FT", "test"] == ["0.545", "(n", "=", "1)", "1"]
    assert told["FT", "ood/other"] == ["0.540", "±", f"{HALF:.3f}", "3"]
    assert len(told) == 4


APART = {
    "learning rate": {"learning_rate": 0.1},
    "a parameter that the others have not": {"warmup": 3},
    "training examples": {"max_train": 500},
    "pooling": {"pooling": "cls"},
    "model": {"model": "other"},
    "task": {"task": "other"},
    "data": {"fingerprint": "f1"},
}


@pytest.mark.parametrize("case", APART)
def test_two_configurations_are_never_averaged(case, tmp_path):
    write_all(tmp_path, {"FT": {0: 0.5, 1: 0.5}})
    frame = write_all(tmp_path, {"FT": {2: 0.9, 3: 0.9}}, **APART[case])
    found = cells(final(frame))
    assert sorted(found["mean"]) == pytest.approx([0.5, 0.9]) and found["n"].tolist() == [2, 2]
    assert not found.drop(columns=["mean", "low", "high", "n"]).astype(str).duplicated().any()
    assert len(results_table(frame).splitlines()) == 5


def test_poolings_differ_though_both_asked_for_the_models_own(tmp_path):
    for seed, value, pooling in ((0, 0.5, "mean"), (1, 0.9, "cls")):
        one = make("FT", seed, value)
        facts = {name: one[name] for name in ("experiment", "method", "seed", "task", "stages", "metrics")}  # fmt: skip
        asked = one["parameters"] | {"pooling": None}
        own = one["model"] | {"pooling": pooling}
        record = records.make_record(**facts, parameters=asked, model=own)
        records.write_record(record, None, tmp_path)
    found = cells(final(records.load_results(tmp_path)))
    assert list(zip(found["pooling"], found["mean"], found["n"])) == [("cls", 0.9, 1), ("mean", 0.5, 1)]  # fmt: skip


def test_what_no_column_tells_apart_is_told_by_the_configuration(tmp_path):
    frame = write_all(tmp_path, {"FT": {0: 0.5, 1: 0.9}})
    frame.loc[frame["seed"] == 1, "configuration"] = "another"  # such as another hash of weights
    found = cells(final(frame))
    assert found["n"].tolist() == [1, 1] and found["configuration"].nunique() == 2


def test_a_parameter_of_one_method_alone_is_no_column(tmp_path):
    write_all(tmp_path, {"FT": VALUES})
    frame = write_all(tmp_path, {"LP-FT": VALUES}, learning_rate=1e-3, warmup=3)
    assert differing(run_table(frame)) == []
    assert "warmup" not in cells(frame) and "learning_rate" not in cells(frame)


def test_one_seed_from_two_devices_counts_once(tmp_path, caplog):
    older = make("FT", 0, 0.1, device="cpu") | {"created": "2026-01-01T00:00:00+00:00"}
    newer = make("FT", 0, 0.9, device="cuda") | {"created": "2026-01-02T00:00:00+00:00"}
    for record in (newer, older):
        records.write_record(record, None, tmp_path)
    (row,) = cells(final(records.load_results(tmp_path))).itertuples()
    assert (row.mean, row.n) == (0.9, 1) and older["run_id"] in caplog.text


def test_failed_runs_are_in_no_cell(tmp_path):
    write_all(tmp_path, {"FT": {0: 0.5}})
    frame = write_all(tmp_path, {"FT": {1: 0.9}}, status="failed")
    assert cells(frame)["n"].unique().tolist() == [1]
    assert results_table(frame[frame["status"] == "failed"]) == "no finished runs"


def test_runs_without_an_accuracy_are_counted(tmp_path):
    frame = write_all(tmp_path, {"FT": VALUES})
    assert results_table(frame.assign(metric="rank")) == "3 runs of lp_ft have no accuracy"
    some = frame.assign(metric=["rank" if seed else "accuracy" for seed in frame["seed"]])
    assert results_table(some).endswith("\n2 runs of lp_ft have no accuracy")


def test_lines_are_in_the_order_of_numbers_and_methods(tmp_path):
    for rate in (1e-4, 10.0, 9.0):
        frame = write_all(tmp_path, {"LP-FT": {0: 0.5}, "FT": {0: 0.5}}, learning_rate=rate)
    found = cells(final(frame))
    rows = list(zip(found["method"], found["learning_rate"]))
    assert rows == [(method, rate) for method in ("FT", "LP-FT") for rate in (1e-4, 9.0, 10.0)]
    assert in_order(["b", "FT", "LP", None, 2, 10, True]) == [2, 10, "LP", "FT", True, "b", None]
    assert [value_text(one) for one in (None, 1e-5, 100.0, 128, True, "a", [1])] == [
        "none", "1e-05", "100", "128", "True", "a", "[1]",
    ]  # fmt: skip
