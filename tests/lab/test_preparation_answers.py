"""Paper B's claims answered from made-up records: the right numbers by hand, the right word, and what is set aside."""

import numpy as np
import pytest
import torch
import yaml
from toy_records import SURROUNDINGS

from conftest import ROOT
from lpft_nb.evidence import crossed_interval
from lpft_nb.lab.answers import answer, places_text, register
from lpft_nb.lab.comparisons import Grid, read_comparison
from lpft_nb.lab.head_preparation import CURVES, check_curve
from lpft_nb.lab.preparation_answers import PLAIN, STATISTICS
from lpft_nb.records import make_record, write_record

LENGTHS = (0, 4, 16, 64, 199, None)
ENERGY = np.array([1.0, 0.6, 0.4, 0.3, 0.2, 0.05])
CLAIMS = yaml.safe_load((ROOT / "nbs" / "claims.yml").read_text(encoding="utf-8"))
PARTS = {name: part for claim in CLAIMS for name, part in claim["parts"].items()}
EXAMPLES = {"validation": 40, "test": 60}


def answers_of(accuracy, split, seed):
    "Logits and labels of which a share is right; which of them, the seed says."
    count = EXAMPLES[split]
    labels = torch.arange(count) % 2
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    right = torch.zeros(count, dtype=torch.bool)
    right[order[: round(accuracy * count)]] = True
    given = torch.where(right, labels, 1 - labels)
    return 3.0 * torch.nn.functional.one_hot(given, 2).float(), labels


def write(folder, seed, task="toy", *, curves=None, rate=1e-4, where="head_preparation", fits=1.0, validation=None, test=None, brier=0.3, **settings):  # fmt: skip
    "The records of one seed: a curve of each measure over LENGTHS, and the answers of each length."
    curves = {"feature_change": 10 * ENERGY} | (curves or {})
    validation = np.full(6, 0.8) if validation is None else validation
    test = np.full(6, 0.8) if test is None else test
    for place, length in enumerate(LENGTHS):
        values = {
            ("LP", "train", "energy"): ENERGY[place],
            ("LP", "train", "accuracy"): fits if length is None else 0.7,
            ("FT", "validation", "accuracy"): validation[place],
            ("FT", "test", "accuracy"): test[place],
            ("FT", "validation", "brier"): brier,
            ("FT", "train", "mean_cosine_to_reference"): 1 - 0.1 * ENERGY[place],
        }
        values |= {("FT", "train", name): curve[place] for name, curve in curves.items()}
        arrays = {}
        for split, shares in (("validation", validation), ("test", test)):
            logits, labels = answers_of(shares[place], split, seed)
            arrays |= {f"logits/FT/{split}": logits, f"labels/{split}": labels}
        rates = rate if isinstance(rate, dict) else {length: rate}
        record = make_record(
            experiment="head_preparation", method="LP-FT", seed=seed,
            parameters={"task": task, "epochs": 1.0, "learning_rate": rates[length]} | PLAIN | {"probe_epochs": length} | settings,
            task={"name": task, "fingerprint": "f" * 16, "sizes": {"train": 10, **EXAMPLES}},
            model={"id": "all-MiniLM-L6-v2", "revision": None, "sha256": None, "pooling": "mean", "max_length": 16},
            stages=[{"name": "LP"}, {"name": "FT"}],
            metrics=[dict(zip(("stage", "split", "metric"), key), value=float(value)) for key, value in values.items()],
            surroundings=SURROUNDINGS,
        )  # fmt: skip
        kinds = {name: "example" for name in arrays if name.startswith("labels/")}
        write_record(record, arrays, folder / where, kinds)


def part(metric, curve, **bounds):
    said = {"says": "…", "experiment": "head_preparation", "curve": curve}
    return said | {"of": {"method": "LP-FT", "metric": metric}} | bounds


def row_of(folder, metric, curve, **bounds):
    found = answer(part(metric, curve, **(bounds or {"above": 0})), Grid(folder))
    (row,) = found.table.to_dict("records")
    return row, found.verdict.word


def test_every_curve_is_a_number_that_can_be_worked_out_by_hand(tmp_path):
    shift = np.array([0.0, 1.0, 2.0, 5.0])
    dots = np.array([1.0, 1.3, 1.6, 1.2, 1.1, 1.0])  # highest after 16
    for seed in range(4):
        curves = {"feature_change": (10 + shift[seed]) * ENERGY, "dot_to_reference": dots + 0.01 * seed, "mean_norm": ENERGY}  # fmt: skip
        write(tmp_path, seed, curves=curves)
    row, word = row_of(tmp_path, "start energy", "largest_step", below=0)
    assert row["mean"] == pytest.approx(np.diff(ENERGY).max()) and word == "supported"
    row, word = row_of(tmp_path, "distance", "largest_step", below=0)
    numbers = (10 + shift) * np.diff(ENERGY).max()
    expected = crossed_interval(numbers[:, None])
    assert [row[name] for name in ("mean", "low", "high")] == pytest.approx(list(expected))
    assert row_of(tmp_path, "distance", "order")[0]["mean"] == pytest.approx(1)
    assert row_of(tmp_path, "cosine distance", "order")[0]["mean"] == pytest.approx(1)
    row, word = row_of(tmp_path, "dot product", "inner_peak")
    assert row["mean"] == pytest.approx(0.6) and word == "supported"
    assert row_of(tmp_path, "norm", "inner_peak")[0]["mean"] == pytest.approx(0.6 - 1.0)
    assert row_of(tmp_path, "norm", "inner_peak")[1] == "contradicted"
    assert row_of(tmp_path, "distance", "end_share", below=0.5)[0]["mean"] == pytest.approx(0.05)
    inner = ENERGY[1:-1].mean() / ENERGY[-1]
    assert row_of(tmp_path, "distance", "inner_share", above=1)[0]["mean"] == pytest.approx(inner)
    assert row_of(tmp_path, "distance", "log_slope")[0]["mean"] == pytest.approx(1)


def test_the_peak_is_looked_up_on_the_other_seeds(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(6, 6))
    for seed, values in enumerate(noise):
        write(tmp_path, seed, curves={"dot_to_reference": values})
    expected = []
    for seed in range(6):
        others = np.mean([noise[one] for one in range(6) if one != seed], axis=0)
        best = max(range(1, 5), key=lambda place: others[place])
        expected.append(noise[seed, best] - max(noise[seed, 0], noise[seed, 5]))
    row, _ = row_of(tmp_path, "dot product", "inner_peak")
    assert row["mean"] == pytest.approx(np.mean(expected))


def test_a_gain_is_chosen_on_validation_and_judged_on_test(tmp_path):
    "The length that is best on validation is not the one that is best on test."
    validation = np.array([0.5, 0.6, 0.9, 0.7, 0.7, 0.6])
    test = np.array([0.55, 0.9, 0.8, 0.8, 0.8, 0.6])
    for seed in range(4):
        write(tmp_path, seed, validation=validation, test=test)
    row, word = row_of(tmp_path, "accuracy", "inner_gain")
    assert row["mean"] == pytest.approx(0.8 - 0.6) and row["low"] < 0.2 < row["high"]
    right = [[(answers_of(share, "test", seed)[0].argmax(1) == torch.arange(60) % 2).numpy() for seed in range(4)] for share in (0.8, 0.6)]  # fmt: skip
    expected = crossed_interval(*map(np.stack, right))
    assert [row[name] for name in ("mean", "low", "high")] == pytest.approx(list(expected))
    assert word == "supported"
    said = part("accuracy", "inner_gain", above=0)
    assert "+20.0" in places_text(said, answer(said, Grid(tmp_path)))


def test_equal_validation_takes_the_shorter_probe(tmp_path):
    test = np.array([0.6, 0.7, 0.9, 0.9, 0.9, 0.9])
    for seed in range(3):
        write(tmp_path, seed, validation=np.full(6, 0.75), test=test)
    row, _ = row_of(tmp_path, "accuracy", "inner_gain")
    assert row["mean"] == pytest.approx(0.7 - 0.6)


def test_a_noisy_curve_is_open(tmp_path):
    for seed, sign in enumerate((1, -1, 1, -1)):
        write(tmp_path, seed, curves={"feature_change": 5 + sign * ENERGY})
    assert row_of(tmp_path, "distance", "order")[1] == "open"


def test_places_that_cannot_tell_say_why(tmp_path):
    for seed in range(3):
        write(tmp_path, seed, "loose", fits=0.9)
        write(tmp_path, seed, "chance", test=np.full(6, 0.5), validation=np.full(6, 0.5))
        if seed < 2:
            write(tmp_path, seed, "few")
    for rate in (1e-5, 1e-4):
        write(tmp_path / "tries", 9, "loose", rate=rate)
    for seed in range(3):
        write(tmp_path, seed, "inside")
    for rate, brier in ((1e-5, 0.4), (1e-4, 0.3), (1e-3, 0.4)):  # at equal accuracy
        write(tmp_path / "tries", 9, "inside", rate=rate, brier=brier)
    aside = lambda *asked, **bound: answer(part(*asked, **bound), Grid(tmp_path)).table.set_index("place")["aside"]  # fmt: skip
    order = aside("distance", "order", above=0)
    assert order["loose"] == "end of the grid: LP-FT" and order["chance"] == "at chance"
    assert order["few"] == "2 replicates" and order["inside"] == ""
    share = aside("distance", "end_share", below=0.5)
    assert "reaches 90% of the training set" in share["loose"]
    energy = aside("start energy", "largest_step", below=0)  # stands before any training
    assert energy["loose"] == "" and energy["chance"] == "" and energy["few"] == "2 replicates"


def test_without_both_ends_there_is_no_share(tmp_path):
    for seed in range(3):
        write(tmp_path, seed)
    for path in (tmp_path / "head_preparation").glob("*.json"):
        if '"probe_epochs": 0' in path.read_text() or '"probe_epochs":0' in path.read_text():
            path.unlink()
    row, word = row_of(tmp_path, "distance", "end_share", below=0.5)
    assert "no run without a probe" in row["aside"] and word == "not testable"


def test_other_preparations_are_no_part_of_a_curve_and_other_settings_are_refused(tmp_path):
    for seed in range(3):
        write(tmp_path, seed)
        write(tmp_path, seed, smoothing=0.2, curves={"feature_change": np.full(6, 99.0)})
    row, _ = row_of(tmp_path, "distance", "end_share", below=0.5)
    assert row["mean"] == pytest.approx(0.05) and row["n"] == 3
    for seed in range(3):
        write(tmp_path, seed, "other", rate=dict(zip(LENGTHS, (1e-4, 1e-4, 1e-3, 1e-4, 1e-4, 1e-4))))  # fmt: skip
    found = answer(part("distance", "order", above=0), Grid(tmp_path, tasks=("other",)))
    assert found.table["mean"].item() == pytest.approx(1)  # each length has its tuned rate
    write(tmp_path, 7, epochs=3.0)
    with pytest.raises(ValueError, match="one setting"):
        row_of(tmp_path, "distance", "order")


def test_smoothing_is_compared_with_the_plain_converged_probe_of_its_seed(tmp_path):
    for seed in range(3):
        write(tmp_path, seed)  # 0.5 after the converged probe
    row, word = row_of(tmp_path, "distance", "smoothed_share", above=1)
    assert word == "not testable" and "smoothed" in row["aside"]
    for seed in range(3):
        for share, far in ((0.1, 1.0), (0.3, 2.0 + seed)):
            moved = {"feature_change": np.full(6, far)}
            write(tmp_path, seed, smoothing=share, curves=moved)
    write(tmp_path, 0, smoothing=0.5, head_scale=2.0, curves={"feature_change": np.full(6, 99.0)})
    write(tmp_path, 9, smoothing=0.1)  # a seed without the other share and without a plain probe
    row, word = row_of(tmp_path, "distance", "smoothed_share", above=1)
    expected = crossed_interval(np.array([[3.0], [4.0], [5.0]]))  # means 1.5, 2, 2.5 over 0.5
    assert (row["mean"], row["n"]) == (pytest.approx(expected.mean), 3)
    assert (row["low"], row["high"]) == pytest.approx(expected[1:]) and word == "supported"


def test_smoothing_speaks_of_probes_that_fit(tmp_path):
    for seed in range(3):
        write(tmp_path, seed, fits=0.9)
        write(tmp_path, seed, smoothing=0.3, fits=0.9)
    row, word = row_of(tmp_path, "distance", "smoothed_share", above=1)
    assert "90% of the training set" in row["aside"] and word == "not testable"


def test_lengths_of_different_sweeps_are_refused(tmp_path):
    for seed in range(3):
        write(tmp_path, seed)
    for path in (tmp_path / "head_preparation").glob(
        "*.json"
    ):  # of length 4, another number of epochs
        text = path.read_text()
        if '"probe_epochs": 4' in text or '"probe_epochs":4' in text:
            path.unlink()
    short = [place for place, length in enumerate(LENGTHS) if length == 4]
    assert short == [1]
    for seed in range(3):
        write(tmp_path / "more", seed, epochs=3.0)
    for path in (tmp_path / "more" / "head_preparation").iterdir():
        text = path.read_text() if path.suffix == ".json" else ""
        twin = path.with_suffix(".json").read_text() if path.suffix != ".json" else text
        if '"probe_epochs": 4' in twin or '"probe_epochs":4' in twin:
            (tmp_path / "head_preparation" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="several epochs"):
        row_of(tmp_path, "distance", "order")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curve": "ordr"}, "ordr"),
        ({"curve": None}, "curve"),
        ({"experiment": "lp_ft"}, "curve"),
        ({"of": {"method": "LP-FT", "metric": "feature_change"}}, "feature_change"),
        ({"of": {"method": "LP-FT", "metric": "accuracy"}}, "no other curve"),
        ({"curve": "inner_gain"}, "no other curve"),
        ({"of": {"method": "FT", "metric": "distance"}}, "FT"),
        ({"minus": {"method": "LP-LoRA", "metric": "distance"}}, "one method"),
        ({"split": "ood"}, "one method"),
    ],
)
def test_a_part_that_asks_for_no_curve_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_comparison(part("distance", "order", above=0) | change)


def test_every_curve_has_a_statistic():
    assert set(CURVES) == {*STATISTICS, "inner_gain", "smoothed_share", "nearness"}
    for curve in STATISTICS:
        check_curve(curve, "distance")


def test_without_records_every_measured_part_is_not_testable(tmp_path):
    claims = [claim for claim in CLAIMS if claim["paper"] == "B"]
    found = register(claims, Grid(tmp_path))
    kinds = {part: claim["kind"] for claim in claims for part in claim["parts"]}
    for row in found.to_dict("records"):
        exact = kinds[row["part"]] == "exact"
        assert row["verdict"] == ("supported" if exact else "not testable"), row["part"]
    assert "no record holds" in found.set_index("part").loc["B1", "numbers"]


def test_the_declared_parts_meet_records_of_which_the_answer_is_known(tmp_path):
    "Where theory holds every part is supported; where everything is turned round, contradicted."
    peak = np.array([1.0, 1.4, 1.3, 1.2, 1.1, 1.05])
    best = np.array([0.55, 0.9, 0.8, 0.8, 0.7, 0.6])
    for seed in range(4):
        wobble = 1 + 0.01 * seed
        curves = {"feature_change": 10 * wobble * ENERGY, "dot_to_reference": peak * wobble, "mean_norm": peak * wobble}  # fmt: skip
        write(tmp_path / "right", seed, curves=curves, validation=best, test=best)
        turned = {"feature_change": wobble / ENERGY, "dot_to_reference": wobble / peak, "mean_norm": wobble / peak}  # fmt: skip
        write(tmp_path / "wrong", seed, curves=turned, validation=1.4 - best, test=1.4 - best)
        for name, far in (("right", 2.0), ("wrong", 1.0)):  # a plain converged probe: 0.5 and 20
            moved = {"feature_change": np.full(6, far * wobble)}
            write(tmp_path / name, seed, smoothing=0.3, curves=moved)
    words = {}
    for name in ("right", "wrong"):
        told = register([claim for claim in CLAIMS if claim["paper"] == "B"], Grid(tmp_path / name))
        words[name] = told.set_index("part")["verdict"]
    decided = [name for name, said in PARTS.items() if name.startswith("B") and "curve" in said]
    assert words["right"]["B6a"] == words["wrong"]["B6a"] == "not testable"  # of ten tasks or more
    decided.remove("B6a")
    assert (words["right"][decided] == "supported").all(), words["right"]
    turned = [
        name for name in decided if name not in ("B1", "B2b")
    ]  # energy and cosine are as they were
    assert (words["wrong"][turned] == "contradicted").all(), words["wrong"]
