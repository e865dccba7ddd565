"""Plots and tables: what is drawn equals what a second computation gives, and bold is earned."""

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lpft_nb import plot

METHODS = ("LP", "FT", "LP-FT", "LoRA", "LP-LoRA")


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    "Draw without a display, in a style that the next test does not see."
    matplotlib.use("agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")


@pytest.fixture
def history():
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {"method": method, "seed": seed, "epoch": epoch, "value": rng.normal(0.8, 0.1)}
            for epoch in (2, 0, 1)
            for seed in range(4)
            for method in reversed(METHODS)
        ]
    )


@pytest.fixture
def results():
    levels = {"LP": 0.5, "FT": 0.6, "LP-FT": 0.7}
    return pd.DataFrame(
        [
            {
                "task": task,
                "split": split,
                "method": method,
                "seed": seed,
                "value": level + spread * (seed - 1),
            }
            for task, spread in (("sharp", 0.001), ("vague", 0.2))
            for split in ("test", "ood/x")
            for method, level in levels.items()
            for seed in range(3)
        ]
    )


def t_interval(values):
    return stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))


def relative_luminance(color):
    channels = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_methods_of_one_layer_have_styles_that_no_other_has():
    from lpft_nb.store.names import EVERY_METHOD, LAYER_METHODS

    styles = {method: plot.method_style(method) for method in EVERY_METHOD}
    assert {name: styles[name] for name in METHODS} == {n: plot.method_style(n) for n in METHODS}
    told = {(one["color"], one.get("markerfacecolor")) for one in styles.values()}
    assert len(told) == len(EVERY_METHOD)
    assert styles["LP-SCL-FT"]["color"] == styles["SCL-FT"]["color"]
    frame = pd.DataFrame({"method": ["LP-SCL-FT", "FT", "LayerFT", "LP"]})
    assert list(plot.group_styles(frame, "method")) == ["LP", "FT", "LayerFT", "LP-SCL-FT"]
    assert not set(LAYER_METHODS) & set(METHODS)


def test_methods_have_fixed_distinct_styles():
    assert plot.METHODS == METHODS
    styles = [plot.method_style(method) for method in METHODS]
    for key in ("color", "marker", "linestyle", "label"):
        assert len({style[key] for style in styles}) == 5, key
    assert plot.method_style("FT") == plot.method_style("FT")
    okabe_ito = {
        "#000000",
        "#E69F00",
        "#56B4E9",
        "#009E73",
        "#F0E442",
        "#0072B2",
        "#D55E00",
        "#CC79A7",
    }
    assert {style["color"] for style in styles} <= okabe_ito
    assert all(relative_luminance(style["color"]) < 0.5 for style in styles)  # readable on white


@pytest.mark.parametrize(
    ("wrong", "meant"), [("LPFT", "LP-FT"), ("lora", "LoRA"), ("ft", "FT"), (3, "LP")]
)
def test_a_misspelt_method_names_the_close_ones(wrong, meant):
    with pytest.raises(ValueError, match=f"unknown method.*{meant}"):
        plot.method_style(wrong)


def test_use_style_sets_sizes_and_importing_does_not():
    plt.rcdefaults()  # an earlier test may have asked for the style
    before = dict(plt.rcParams)
    plot.use_style()
    assert tuple(plt.rcParams["figure.figsize"]) == (4.5, 3.0)
    assert dict(plt.rcParams) != before
    code = (
        "import matplotlib as m; a = dict(m.rcParams); import lpft_nb.plot; b = dict(m.rcParams); "
    )
    code += "a.pop('backend'); b.pop('backend'); assert a == b"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"MPLBACKEND": "agg", "PYTHONPATH": ":".join(sys.path)},
    )


def test_over_seeds_equals_scipy(history):
    points = plot.over_seeds(history, "value", ["method", "epoch"]).set_index(["method", "epoch"])
    for (method, epoch), group in history.groupby(["method", "epoch"]):
        low, high = t_interval(group.value)
        row = points.loc[method, epoch]
        np.testing.assert_allclose(
            row[["mean", "low", "high", "n"]].astype(float), [group.value.mean(), low, high, 4]
        )


def test_two_poolings_of_one_model_are_never_averaged(history):
    mixed = history.assign(model="minilm", pooling=np.where(history["seed"] % 2, "cls", "mean"))
    with pytest.raises(ValueError, match="minilm with the poolings cls and mean"):
        plot.over_seeds(mixed, "value", ["method", "epoch"])
    assert len(plot.over_seeds(mixed, "value", ["method", "epoch", "pooling"]))
    apart = mixed.assign(model=mixed["pooling"])  # each model by its own rule
    assert len(plot.over_seeds(apart, "value", ["method", "epoch"]))


def test_curves_draw_means_and_bands(history):
    axes = plot.curves(history, "epoch", "value", xlabel="epoch", ylabel="accuracy (share)")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "accuracy (share)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(METHODS)
    for line, band in zip(axes.get_lines(), axes.collections, strict=True):
        chosen = history[history.method == line.get_label()].groupby("epoch").value
        np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2])
        np.testing.assert_allclose(line.get_ydata(), chosen.mean())
        edges = band.get_paths()[0].vertices[:, 1]
        lows, highs = zip(*(t_interval(values) for _, values in chosen), strict=True)
        assert (edges.min(), edges.max()) == (pytest.approx(min(lows)), pytest.approx(max(highs)))
        assert line.get_color() == plot.method_style(line.get_label())["color"]


def test_one_seed_draws_a_line_without_a_band(history, recwarn):
    axes = plot.curves(history[history.seed == 0], "epoch", "value")
    axes.figure.canvas.draw()
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.get_lines())
    assert all(
        np.isnan(band.get_paths()[0].vertices).all() if band.get_paths() else True
        for band in axes.collections
    )
    assert not [
        warning
        for warning in recwarn
        if issubclass(warning.category, (RuntimeWarning, UserWarning))
    ]


def test_other_hues_go_through_the_palette(history):
    frame = history[history.method == "FT"].assign(rate=lambda f: np.where(f.seed < 2, 0.1, 0.2))
    axes = plot.curves(frame, "epoch", "value", hue="rate")
    assert {line.get_label() for line in axes.get_lines()} == {"0.1", "0.2"}
    assert len({line.get_color() for line in axes.get_lines()}) == 2
    with pytest.raises(ValueError, match="unknown method"):
        plot.curves(history.replace({"method": {"LP-FT": "LPFT"}}), "epoch", "value")


def test_dots_draw_means_and_intervals(results):
    sharp = results[results.task == "sharp"]
    axes = plot.dots_with_intervals(sharp, ylabel="accuracy (share)")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["test", "ood/x"]
    assert len(axes.containers) == 3
    for container in axes.containers:
        dots, _, (bars,) = container.lines
        chosen = sharp[sharp.method == container.get_label()]
        for place, split in enumerate(("test", "ood/x")):
            values = chosen[chosen.split == split].value
            assert dots.get_ydata()[place] == pytest.approx(values.mean())
            np.testing.assert_allclose(bars.get_segments()[place][:, 1], t_interval(values))
            assert abs(dots.get_xdata()[place] - place) < 0.5
    drawn = {round(x, 6) for container in axes.containers for x in container.lines[0].get_xdata()}
    assert len(drawn) == 6  # no two methods on one spot


def test_table_is_bold_only_where_intervals_separate(results):
    text = plot.table(results[results.split == "test"]).replace("\u00a0", " ")
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)  # seeds at -0.1, 0, +0.1 percentage points
    sharp, vague = text.splitlines()[2:]
    assert text.splitlines()[0] == "| task | LP | FT | LP-FT |"
    assert f"**70.0 ± {half:.1f} (3)**" in sharp and sharp.count("**") == 2
    assert "**" not in vague and "70.0 ± " in vague
    worst = plot.table(results[results.split == "test"], largest=False)
    worst = worst.replace("\u00a0", " ").splitlines()[2]
    assert f"**50.0 ± {half:.1f} (3)**" in worst and worst.count("**") == 2


@pytest.mark.parametrize(
    ("low", "apart"), [(0.55, False), (0.6, False), (0.601, True)], ids=["inside", "touch", "apart"]
)
def test_the_best_has_an_interval_beyond_the_ends_of_all_others(low, apart):
    "An interval that lies beyond another's mean alone, or touches its end, is not apart from it."
    points = pd.DataFrame(
        {"mean": [0.5, 0.7, 0.2], "low": [0.4, low, 0.1], "high": [0.6, 0.8, 0.3]},
        index=["FT", "LP-FT", "LP"],
    )
    assert plot.best_if_separate(points) == ("LP-FT" if apart else None)
    turned = pd.DataFrame({"mean": -points["mean"], "low": -points["high"], "high": -points["low"]})
    assert plot.best_if_separate(turned, largest=False) == ("LP-FT" if apart else None)


def test_table_with_one_seed_or_a_missing_cell(results):
    single = plot.table(results[(results.split == "test") & (results.seed == 0)])
    assert "±" not in single and "**" not in single and "(1)" in single
    test = results[results.split == "test"]
    hole = plot.table(test[(test.task != "vague") | (test.method != "FT")])
    assert hole.splitlines()[3].split("|")[3].strip() == ""
    alone = plot.table(test[test.method == "FT"])
    assert "**" not in alone


def test_a_table_is_text_that_notebooks_render_as_markdown():
    source = "| task | FT |\n| --- | --- |\n| a<b & c | **1.0 ± 0.1 (5)** |"
    shown = plot.Table(source)
    assert isinstance(shown, str) and shown == source
    assert type(shown._repr_markdown_()) is str and shown._repr_markdown_() == source
    assert not hasattr(shown, "_repr_html_")  # would be preferred by the book


def test_faults_are_named(results):
    with pytest.raises(ValueError, match=r"share a seed.*'method'"):
        plot.curves(results, "split", "value")  # two tasks in one frame
    with pytest.raises(ValueError, match="did you mean 'value'"):
        plot.dots_with_intervals(results, value="valeu")
    with pytest.raises(ValueError, match="no column 'seed'"):
        plot.table(results.drop(columns="seed"))
    with pytest.raises(ValueError, match="no rows"):
        plot.table(results[:0])
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            plot.table(results[results.split == "test"].assign(value=bad))


def test_a_kernel_is_drawn_by_class_in_units_of_its_mean_diagonal():
    table = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
    table = table @ table.T
    axes = plot.kernel_map(table, [1, 0, 1, 0], ["no", "yes"])
    order = [1, 3, 0, 2]
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(drawn, (table / table.diag().mean())[order][:, order])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["no", "yes"]
    logits = torch.einsum("nm,cd->ncmd", table, torch.eye(3, dtype=torch.float64)).requires_grad_()
    np.testing.assert_allclose(
        plot.kernel_map(logits).images[0].get_array(), table / table.diag().mean()
    )
    assert plot.kernel_map(table[:2]).images[0].get_array().max() == 1
    plt.close("all")


@pytest.mark.parametrize(
    ("kernel", "labels", "message"),
    [
        (np.full((2, 2), np.nan), None, "finite"),
        (np.zeros((2, 2, 2)), None, "expected finite numbers"),
        (np.eye(3), [0, 1], "expected 3 labels"),
    ],
)
def test_no_kernel_is_refused(kernel, labels, message):
    with pytest.raises(ValueError, match=message):
        plot.kernel_map(kernel, labels)
    plt.close("all")
