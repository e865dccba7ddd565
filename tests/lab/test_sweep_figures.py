"""Any sweep: its axes, what is drawn where, what is refused, and the marks of tries."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from repository import ROOT
from toy_records import make, write_all

from lpft_nb import records
from lpft_nb.lab.sweep_figures import draw_sweep, swept, tries_table
from lpft_nb.plot import method_style


@pytest.fixture(autouse=True)
def closed_figures():
    import matplotlib

    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")


RATES = (1e-5, 1e-4, 1e-3)
SEEDS = {0: -0.01, 1: 0.0, 2: 0.01}


def sweep(folder, rates=RATES, methods=("FT", "LP-FT"), **changes):
    """Accuracy 0.5, 0.6, … by rate, 0.1 more for LP-FT, three seeds around it."""
    for place, rate in enumerate(rates):
        for method in methods:
            mean = 0.5 + 0.1 * place + 0.1 * (method == "LP-FT")
            values = {seed: mean + shift for seed, shift in SEEDS.items()}
            write_all(folder, {method: values}, learning_rate=rate, **changes)
    return records.load_results(folder)


def lines(panel):
    """Means by label: what the error bars of a panel show."""
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in panel.containers}


# axes


def test_axes_are_what_varies(tmp_path):
    sweep(tmp_path)
    results = sweep(tmp_path, task="other", max_train=500, fingerprint="f1")
    assert swept(results) == {
        "task": ["other", "toy"],
        "method": ["FT", "LP-FT"],
        "learning_rate": list(RATES),
    }


def test_a_rate_chosen_for_each_method_is_no_axis(tmp_path):
    sweep(tmp_path, rates=(1e-5,), methods=("FT",))
    results = sweep(tmp_path, rates=(1e-3,), methods=("LP-FT",))
    assert swept(results) == {"method": ["FT", "LP-FT"]}
    assert draw_sweep(results).axes[0].get_xlabel() == "method"


def test_empty_and_mixed_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got no finished run"):
        swept(records.load_results(tmp_path))
    results = sweep(tmp_path)
    others = results.assign(
        experiment="head_scale",
        run_id="x" + results["run_id"],
        configuration="x" + results["configuration"],
    )
    with pytest.raises(ValueError, match="one experiment, got head_scale and lp_ft"):
        draw_sweep(pd.concat([results, others]))
    with pytest.raises(ValueError, match="got no finished run"):
        swept(sweep(tmp_path / "failed", status="failed"))


# figures


def test_a_numeric_axis_has_a_line_a_method(tmp_path):
    (panel,) = draw_sweep(sweep(tmp_path)).axes
    assert (panel.get_xscale(), panel.get_xlabel(), panel.get_ylabel()) == ("log", "learning rate", "accuracy, test")  # fmt: skip
    assert [text.get_text() for text in panel.get_xticklabels()] == ["1e-5", "1e-4", "1e-3"]
    shown = lines(panel)
    np.testing.assert_allclose(shown["FT"], list(zip(RATES, (0.5, 0.6, 0.7))))
    np.testing.assert_allclose(shown["LP-FT"], list(zip(RATES, (0.6, 0.7, 0.8))))
    bars = panel.containers[0]
    assert to_hex(bars.lines[0].get_color()).upper() == method_style("FT")["color"]
    heights = [np.ptp(segment[:, 1]) for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(heights, 2 * 4.302652729911275 * 0.01 / 3**0.5)
    pale = [line for line in panel.lines if line.get_alpha()]
    seeds = np.sort(np.concatenate([line.get_ydata() for line in pale]))
    wanted = [0.5 + 0.1 * place + shift for place in (0, 1, 1, 2, 2, 3) for shift in SEEDS.values()]
    np.testing.assert_allclose(seeds, np.sort(wanted))
    low, high = panel.get_ylim()
    assert low < 0.49 and high > 0.81
    assert [text.get_text() for text in panel.figure.legends[0].texts] == ["FT (n = 3)", "LP-FT (n = 3)"]  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "scale"), [((1.0, 2.0, 9.0), "linear"), ((1.0, 10.0), "log"), ((0.0, 1e-4, 0.1), "symlog"), ((-1.0, 100.0), "linear")]
)  # fmt: skip
def test_the_scale_is_logarithmic_over_decades(rates, scale, tmp_path):
    assert draw_sweep(sweep(tmp_path, rates)).axes[0].get_xscale() == scale


def test_a_categorical_axis_keeps_its_words(tmp_path):
    results = sweep(tmp_path, rates=("constant", "linear", None))
    (panel,) = draw_sweep(results).axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["constant", "linear", "none"]
    np.testing.assert_allclose(lines(panel)["FT"], [(0, 0.5), (1, 0.6), (2, 0.7)])
    assert panel.containers[0].lines[0].get_linestyle() == "None"


def test_each_task_and_pooling_has_a_panel(tmp_path):
    sweep(tmp_path)
    sweep(tmp_path, task="other", fingerprint="f1")
    results = sweep(tmp_path, pooling="cls", methods=("FT",))
    panels = {panel.get_title(): lines(panel) for panel in draw_sweep(results).axes}
    assert {title: set(shown) for title, shown in panels.items()} == {
        "other, mean": {"FT", "LP-FT"},
        "toy, cls": {"FT"},
        "toy, mean": {"FT", "LP-FT"},
    }


def test_poolings_and_models_can_be_the_axis(tmp_path):
    sweep(tmp_path, rates=(1e-4,))
    results = sweep(tmp_path, rates=(1e-4,), pooling="cls")
    (panel,) = draw_sweep(results, axes=("pooling",)).axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["cls", "mean"]


def two_axes(folder):
    for place, size in enumerate((100, 200)):
        sweep(folder, [rate * 10**place for rate in RATES], max_train=size)
    return records.load_results(folder)


def test_two_numbers_make_a_map_a_method(tmp_path):
    results = two_axes(tmp_path)
    *panels, bar = draw_sweep(results).axes
    assert [panel.get_title() for panel in panels] == ["toy, FT", "toy, LP-FT"]
    values = panels[0].collections[0].get_array().reshape(2, 4)
    np.testing.assert_allclose(values.filled(np.nan), [[np.nan, 0.5, 0.6, 0.7], [0.5, 0.6, 0.7, np.nan]])  # fmt: skip
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["200", "100"]
    assert panels[0].texts[0].get_text().startswith("0.5\n±0.025")
    assert bar.get_ylabel() == "accuracy, test"


def test_two_settings_are_never_one_point(tmp_path):
    results = two_axes(tmp_path)
    with pytest.raises(ValueError, match="but max_train differs as well"):
        draw_sweep(results, axes=("learning_rate",))
    write_all(tmp_path, {"FT": {0: 0.1}}, warmup=7)
    with pytest.raises(ValueError, match="at most two parameters that vary, got .*warmup"):
        draw_sweep(records.load_results(tmp_path))
    results = sweep(tmp_path / "hidden", methods=("FT",))
    results.loc[results["seed"] == 1, "configuration"] += "x"  # such as another hash of weights
    with pytest.raises(ValueError, match="what defines the runs"):
        draw_sweep(results)


def test_parameters_that_go_together_are_one_axis(tmp_path):
    for place, (size, epochs) in enumerate(((100, 10), (200, 5))):
        sweep(tmp_path, RATES[place : place + 1], max_train=size, epochs=epochs)
    results = records.load_results(tmp_path)
    assert set(swept(results)) == {"method", "learning_rate", "max_train", "epochs"}
    assert len(draw_sweep(results).axes) == 1
    assert draw_sweep(results, axes=("epochs",)).axes[0].get_xlabel() == "epochs"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"metric": "acuracy"}, "unknown metric 'acuracy': did you mean 'accuracy'"),
        ({"split": "tset"}, "unknown split of accuracy 'tset': did you mean 'test'"),
        ({"axes": ("lerning_rate",)}, "unknown axis 'lerning_rate': did you mean 'learning_rate'"),
        ({"axes": ("method", "task", "learning_rate")}, "one or two different axes"),
    ],
)
def test_wrong_names_are_answered_with_close_ones(asked, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw_sweep(sweep(tmp_path), **asked)


# tries


def write_try(folder, method, rate, accuracy, **changes):
    one = make(method, changes.pop("seed", 7), accuracy, learning_rate=rate, **changes)
    one["metrics"] = [row | {"split": "validation"} for row in one["metrics"] if row["split"] == "test"]  # fmt: skip
    records.write_record(one, None, folder / "tries" / "lp_ft")


def evaluate(folder, method, rate, **changes):
    write_all(folder / "lp_ft", {method: {0: 0.5, 1: 0.5}}, learning_rate=rate, **changes)


def marks(table):
    return {(row.method, row.learning_rate): row.mark for row in table.itertuples()}


def test_no_tries_no_rows(tmp_path):
    evaluate(tmp_path, "FT", 1e-4)
    table = tries_table(tmp_path)
    assert table.empty and list(table.columns)[-5:] == ["mean", "low", "high", "n", "mark"]


def test_chosen_values_are_marked_and_so_are_ends(tmp_path):
    for method, values in {"FT": (0.5, 0.9, 0.6), "LP-FT": (0.5, 0.7, 0.9)}.items():
        for rate, accuracy in zip(RATES, values):
            write_try(tmp_path, method, rate, accuracy)
            write_try(tmp_path, method, rate, accuracy - 0.02, seed=8)
    evaluate(tmp_path, "FT", 1e-4)
    evaluate(tmp_path, "LP-FT", 1e-3)
    table = tries_table(tmp_path)
    assert marks(table) == {
        ("FT", 1e-5): "",
        ("FT", 1e-4): "chosen",
        ("FT", 1e-3): "",
        ("LP-FT", 1e-5): "",
        ("LP-FT", 1e-4): "",
        ("LP-FT", 1e-3): "chosen; learning_rate at the largest tried",
    }
    np.testing.assert_allclose(table["mean"], [0.49, 0.89, 0.59, 0.49, 0.69, 0.89])
    np.testing.assert_allclose(table["high"] - table["mean"], 12.706204736432095 * 0.01)
    assert (table["n"] == 2).all()
    assert tries_table(tmp_path / "lp_ft").equals(table)
    swept_results = swept(records.load_results(tmp_path))
    assert "tries" not in str(swept_results) and set(swept_results) == {"method"}


def test_before_the_evaluations_the_best_so_far_is_marked(tmp_path):
    for rate, accuracy in zip(RATES, (0.9, 0.5, 0.6)):
        write_try(tmp_path, "FT", rate, accuracy)
        write_try(tmp_path, "LP-FT", rate, 0.7)
    told = marks(tries_table(tmp_path))
    assert told["FT", 1e-5] == "best so far; learning_rate at the smallest tried"
    assert told["FT", 1e-4] == told["FT", 1e-3] == ""
    assert {told["LP-FT", rate] for rate in RATES} == {"best so far, with others"}
    least = marks(tries_table(tmp_path, largest=False))
    assert least["FT", 1e-4] == "best so far" and least["FT", 1e-5] == ""


def test_each_value_of_an_axis_has_a_choice_of_its_own(tmp_path):
    for size, best in ((100, 1e-4), (200, 1e-3)):
        for rate in RATES:
            write_try(tmp_path, "FT", rate, 0.9 if rate == best else 0.5, max_train=size)
        evaluate(tmp_path, "FT", best, max_train=size)
    table = tries_table(tmp_path)
    assert list(table.columns)[4:6] == ["max_train", "learning_rate"]
    chosen = table[table["mark"] != ""]
    assert list(zip(chosen["max_train"], chosen["learning_rate"], chosen["mark"])) == [
        (100, 1e-4, "chosen"),
        (200, 1e-3, "chosen; learning_rate at the largest tried"),
    ]


# the page


def test_the_page_takes_a_folder(tmp_path):
    """As papermill calls it: the values go behind the cell with the parameters."""
    import papermill

    for rate in RATES:
        write_try(tmp_path / "runs", "FT", rate, 0.5 + rate)
    evaluate(tmp_path / "runs", "FT", 1e-3)
    done = papermill.execute_notebook(
        ROOT / "nbs" / "14j_plotting_a_sweep.ipynb",
        tmp_path / "out.ipynb",
        parameters={"folder": str(tmp_path / "runs")},
        kernel_name="python3",
        progress_bar=False,
    )
    said = "\n".join(str(output.get("data", {}).get("text/html", "")) for cell in done.cells for output in cell.get("outputs", []))  # fmt: skip
    assert "chosen; learning_rate at the largest tried" in said
