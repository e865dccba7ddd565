"""Runs of the readout: three records at the same gaps, the file of the trained one, and what is refused."""

import json

import pytest
import torch
from conftest import build_tokenizer
from transformers import BertConfig, BertModel

from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.lab.readout_runs import READOUT_SUFFIX, losses, word_table
from lpft_nb.models.checkpoints import model_file_hash
from lpft_nb.models.readout import read_readout, readout_hash
from lpft_nb.records import load_arrays, load_results, read_record


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = build_tokenizer()
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rows = {
        "boolq": [
            {"question": f"is {n} good", "passage": f"The film {n} is good. It is bad."}
            for n in range(60)
        ],
        "lmbff_snli": [
            {"sentence1": f"A good cat sees {n}.", "sentence2": f"Cat {n} is bad."}
            for n in range(60)
        ],
    }
    for name, some in rows.items():
        (root / name).mkdir()
        (root / name / "train.jsonl").write_text("\n".join(map(json.dumps, some)))
    return root


SMALL = {
    "packages": ["nosuchpackage"],
    "held_out": 0.2,
    "rank": 2,
    "epochs": 1,
    "device": "cpu",
    "gap_share": 0.4,
}


def planned(encoder, **request):
    experiment = find_experiment("masked_readout")
    return experiment.plan(experiment.check({"model": str(encoder)} | SMALL | request))[0]


@pytest.fixture(scope="module")
def made(encoder, data, tmp_path_factory):
    "The three runs, made."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPFT_DATA", str(data))
        runs = planned(encoder, output=str(tmp_path_factory.mktemp("runs")))
        for run in runs:
            assert run.make(run) == run.path
    return runs


def test_three_readouts_are_asked_the_same_gaps(made):
    rows = load_results([read_record(run.path) for run in made])
    gaps = rows[rows["metric"] == "gaps"].pivot(index="split", columns="method", values="value")
    assert list(gaps.columns) == ["trained", "unigram", "untrained"]
    assert (gaps.nunique(axis=1) == 1).all()
    assert set(gaps.index) == {"test", "test/boolq", "test/lmbff_snli"}
    assert gaps.loc["test"].equals(gaps.loc["test/boolq"] + gaps.loc["test/lmbff_snli"])


def test_numbers_are_those_of_the_arrays(made):
    for run in made:
        record = read_record(run.path)
        arrays, rows = load_arrays(record, run.path.parent), load_results([record])
        values = rows.set_index(["split", "metric"])["value"]
        for source in ("boolq", "lmbff_snli"):
            right, gaps, nats = (
                arrays[f"{part}/{source}"].sum() for part in ("right", "gaps", "nats")
            )
            split = f"test/{source}"
            assert values[split, "masked_accuracy"] == pytest.approx(float(right / gaps))
            assert values[split, "perplexity"] == pytest.approx(
                float((nats / gaps).exp()), rel=1e-6
            )


def test_the_trained_one_leaves_its_file(made, encoder):
    for run in made:
        path, record = run.path.with_suffix(READOUT_SUFFIX), read_record(run.path)
        if run.method != "trained":
            assert not path.exists() and not record["history"]
            continue
        assert record["stages"][0]["readout_sha256"] == readout_hash(path)
        readout = read_readout(path)
        assert readout.base == model_file_hash(encoder) and readout.facts["run"] == run.name
        assert len(record["history"]) == readout.facts["steps"]
        assert not (run.path.parents[1] / "checkpoints" / run.name).exists()


def test_a_record_says_what_text_it_saw(made):
    record = read_record(made[0].path)
    task = record["task"]
    assert task["name"] == "open-texts" and set(task["source"]["train"]) == {"boolq", "lmbff_snli"}
    assert sum(task["source"]["test"].values()) == task["sizes"]["test"]
    assert len({read_record(run.path)["task"]["fingerprint"] for run in made}) == 1


def test_the_tables_show_all_of_it(made):
    table = word_table([run.path for run in made])
    assert list(table["text"]) == ["all", "boolq", "lmbff_snli"] * 3
    assert table.groupby("text")["gaps"].nunique().eq(1).all()
    curve = losses([run.path for run in made])
    assert len(curve) and curve["step"].is_monotonic_increasing
    assert losses([made[0].path]).empty


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"methods": ["bigram"]}, "methods"),
        ({"held_out": 1.5}, "held_out"),
        ({"held_out": 1e-9}, "some on both sides"),
        ({"model": "nosuchmodel"}, "nosuchmodel"),
    ],
)
def test_what_makes_no_sense_is_refused(request_, said, encoder, data, monkeypatch):
    monkeypatch.setenv("LPFT_DATA", str(data))
    with pytest.raises(ParameterError, match=said):
        planned(encoder, **request_)


def test_without_the_sets_there_is_no_plan(encoder, tmp_path, monkeypatch):
    monkeypatch.delenv("LPFT_DATA", raising=False)
    with pytest.raises(ParameterError, match="boolq and lmbff_snli in LPFT_DATA, which is not set"):
        planned(encoder)
    monkeypatch.setenv("LPFT_DATA", str(tmp_path))
    with pytest.raises(ParameterError):
        planned(encoder)
