"""Claims about collapse answered from made-up records: the right correlation, difference and slope, the right word, and what is set aside."""

import itertools
import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.stats import spearmanr
from toy_records import SURROUNDINGS

from conftest import ROOT
from lpft_nb.lab.answers import answer, places_text
from lpft_nb.lab.collapse_answers import collapse_ends, crossed_rank_correlation
from lpft_nb.lab.comparisons import Grid, read_comparison
from lpft_nb.records import make_record, write_record

CLAIMS = yaml.safe_load((ROOT / "nbs" / "claims.yml").read_text(encoding="utf-8"))
PARTS = {
    name: part
    for claim in CLAIMS
    for name, part in claim["parts"].items()
    if claim["paper"] == "E" and claim["kind"] == "measured"
}
MINILM, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
KINDS = [("pretrained", 3), ("fresh 1", 3), ("fresh 2", 3), ("random", 3)]


def write(folder, method, seed, *, share=1.0, right=0.8, rows=(), task="easy", model=MINILM, rate=1e-3, texts="f", **parameters):  # fmt: skip
    """One record whose test answers are right to a share, with rows (stage, split, metric, value)."""
    sizes = {"train": round(100 * share), "validation": 20, "test": 100, "ood/other": 50}
    stages = list(dict.fromkeys([stage for stage, *_ in rows if "/" in stage] + [method]))
    rows = [*rows, (method, "test", "accuracy", right)]
    arrays = {}
    for split in ("validation", "test", "ood/other"):
        truth = torch.arange(sizes[split]) % 2
        good = torch.arange(sizes[split]) < round(right * sizes[split])
        answers = torch.where(good, truth, 1 - truth)
        arrays[f"labels/{split}"] = truth
        arrays[f"logits/{method}/{split}"] = 2.0 * torch.nn.functional.one_hot(answers, 2).float()
    record = make_record(
        experiment="neural_collapse", method=method, seed=seed,
        parameters={"task": task, "fraction": share, "learning_rate": rate} | parameters,
        task={"name": task, "fingerprint": texts * 16, "sizes": sizes},
        model={"id": model, "revision": None, "sha256": None, "pooling": "mean", "max_length": 16},
        stages=[{"name": stage} for stage in stages],
        metrics=[dict(zip(("stage", "split", "metric", "value"), row, strict=True)) for row in rows],
        surroundings=SURROUNDINGS,
    )  # fmt: skip
    kinds = {name: "example" for name in arrays if name.startswith("labels/")}
    write_record(record, arrays, folder / "neural_collapse", kinds)


def frozen(cases, noise=0.0):
    """Rows of frozen features: (kind, layer, pooling) -> what is measured, by metric or (split, metric)."""
    rows = []
    for (kind, layer, pooling), values in cases.items():
        stage = f"{kind}/layer {layer}/{pooling}"
        for name, value in values.items():
            split, metric = name if isinstance(name, tuple) else ("train", name)
            rows.append((stage, split, metric, value + noise * (metric == "accuracy")))
    return rows


def models(sign, *, seeds=4, folder, shift=1, **more):
    """Eight last layers of two backbones: accuracy rises as NC1 falls, times a sign; out of distribution times another."""
    for model, seed in itertools.product((MINILM, MPNET), range(seeds)):
        cases = {}
        for place, ((kind, layer), pooling) in enumerate(itertools.product(KINDS, ("cls", "mean"))):
            rank = place + 8 * (model == MPNET)
            cases[kind, layer, pooling] = {
                "nc1": 20.0 - rank,
                ("test", "accuracy"): 0.7 + 0.01 * sign * rank,
                ("ood/other", "accuracy"): 0.7 + 0.01 * shift * rank,
            }
        cases["pretrained", 0, "mean"] = {"nc1": 0.1, ("test", "accuracy"): 0.1}  # no last layer
        write(folder, "LP", seed, model=model, rows=frozen(cases, noise=0.001 * seed), **more)


def verdict(name, folder, **options):
    return answer(PARTS[name], Grid(folder, **options)).verdict.word


# --- correlations ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(some.data())
def test_a_drawn_rank_correlation_is_scipys_of_the_drawn_cases(data):
    rows, cases = data.draw(some.integers(1, 3)), data.draw(some.integers(2, 9))
    table = some.lists(some.integers(0, 4), min_size=rows * cases, max_size=rows * cases)
    left, right = (np.array(data.draw(table), dtype=float).reshape(rows, cases) for _ in range(2))
    drawn = data.draw(some.lists(some.integers(0, cases - 1), min_size=cases, max_size=cases))
    counts = np.bincount(drawn, minlength=cases)[None]
    found = crossed_rank_correlation(left, right).of_rows(counts.astype(float))[0]
    for row in range(rows):
        sides = [np.repeat(one[row], counts[0]) for one in (left, right)]
        constant = any(np.ptp(side) == 0 for side in sides)
        expected = 0.0 if constant else spearmanr(*sides)[0]
        assert found[row] == pytest.approx(expected, abs=1e-9)


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        crossed_rank_correlation(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="finite"):
        crossed_rank_correlation(np.full((1, 3), np.nan), np.zeros((1, 3)))


def test_models_are_the_last_layers_of_all_backbones(tmp_path):
    models(1, folder=tmp_path)
    (row,) = answer(PARTS["E1a"], Grid(tmp_path)).table.to_dict("records")
    assert row["place"] == "easy" and row["n"] == 4 and row["aside"] == ""
    assert row["mean"] == pytest.approx(-1) and -1 <= row["low"] <= row["high"] < 0
    assert verdict("E1a", tmp_path) == "supported"


def test_the_other_direction_contradicts_and_out_of_distribution_is_another_number(tmp_path):
    models(-1, folder=tmp_path)
    assert verdict("E1a", tmp_path) == "contradicted"
    assert verdict("E1b", tmp_path) == "supported" and verdict("E1c", tmp_path) == "contradicted"
    (row,) = answer(PARTS["E1b"], Grid(tmp_path)).table.to_dict("records")
    assert row["place"] == "easy on other" and row["mean"] == pytest.approx(-1)
    models(1, folder=tmp_path / "hurts", shift=-1)
    assert verdict("E1b", tmp_path / "hurts") == "contradicted"
    assert verdict("E1c", tmp_path / "hurts") == "supported"


def test_no_relation_is_open(tmp_path):
    generator = np.random.default_rng(3)
    for seed in range(4):
        cases = {
            (kind, layer, pooling): {
                "nc1": float(place % 4),
                ("test", "accuracy"): 0.7 + 0.02 * float(generator.normal()),
            }
            for place, ((kind, layer), pooling) in enumerate(itertools.product(KINDS, ("cls", "mean")))
        }  # fmt: skip
        write(tmp_path, "LP", seed, rows=frozen(cases))
    assert verdict("E1a", tmp_path) == "open"


def test_what_cannot_tell_is_set_aside_with_its_reason(tmp_path):
    models(1, folder=tmp_path / "two", seeds=2)
    found = answer(PARTS["E1a"], Grid(tmp_path / "two"))
    assert found.verdict == ("not testable", "cannot tell: easy (2 replicates)")
    for seed in range(3):
        few = {(kind, 3, "mean"): {"nc1": 1.0, ("test", "accuracy"): 0.9} for kind, _ in KINDS}
        write(tmp_path / "few", "LP", seed, rows=frozen(few))
        write(tmp_path / "far", "LP", seed, rows=frozen(few), task="cb")
    found = answer(PARTS["E1a"], Grid(tmp_path / "few"))
    assert found.verdict == ("not testable", "cannot tell: easy (4 kinds of features)")
    assert places_text(PARTS["E1a"], found) == "easy (4 kinds of features)"
    assert verdict("E1b", tmp_path / "far") == "not testable"  # no shifted test set
    for model, seed in itertools.product((MINILM, MPNET), range(3)):
        cases = {
            (kind, layer, pooling): {"nc1": place + seed, ("test", "accuracy"): 0.5 + 0.001 * place}
            for place, ((kind, layer), pooling) in enumerate(itertools.product(KINDS, ("cls", "mean")))
        }  # fmt: skip
        write(tmp_path / "chance", "LP", seed, model=model, rows=frozen(cases))
    found = answer(PARTS["E1a"], Grid(tmp_path / "chance"))
    assert found.verdict == ("not testable", "cannot tell: easy (at chance)")


def test_layers_are_those_of_one_backbone_read_out_as_it_reads_itself(tmp_path):
    for seed in range(3):
        cases = {}
        for layer in range(8):
            good = {"nc1": 10.0 - layer, ("test", "accuracy"): 0.6 + 0.02 * layer}
            bad = {"nc1": 10.0 - layer, ("test", "accuracy"): 0.9 - 0.02 * layer}
            cases["pretrained", layer, "mean"], cases["pretrained", layer, "cls"] = good, bad
            cases["random", layer, "mean"] = bad
        for model in (MINILM, MPNET):
            write(tmp_path, "LP", seed, model=model, rows=frozen(cases))
    table = answer(PARTS["E3"], Grid(tmp_path)).table
    assert list(table["place"]) == ["easy", f"easy, {MPNET}"]
    assert table["mean"].to_numpy() == pytest.approx([-1, -1])
    assert verdict("E3", tmp_path) == "supported"


def test_checkpoints_compare_both_collapses(tmp_path):
    for seed in range(3):
        cases = {}
        for place, kind in enumerate(
            ["pretrained", *(f"source {epochs}" for epochs in range(1, 8))]
        ):
            cases[kind, 3, "mean"] = {
                "nc1": 10.0 - place,
                "source_nc1": 1.0 + place,
                ("test", "accuracy"): 0.6 + 0.02 * place,
            }
        cases["fresh 1", 3, "mean"] = {"nc1": 99.0, ("test", "accuracy"): 0.99}
        write(tmp_path, "LP", seed, rows=frozen(cases))
    (row,) = answer(PARTS["E2"], Grid(tmp_path)).table.to_dict("records")
    assert row["mean"] == pytest.approx(2) and row["aside"] == "" and row["low"] > 0
    assert verdict("E2", tmp_path) == "supported"
    models(1, folder=tmp_path / "none")
    found = answer(PARTS["E2"], Grid(tmp_path / "none"))
    assert found.verdict.word == "not testable" and "no source_nc1" in found.verdict.places


# --- methods at shares ----------------------------------------------------------------------------------------------

SHARES = (1.0, 0.3, 0.1)


def methods(
    folder, gain, *, seeds=4, shares=SHARES, base=0.8, rows=lambda method, seed: (), **more
):
    """FT at an accuracy, SCL-FT above it by a gain at each share; training texts differ by seed below a share of one."""
    for seed, share in itertools.product(range(seeds), shares):
        for method in ("FT", "SCL-FT"):
            right = base + 0.01 * (seed % 2) + (gain(share) if method == "SCL-FT" else 0)
            texts = "f" if share == 1 else "abcdef"[seed]
            write(folder, method, seed, share=share, right=right, texts=texts, rows=rows(method, seed), **more)  # fmt: skip


def test_accuracies_at_one_share_are_paired_over_seeds_and_examples(tmp_path):
    methods(tmp_path, lambda share: 0.05 if share == 1 else -0.4)
    (row,) = answer(PARTS["E4a"], Grid(tmp_path)).table.to_dict("records")
    assert row["mean"] == pytest.approx(0.05) and row["n"] == 4 and row["aside"] == ""
    assert verdict("E4a", tmp_path) == "supported"
    methods(tmp_path / "worse", lambda share: -0.2)
    assert verdict("E4a", tmp_path / "worse") == "contradicted"
    methods(tmp_path / "near", lambda share: -0.02)
    assert verdict("E4a", tmp_path / "near") == "open"
    methods(tmp_path / "chance", lambda share: 0.0, base=0.49)
    assert verdict("E4a", tmp_path / "chance") == "not testable"


def test_numbers_of_runs_are_those_of_the_share(tmp_path):
    sizes = {"FT": 1000.0, "SCL-FT": 80.0}
    methods(tmp_path, lambda share: 0.0, rows=lambda method, seed: [(method, "stage", "trainable_parameters", sizes[method])])  # fmt: skip
    (row,) = answer(PARTS["E4b"], Grid(tmp_path)).table.to_dict("records")
    assert row["mean"] == row["high"] == pytest.approx(0.08)
    assert verdict("E4b", tmp_path) == "supported"
    for seed, (method, value) in itertools.product(range(4), (("LP", 2.0), ("LayerFT", 0.5), ("SCL-FT", 1.0))):  # fmt: skip
        for share in (1.0, 0.3):
            row = (method, "train", "nc1", (value + 0.01 * seed) * (1 if share == 1 else 100))
            texts = "f" if share == 1 else "abcdef"[seed]
            write(tmp_path / "nc1", method, seed, share=share, rows=[row], texts=texts)
    (row,) = answer(PARTS["E4c"], Grid(tmp_path / "nc1")).table.to_dict("records")
    assert row["mean"] == pytest.approx(1.015 / 2.015)
    assert verdict("E4c", tmp_path / "nc1") == "supported"
    assert verdict("E4d", tmp_path / "nc1") == "contradicted"


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        (lambda share: -0.1 * math.log10(share), "supported"),
        (lambda share: 0.1 + 0.1 * math.log10(share), "contradicted"),
        (lambda share: 0.05, "open"),
    ],
)
def test_the_gain_has_a_slope_over_the_logarithm_of_the_shares(tmp_path, gain, word):
    methods(tmp_path, gain)
    (row,) = answer(PARTS["E5"], Grid(tmp_path)).table.to_dict("records")
    gains = [round(100 * (0.8 + gain(share))) / 100 - 0.8 for share in SHARES]
    assert row["mean"] == pytest.approx(np.polyfit(np.log10(SHARES), gains, 1)[0], abs=0.006)
    assert row["n"] == 4 and verdict("E5", tmp_path) == word


def test_a_slope_needs_two_shares_and_seeds_that_have_all_of_them(tmp_path):
    methods(tmp_path / "one", lambda share: 0.1, shares=(1.0,))
    assert verdict("E5", tmp_path / "one") == "not testable"
    methods(tmp_path / "some", lambda share: 0.1)
    next((tmp_path / "some" / "neural_collapse").glob("*SCL-FT-s0*.json")).unlink()
    (row,) = answer(PARTS["E5"], Grid(tmp_path / "some")).table.to_dict("records")
    assert row["n"] == 3


@pytest.mark.parametrize(("values", "end"), [((0.5, 0.9, 0.6), False), ((0.5, 0.9, 0.9), True)])
def test_a_rate_at_an_end_counts_at_its_share_only(tmp_path, values, end):
    methods(tmp_path, lambda share: 0.0, rate=1e-3)
    for rate, value in zip((1e-4, 1e-3, 1e-2), values, strict=True):
        row = ("FT", "validation", "accuracy", value)
        write(tmp_path / "tries", "FT", 9, share=0.3, rate=rate, rows=[row], texts="t")
    assert collapse_ends(Grid(tmp_path)) == ({("easy", 0.3, "FT")} if end else set())
    asides = [answer(PARTS[name], Grid(tmp_path)).table["aside"].item() for name in ("E4a", "E5")]
    assert asides == ["", "end of the grid: FT" if end else ""]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_other_texts_are_refused_but_for_shares_drawn_by_the_seed(tmp_path):
    methods(tmp_path, lambda share: 0.0)
    assert len(Grid(tmp_path).of("neural_collapse")["fingerprint"].unique()) == 5
    write(tmp_path, "LP", 0, share=0.3, texts="z")
    with pytest.raises(ValueError, match="one fingerprint"):
        Grid(tmp_path).of("neural_collapse")
    methods(tmp_path / "whole", lambda share: 0.0)
    write(tmp_path / "whole", "LP", 5, texts="z")
    with pytest.raises(ValueError, match="one fingerprint"):
        Grid(tmp_path / "whole").of("neural_collapse")


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_two_settings_of_a_method_are_refused(tmp_path, share):
    methods(tmp_path, lambda share: 0.0)
    write(tmp_path, "FT", 5, share=share, rate=1e-2, texts="f" if share == 1 else "e")
    with pytest.raises(ValueError, match="one setting of FT"):
        Grid(tmp_path).of("neural_collapse")


def test_backbones_that_saw_other_texts_are_refused(tmp_path):
    models(1, folder=tmp_path)
    cases = {("pretrained", 3, "mean"): {"nc1": 1.0, ("test", "accuracy"): 0.9}}
    write(tmp_path, "LP", 0, model="third", texts="z", rows=frozen(cases))
    with pytest.raises(ValueError, match="same texts for all backbones"):
        answer(PARTS["E1a"], Grid(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": {"method": "SCL-FT", "metric": "accuracy"}}, "expected one share for all sides"),
        ({"of": {"method": "SCL-FT", "metric": "accuracy", "at": {"fraction": 0.3}}}, "one share"),
        ({"of": {"method": "LP", "metric": "rank_correlation/nc1"}}, "expected LP and rank_corr"),
        ({"of": {"method": "FT", "metric": "rank_correlation/models/nc1"}}, "expected LP"),
        ({"of": {"method": "LP", "metric": "rank_correlation/worlds/nc1"}, "minus": None}, "worlds"),
        ({"slope": "depth"}, "with `at`"),
        ({"minus": {"method": "others", "metric": "accuracy"}}, "others"),
    ],
)  # fmt: skip
def test_a_part_that_says_too_little_is_refused(tmp_path, change, message):
    methods(tmp_path, lambda share: 0.0)
    said = {name: one for name, one in (PARTS["E4a"] | change).items() if one is not None}
    with pytest.raises(ValueError, match=message):
        answer(said, Grid(tmp_path))


@pytest.mark.parametrize("name", PARTS)
def test_without_records_every_part_is_not_testable(tmp_path, name):
    assert verdict(name, tmp_path) == "not testable"
    assert not isinstance(read_comparison(PARTS[name]), str)
