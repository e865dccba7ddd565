"""Kernel runs: the start of each method, drawn examples, one record from model to table, and parameters that must be refused."""

import json

import pandas as pd
import pytest
import torch

from lpft_nb.experiments import ParameterError, find_experiment, load_data
from lpft_nb.lab.starts import STARTS, bring_to_start, drawn, kernel_batch
from lpft_nb.lab.kernel_tables import heat_maps, kernel_frame, kernel_table, spectra
from lpft_nb.records import load_arrays, read_record
from lpft_nb.tangent_kernel import tangent_kernel

TEXTS = {
    0: ["the sparse matrix norm", "solve a dense matrix", "a vector norm", "find the small vector"]
    * 2,
    1: ["a dog ran over the tree", "the cat saw a dog", "great film", "the movie sat"] * 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    "A tiny checkpoint and a tiny task on disk, and the parameters that name them."
    folder = tmp_path_factory.mktemp("kernel")
    tiny_model("bert", num_labels=2, dtype=torch.float32).save_pretrained(folder / "model")
    (folder / "toy").mkdir()
    words = ["under", "over", "in", "on", "with", "for"]
    for number, split in enumerate(("train", "validation", "test")):
        rows = [
            {"text": f"{text} {words[number]} {words[3 + k % 3]} {k}", "label": label}
            for label, texts in TEXTS.items()
            for k, text in enumerate(texts)
        ]
        (folder / "toy" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    requested = dict(
        task=str(folder / "toy"),
        model=str(folder / "model"),
        max_length=16,
        max_kernel_train=10,
        max_test=6,
        methods=list(STARTS),
        output=str(folder / "runs"),
        memory="200MiB",
        device="cpu",
        solvers=["rows", "least_squares"],
    )
    return find_experiment("tangent_kernel").check(requested)


def plan(parameters) -> list:
    "The runs of the experiment, with the names of their records."
    return find_experiment("tangent_kernel").plan(parameters)[0]


@pytest.fixture(scope="module")
def records(world):
    "One record for each method."
    return [run.make(run) for run in plan(world)]


def test_each_method_starts_where_it_should(world):
    from lpft_nb.experiments import load_model

    task, heads, trained = load_data(world), {}, {}
    for run in plan(world):
        model = load_model(run.settings, task, 0)
        fresh = model.head.weight.detach().clone()
        bring_to_start(model, run.method, task, run.settings, 0)
        heads[run.method] = torch.equal(model.head.weight.detach(), fresh)
        trained[run.method] = {
            name for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        assert not any(module.training for module in model.modules())
    assert heads == {"FT": True, "LP-FT": False, "LoRA": True, "LP-LoRA": False}
    assert trained["FT"] == trained["LP-FT"] and all(
        "lora_" in name or name.startswith("head.") for name in trained["LoRA"]
    )


def test_a_method_without_a_backbone_to_train_is_refused(world):
    with pytest.raises(ParameterError, match="train the backbone, got LP"):
        plan(world.model_copy(update={"methods": ["FT", "LP"]}))


def test_drawn_examples_are_the_same_for_all(world, records):
    assert (
        drawn(10, None).tolist() == list(range(10))
        and drawn(40, 7).equal(drawn(40, 7))
        and drawn(40, 7).unique().numel() == 7
    )
    places = [load_arrays(read_record(path), path.parent)["train_places"] for path in records]
    assert all(table.equal(places[0]) for table in places) and len(places[0]) == 10


def test_the_record_holds_what_a_direct_computation_gives(world, records):
    from lpft_nb.decomposition import frobenius_norm
    from lpft_nb.experiments import load_model

    task = load_data(world)
    (run,) = [run for run in plan(world) if run.method == "LP-FT"]
    record = next(read_record(path) for path in records if read_record(path)["method"] == "LP-FT")
    model = load_model(run.settings, task, run.seed)
    bring_to_start(model, "LP-FT", task, run.settings, run.seed)
    batch, labels, _ = kernel_batch(model, task.train, most=10, max_length=16)
    kernel = tangent_kernel(model, batch, quiet=True)
    found = {(row["metric"], row["split"]): row["value"] for row in record["metrics"]}
    assert found["F/frobenius_norm", "train"] == pytest.approx(
        frobenius_norm(kernel.ft_effective), rel=1e-5
    )
    assert found["P/frobenius_norm", "train"] == pytest.approx(
        frobenius_norm(kernel.pretrain_effective), rel=1e-5
    )
    lattice = found["F/rows_per_logit_accuracy", "test"] * 6 * 2
    assert lattice == pytest.approx(round(lattice)) and len(labels) == 10
    assert record["parameters"]["max_kernel_train"] == 10 and "memory" not in record["parameters"]


def test_p_is_the_same_for_lora_and_fine_tuning(records):
    "Claim A3, first half."
    spectra_of = {
        read_record(path)["method"]: load_arrays(read_record(path), path.parent)["spectrum/P"]
        for path in records
    }
    torch.testing.assert_close(spectra_of["FT"], spectra_of["LoRA"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(spectra_of["LP-FT"], spectra_of["LP-LoRA"], rtol=1e-4, atol=1e-6)


def test_a_run_that_is_there_is_not_made_again(world, records):
    assert [run.state for run in plan(world)] == ["finished"] * 4
    assert not list((records[0].parents[1] / "kernels").glob("*.safetensors"))


def test_tables_and_figures(records):
    table = kernel_table(records)
    assert list(table.index.get_level_values("kernel")) == ["P", *["F", "P+F"] * 4]
    assert table.xs("P+F", level="kernel")["FT ratio"].str.len().gt(0).all()
    frame = kernel_frame(records)
    assert set(frame["n_train"]) == {10} and set(frame["n_test"]) == {6}
    assert isinstance(frame, pd.DataFrame) and list(frame["method"].cat.categories) == [
        "FT",
        "LP-FT",
        "LoRA",
        "LP-LoRA",
    ]
    assert len(spectra(records)[1].lines) == 4 and len(heat_maps(records).axes) == 8
