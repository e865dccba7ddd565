"""Claims answered from made-up records: the right numbers, the right word, and what is set aside."""

import math

import numpy as np
import pytest
import torch
import yaml
from toy_records import SURROUNDINGS

from conftest import ROOT
from lpft_nb.calibration import (
    calibration_metrics,
    expected_calibration_error,
    maximum_calibration_error,
    fit_temperature,
)
from lpft_nb.lab.answers import answer, places_text, register
from lpft_nb.lab.comparisons import Comparison, Grid, Side, number_of, read_comparison
from lpft_nb.records import make_record, write_record

SPLITS = {"validation": 60, "test": 80, "ood/other": 50}
CLAIMS = yaml.safe_load((ROOT / "nbs" / "claims.yml").read_text(encoding="utf-8"))


def scores(method, seed, task, skill):
    """Logits and labels by split; labels are the same for all methods and seeds of a task."""
    logits, labels = {}, {}
    for place, (split, examples) in enumerate(SPLITS.items()):
        generator = torch.Generator().manual_seed(7 + place + 100 * len(task))
        labels[split] = torch.arange(examples) % 2
        noise = torch.randn(examples, 2, generator=generator)
        own = torch.Generator().manual_seed(1000 * seed + len(method) + place)
        truth = torch.nn.functional.one_hot(labels[split], 2)
        logits[split] = skill * truth + noise + 0.5 * torch.randn(examples, 2, generator=own)
    return logits, labels


def write(folder, method, seed, task="easy", *, skill=2.0, texts="f", rate=1e-3, model="all-MiniLM-L6-v2", experiment="lp_ft", rows=(), **parameters):  # fmt: skip
    """One record with logits and with the rows (stage, split, metric, value) that are given."""
    logits, labels = scores(method, seed, task, skill)
    stages = ["LP", "FT"] if method == "LP-FT" else ["LP"] if method == "LP" else ["FT"]
    record = make_record(
        experiment=experiment, method=method, seed=seed,
        parameters={"task": task, "learning_rate": rate, "epochs": 1.0} | parameters,
        task={"name": task, "fingerprint": texts * 16, "sizes": {"train": 10, **SPLITS}},
        model={"id": model, "revision": None, "sha256": None, "pooling": "mean", "max_length": 16},
        stages=[{"name": stage} for stage in stages],
        metrics=[dict(zip(("stage", "split", "metric", "value"), row, strict=True)) for row in rows],
        surroundings=SURROUNDINGS,
    )  # fmt: skip
    arrays = {f"logits/{stages[-1]}/{split}": logits[split] for split in SPLITS}
    arrays |= {f"labels/{split}": labels[split] for split in SPLITS}
    kinds = {name: "example" for name in arrays if name.startswith("labels/")}
    write_record(record, arrays, folder / experiment, kinds)
    return logits, labels


def part(of, minus=None, over=None, **said):
    """A part of a claim as the file says it, of pairs (method, metric)."""
    side = lambda pair: dict(zip(("method", "metric", "stage"), pair, strict=False))
    sides = {"of": of, "minus": minus, "over": over}
    return {"says": "…"} | {name: side(one) for name, one in sides.items() if one} | said


MOVED = {"FT": (5.0, 6.0, 5.5, 6.5), "LP-FT": (1.0, 1.5, 1.2, 2.0)}


@pytest.fixture
def folder(tmp_path):
    for method, values in MOVED.items():
        for seed, value in enumerate(values):
            rows = [("FT", split, "feature_change", value) for split in ("test", "ood/other")]
            write(tmp_path, method, seed, rows=[*rows, ("FT", "stage", "head_norm", 2 * value)])
    return tmp_path


def test_numbers_of_runs_are_paired_over_seeds(folder):
    found = answer(
        part(("LP-FT", "feature_change"), ("FT", "feature_change"), below=0), Grid(folder)
    )
    (row,) = found.table.to_dict("records")
    gaps = np.subtract(MOVED["LP-FT"], MOVED["FT"])
    assert row["mean"] == pytest.approx(gaps.mean()) and row["n"] == 4 and row["aside"] == ""
    assert row["low"] < gaps.mean() < row["high"] < 0
    assert found.verdict == ("supported", "for: easy")
    turned = part(("FT", "feature_change"), ("LP-FT", "feature_change"), below=0)
    assert answer(turned, Grid(folder)).verdict.word == "contradicted"


def test_ratios_and_ranges(folder):
    ratio = part(("FT", "head_norm"), over=("LP-FT", "head_norm"), split="stage", at_least=2)
    found = answer(ratio, Grid(folder))
    (row,) = found.table.to_dict("records")
    assert row["mean"] == pytest.approx(np.mean(MOVED["FT"]) / np.mean(MOVED["LP-FT"]))
    assert found.verdict.word == "supported"
    assert answer(ratio | {"at_most": 2.5}, Grid(folder)).verdict.word == "contradicted"
    assert answer(ratio | {"at_least": 4}, Grid(folder)).verdict.word == "open"


def test_a_ratio_near_one_shows_three_places(folder):
    said = part(("FT", "head_norm"), over=("LP-FT", "head_norm"), split="stage", at_least=2)
    table = answer(said, Grid(folder)).table
    close = table.assign(mean=1.0012, low=0.9996, high=1.0028)
    text = places_text(said, answer(said, Grid(folder))._replace(table=close))
    assert "1.001 [1.000, 1.003]" in text


def test_a_part_with_places_of_a_parameter_cannot_ask_for_examples():
    said = part(("FT", "accuracy"), experiment="head_scale", where={"head_scale": [1]}, above=0)
    with pytest.raises(ValueError, match="one number a run"):
        read_comparison(said)


@pytest.mark.parametrize("split", ["test", "ood"])
def test_accuracies_and_errors_come_from_the_logits(folder, split):
    where = "ood/other" if split == "ood" else split
    named = {"accuracy": lambda logits, labels: (logits.argmax(1) == labels).double().mean().item(),
             "overconfidence": lambda *one: calibration_metrics(*one)["overconfidence"],
             "ece": expected_calibration_error, "mce": maximum_calibration_error}  # fmt: skip
    for metric, function in named.items():
        found = answer(part(("LP-FT", metric), ("FT", metric), split=split, above=0), Grid(folder))
        (row,) = found.table.to_dict("records")
        means = {}
        for method in MOVED:
            runs = [scores(method, seed, "easy", 2.0) for seed in range(4)]
            means[method] = np.mean(
                [function(logits[where], labels[where]) for logits, labels in runs]
            )
        assert row["mean"] == pytest.approx(means["LP-FT"] - means["FT"], abs=1e-6)
        assert row["place"] == ("easy on other" if split == "ood" else "easy")


def test_a_gain_is_what_the_temperature_of_the_validation_set_takes(folder):
    found = answer(part(("FT", "ece_gain"), above=0), Grid(folder))
    gains = []
    for seed in range(4):
        logits, labels = scores("FT", seed, "easy", 2.0)
        scale = fit_temperature(logits["validation"], labels["validation"])
        gains.append(
            expected_calibration_error(logits["test"], labels["test"])
            - expected_calibration_error(logits["test"] / scale, labels["test"])
        )
    assert found.table["mean"].item() == pytest.approx(np.mean(gains), abs=1e-6)


def test_others_are_the_best_of_them(folder):
    for seed in range(4):
        write(folder, "LoRA", seed, skill=4.0)
        write(folder, "LP-LoRA", seed, skill=1.0)
    found = answer(part(("LP-FT", "accuracy"), ("others", "accuracy"), above=0), Grid(folder))
    alone = answer(part(("LP-FT", "accuracy"), ("LoRA", "accuracy"), above=0), Grid(folder))
    assert found.table.equals(alone.table) and found.verdict.word == "contradicted"


def test_places_that_cannot_tell_are_set_aside_with_a_reason(folder):
    for method, values in MOVED.items():
        for seed, value in enumerate(values):
            rows = [("FT", "test", "feature_change", value)]
            write(folder, method, seed, "chance", skill=0.0, rows=rows)
            write(folder, method, seed, "edge", rows=rows)
            if seed < 2:
                write(folder, method, seed, "few", rows=rows)
    for rate in (1e-4, 1e-3):
        for method in MOVED:
            value = ("FT", "validation", "accuracy", 0.5 + rate * (method == "FT"))
            write(folder / "tries", method, 9, "edge", rate=rate, rows=[value])
    said = part(("LP-FT", "feature_change"), ("FT", "feature_change"), below=0)
    found = answer(said, Grid(folder))
    aside = found.table.set_index("place")["aside"]
    assert aside["easy"] == "" and aside["chance"] == "at chance" and aside["few"] == "2 replicates"
    assert aside["edge"].startswith("end of the grid")
    assert found.verdict.word == "supported" and "for: easy;" in found.verdict.places
    only = answer(said, Grid(folder, tasks=("chance", "few")))
    assert only.verdict.word == "not testable"


def kernels(folder, task, value, seeds=3, model="all-MiniLM-L6-v2"):
    """Kernel records of FT and LP-FT whose FT ratios differ by about a value."""
    for seed in range(seeds):
        for method, ratio in (("FT", 0.2), ("LP-FT", 0.2 + value)):
            row = ("FT", "train", "P+F/ft_ratio", ratio + 0.01 * seed * (method == "FT"))
            write(folder, method, seed, task, experiment="tangent_kernel", rows=[row], model=model)


def test_kernels_cross_seeds_and_tasks_of_one_model(tmp_path):
    for task, value in (("one", 0.5), ("two", 0.7), ("untrained", 9.0)):
        kernels(tmp_path, task, value)
        for seed in range(3 * (task != "untrained")):
            write(tmp_path, "FT", seed, task)
    kernels(tmp_path, "one", 0.5, seeds=1, model="other")
    said = part(("LP-FT", "P+F/ft_ratio"), ("FT", "P+F/ft_ratio"), split="train", above=0, experiment="tangent_kernel")  # fmt: skip
    table = answer(said, Grid(tmp_path)).table.set_index("n")
    assert table.loc[3, "place"].startswith("one × two (without untrained: nothing trained)")
    assert table.loc[3, "mean"] == pytest.approx(0.6 - 0.01)
    over = part(("LP-FT", "P+F/ft_ratio"), over=("FT", "P+F/ft_ratio"), split="train", above=1, experiment="tangent_kernel")  # fmt: skip
    ratios = [(0.2 + value) / (0.2 + 0.01 * seed) for value in (0.5, 0.7) for seed in range(3)]
    found = answer(over, Grid(tmp_path)).table.set_index("n").loc[3]
    assert found["mean"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    assert 1 < found["low"] < found["mean"] < found["high"]
    assert "1 replicate" in table.loc[0, "aside"] and math.isnan(table.loc[0, "mean"])


def test_a_sweep_is_a_slope_or_a_place_for_each_value(tmp_path):
    for seed in range(3):
        for factor in (0.1, 1, 10):
            for method, base in (("FT", 6.0), ("LP-FT", 4.0)):
                value = base - 2 * np.log10(factor) + 0.1 * seed
                write(tmp_path, method, seed, experiment="head_scale", head_scale=factor, rows=[("FT", "test", "feature_change", value)])  # fmt: skip
    said = part(("FT", "feature_change"), experiment="head_scale", slope="head_scale", below=0)
    (row,) = answer(said, Grid(tmp_path)).table.to_dict("records")
    assert row["mean"] == pytest.approx(-2) and row["n"] == 3
    (missing, *_) = (tmp_path / "head_scale").glob("*L6-v2-FT-s2-*.json")
    missing.unlink()  # a seed that lacks a value has no slope
    (fewer,) = answer(said, Grid(tmp_path)).table.to_dict("records")
    assert fewer["n"] == 2 and fewer["aside"] == "2 replicates"
    said = part(("LP-FT", "feature_change"), ("FT", "feature_change"), experiment="head_scale", where={"head_scale": [1, 10]}, below=0)  # fmt: skip
    found = answer(said, Grid(tmp_path))
    assert list(found.table["place"]) == ["easy at head_scale 1", "easy at head_scale 10"]
    assert found.table["mean"].to_numpy() == pytest.approx([-2, -2], abs=0.1)
    assert found.verdict.word == "supported"


def worlds(folder, method="FT", seeds=4, **settings):
    """Records of linear teachers whose risk is 10 by the depth, plus alpha, plus a tenth of the seed."""
    used = {"depth": 1, "alpha": 1.0, "epsilon": 0.0} | settings
    for seed in range(seeds):
        value = 10 / (used["depth"] or 1e9) + used["alpha"] + 0.1 * seed
        record = make_record(
            experiment="linear_teachers", method=method, seed=seed, parameters=used,
            task={"name": "linear-teachers", "fingerprint": f"{used}", "sizes": {"train": 5}},
            model={"id": "linear"}, stages=[{"name": method}],
            metrics=[dict(stage=method, split="test", metric="risk", value=value)],
            surroundings=SURROUNDINGS,
        )  # fmt: skip
        write_record(record, None, folder / "linear_teachers")


def of_worlds(of, minus=None, *, over=None, **said):
    """A part about random worlds, of pairs (method, settings)."""
    side = lambda pair: {"method": pair[0], "metric": "risk", "at": pair[1]}
    sides = {"of": of, "minus": minus, "over": over}
    given = {name: side(one) for name, one in sides.items() if one}
    return {"says": "…", "experiment": "linear_teachers"} | given | said


def test_worlds_are_compared_at_the_settings_that_a_side_names(tmp_path):
    for alpha in (1.0, 2.0):
        for depth in (1, 7, None):
            worlds(tmp_path, alpha=alpha, depth=depth)
    worlds(tmp_path, method="scratch")
    said = of_worlds(("FT", {"depth": 7}), ("FT", {"depth": 1}), below=0)
    found = answer(said, Grid(tmp_path))
    assert (
        list(found.table["place"]) == ["alpha 1", "alpha 2"] and found.verdict.word == "supported"
    )
    assert found.table["mean"].to_numpy() == pytest.approx([10 / 7 - 10] * 2)
    assert (found.table["n"] == 4).all() and "alpha 2: −8.57" in places_text(said, found)
    limit = of_worlds(("FT", {"depth": None}), over=("FT", {"depth": 1}), below=0.5)
    (first, second) = answer(limit, Grid(tmp_path)).table.to_dict("records")
    assert first["mean"] == pytest.approx(1.15 / 11.15) and second["mean"] == pytest.approx(
        2.15 / 12.15
    )
    pair = of_worlds(
        ("FT", {"depth": 1, "alpha": 2.0}), ("FT", {"depth": 7, "alpha": 1.0}), above=0
    )
    (row,) = answer(pair, Grid(tmp_path)).table.to_dict("records")
    assert row["place"] == "random worlds" and row["mean"] == pytest.approx(12 - 1 - 10 / 7)
    rival = of_worlds(("scratch", None), ("FT", None), at_least=0)
    (row,) = answer(rival, Grid(tmp_path)).table.to_dict("records")  # the one world of both
    assert row["mean"] == 0 and row["n"] == 4


def test_a_world_that_one_side_lacks_is_no_place_and_few_seeds_cannot_tell(tmp_path):
    worlds(tmp_path, alpha=1.0, depth=1), worlds(tmp_path, alpha=1.0, depth=7, seeds=2)
    worlds(tmp_path, alpha=2.0, depth=1)
    said = of_worlds(("FT", {"depth": 7}), ("FT", {"depth": 1}), below=0)
    found = answer(said, Grid(tmp_path))
    assert found.table[["place", "n", "aside"]].values.tolist() == [
        ["random worlds", 2, "2 replicates"]
    ]
    assert found.verdict.word == "not testable"
    none = answer(of_worlds(("FT", {"depth": 5}), below=0), Grid(tmp_path))
    assert none.table.empty and none.verdict.word == "not testable"


def test_a_side_that_leaves_a_setting_open_is_refused(tmp_path):
    worlds(tmp_path, depth=1), worlds(tmp_path, depth=7)
    with pytest.raises(ValueError, match="one number a seed"):
        answer(of_worlds(("FT", {"depth": 7}), ("FT", None), below=0), Grid(tmp_path))


def test_sides_that_never_differ_are_open_where_the_bound_is_strict(tmp_path):
    for seed in range(3):
        rows = [("FT", "test", "feature_change", 1.0)]
        for method in ("FT", "LP-FT"):
            write(tmp_path, method, seed, rows=rows)
    for bound, word in (("above", "open"), ("below", "open"), ("at_least", "supported")):
        said = part(("LP-FT", "feature_change"), ("FT", "feature_change"), **{bound: 0})
        assert answer(said, Grid(tmp_path)).verdict.word == word


def test_what_no_record_holds_is_not_testable(folder):
    for said in (
        {"says": "…", "undecided": "no threshold is stated"},
        part(("LP-FT", "fisher_ratio"), ("FT", "fisher_ratio"), below=0),
        part(("LP-LoRA", "accuracy"), ("LoRA", "accuracy"), below=0),
        part(("FT", "F/rank"), experiment="tangent_kernel", split="train", above=0),
    ):
        found = answer(said, Grid(folder))
        assert found.verdict.word == "not testable" and found.table.empty
        assert places_text(said, found) == found.verdict.places


@pytest.mark.parametrize(
    "change, message",
    [
        ({"abov": 0}, "abov"),
        ({}, "expected one of above, below"),
        ({"above": 0, "over": {"method": "FT", "metric": "accuracy"}}, "minus or over, got both"),
        ({"above": 0, "minus": {"method": "LPFT", "metric": "accuracy"}}, "LPFT"),
        ({"above": 0, "experiment": "lpft"}, "lpft"),
        ({"above": 0, "of": {"method": "others", "metric": "accuracy"}}, "compared with"),
        ({"above": 0, "slope": "head_scale", "where": {"head_scale": [1]}}, "or slope"),
        ({"above": 0, "of": {"method": "FT", "metric": "risk", "at": {"depth": 1}}}, "at which"),
        ({"above": 0, "of": {"method": "scratch", "metric": "risk"}}, "scratch"),
        ({"above": 0, "experiment": "linear_teachers", "slope": "depth"}, "with `at`"),
        (
            {
                "above": 0,
                "experiment": "linear_teachers",
                "minus": {"method": "others", "metric": "risk"},
            },
            "others",
        ),
    ],
)
def test_a_part_that_says_nothing_or_too_much_is_refused(change, message):
    said = part(("LP-FT", "accuracy"), ("FT", "accuracy"))
    with pytest.raises(ValueError, match=message):
        read_comparison(said | change)


@pytest.mark.parametrize(
    ("seed", "change", "message"),
    [
        (0, {"rate": 1e-2}, "one setting of FT"),
        (7, {"rate": 1e-2}, "one setting of FT"),
        (7, {"texts": "e"}, "one fingerprint"),
    ],
)
def test_runs_of_other_settings_or_texts_are_refused(folder, seed, change, message):
    write(folder, "FT", seed, rows=[("FT", "test", "feature_change", 1.0)], **change)
    for metric in ("feature_change", "accuracy"):
        with pytest.raises(ValueError, match=message):
            answer(part(("FT", metric), above=0), Grid(folder))


def test_runs_with_other_labels_are_refused(folder, monkeypatch):
    def turned(*given):
        logits, labels = scores_of(*given)
        return logits, {split: 1 - one for split, one in labels.items()}

    scores_of = scores
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "scores", turned)
        write(folder, "FT", 9, rows=[("FT", "test", "feature_change", 5.0)])
    with pytest.raises(ValueError, match="other labels"):
        answer(part(("FT", "accuracy"), above=0), Grid(folder))


def test_the_hardest_of_the_others_is_the_smallest_where_the_part_says_below(folder):
    for method, value in (("LoRA", 0.5), ("LP-LoRA", 9.0)):
        for seed in range(4):
            write(folder, method, seed, rows=[("FT", "test", "feature_change", value + 0.1 * seed)])
    for bound, rival in (("below", "LoRA"), ("above", "LP-LoRA")):
        others = part(("LP-FT", "feature_change"), ("others", "feature_change"), **{bound: 0})
        alone = part(("LP-FT", "feature_change"), (rival, "feature_change"), **{bound: 0})
        assert answer(others, Grid(folder)).table.equals(answer(alone, Grid(folder)).table)


def test_a_rate_at_an_end_counts_for_the_methods_that_are_compared(folder):
    """LP-LoRA is at an end; it matters only where it is the best of the others."""
    for seed in range(4):
        write(folder, "LoRA", seed, skill=4.0)
        write(folder, "LP-LoRA", seed, skill=1.0, rows=[("FT", "test", "feature_change", 1.0)])
    for rate in (1e-4, 1e-3):
        value = ("FT", "validation", "accuracy", 0.5)
        write(folder / "tries", "LP-LoRA", 9, rate=rate, rows=[value])
    said = part(("LP-FT", "accuracy"), ("others", "accuracy"), above=0)
    assert ("easy", "LP-LoRA") in Grid(folder).at_end
    assert answer(said, Grid(folder)).table["aside"].item() == ""
    direct = part(("LP-FT", "accuracy"), ("LP-LoRA", "accuracy"), above=0)
    assert answer(direct, Grid(folder)).table["aside"].item() == "end of the grid: LP-LoRA"


def test_a_missing_rival_is_said(folder):
    said = part(("LP-FT", "accuracy"), ("others", "accuracy"), above=0)
    found = answer(said, Grid(folder))
    assert found.table["aside"].item() == "no runs of LoRA and LP-LoRA"
    assert found.verdict.word == "not testable"


@pytest.mark.parametrize(("accuracies", "end"), [((0.5, 0.8, 0.7), False), ((0.8, 0.8, 0.7), True), ((0.5, 0.8, 0.8), True)])  # fmt: skip
def test_a_rate_that_ties_with_an_end_is_an_end(folder, accuracies, end):
    for rate, value in zip((1e-4, 1e-3, 1e-2), accuracies, strict=True):
        write(folder / "tries", "FT", 9, rate=rate, rows=[("FT", "validation", "accuracy", value)])
    assert (("easy", "FT") in Grid(folder).at_end) == end


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim["number"])
def test_every_part_in_the_file_is_read(claim):
    for name, said in claim["parts"].items():
        if claim["kind"] == "exact":
            assert set(said) == {"says"}
        else:
            found = read_comparison(said)
            assert isinstance(found, str | Comparison), name


def test_a_place_of_another_model_is_named_with_it(folder):
    grid = Grid(folder)
    assert grid.place("cb", "sentence-transformers/all-MiniLM-L6-v2") == "cb"
    assert grid.place("cb", "sentence-transformers/all-mpnet-base-v2") == "cb, all-mpnet-base-v2"
    comparison = Comparison(of=Side("FT", "feature_change"), above=0)
    found = number_of(grid, comparison, rows=grid.of("lp_ft"), place="none", split="test")
    assert found.seeds == 0 and math.isnan(found.interval.mean)


def test_the_register_has_a_line_for_each_part_and_says_what_answer_says(folder):
    said = part(("LP-FT", "feature_change"), ("FT", "feature_change"), below=0)
    claims = [
        {"kind": "exact", "parts": {"A1": {"says": "a sum"}}},
        {
            "kind": "measured",
            "parts": {"A5a": said, "A7d": {"says": "…", "undecided": "no tolerance"}},
        },
    ]
    lines = register(claims, Grid(folder)).set_index("part")
    assert list(lines.index) == ["A1", "A5a", "A7d"]
    assert lines.loc["A1", "verdict"] == "supported" and "proved" in lines.loc["A1", "numbers"]
    assert lines.loc["A5a", "verdict"] == "supported"
    assert (
        lines.loc["A5a", "numbers"].startswith("easy: −4.3")
        and "n 4" in lines.loc["A5a", "numbers"]
    )
    assert lines.loc["A7d", "numbers"] == "no tolerance"
