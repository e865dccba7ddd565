"""Runs of the kernel view: the start, what a record holds, the plan, and what is refused."""

import copy
import json
import shutil

import pytest
import torch
from conftest import build_tokenizer
from datasets import Dataset
from readout_fixture import drawn
from test_prompts import MASKED, language_model

from lpft_nb.classifier import logits_of
from lpft_nb.experiments import ParameterError, find_experiment
from lpft_nb.kernel_behaviour import kernel_behaviour, logit_gradients
from lpft_nb.lab.kernel_view_runs import (
    load_start,
    lora_rows,
    output_derivative,
    template_of,
    view_rows,
)
from lpft_nb.models.lora import add_lora
from lpft_nb.models.readout import readout_hash, write_readout
from lpft_nb.prompts import causal_template, masked_template
from lpft_nb.records import load_arrays, load_results, read_record
from lpft_nb.stages import FineTune, LinearProbe, run_stages
from lpft_nb.tasks import few_shot, load_task

SMALL = {"device": "cpu", "max_length": 16, "shots": 3, "epochs": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def task(toy_task):
    return load_task(str(toy_task))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A masked and a causal language model as folders, by kind."
    folders = {}
    for kind, name in (("masked", "bert"), ("causal", "llama")):
        folders[kind] = tmp_path_factory.mktemp("language") / kind
        language_model(name, dtype=torch.float32).save_pretrained(folders[kind])
        tokenizer = build_tokenizer()
        if kind == "causal":
            tokenizer.mask_token = None
        tokenizer.save_pretrained(folders[kind])
    return folders


def planned(loaded, **request):
    experiment = find_experiment("kernel_view")
    parameters = experiment.check(SMALL | request)
    return experiment.plan(parameters, loaded)[0]


def test_a_record_holds_the_four_answers_and_the_conditions(
    toy_task, task, tiny_checkpoint, tmp_path
):
    (run,) = planned(
        task, task=str(toy_task), model=str(tiny_checkpoint), output=str(tmp_path), seeds=[3]
    )
    assert run.make(run) == run.path
    record, rows = read_record(run.path), load_results([read_record(run.path)])
    found = rows.set_index(["stage", "split", "metric"])["value"]
    cut = few_shot(task, 3, 3, max_test=40)
    assert record["task"]["fingerprint"] == cut.fingerprint
    start = load_start(run.settings, cut, 3, method="FT")
    stage = FineTune(epochs=2, learning_rate=1e-3, batch_size=4)
    expected = kernel_behaviour(start, cut, stage, examples=4, seed=3)
    arrays, labels = load_arrays(record, run.path.parent), torch.tensor(cut.test["label"][:])
    assert arrays["labels/test"].tolist() == labels.tolist()
    names = {"fine-tuned": "accuracy"} | {
        name: f"{name}_accuracy" for name in ("start", "kernel", "linearised")
    }
    for name, metric in names.items():
        scores = arrays[f"scores/{name}"]
        torch.testing.assert_close(scores, expected.scores[name].double())
        assert found["FT", "test", metric] == pytest.approx(expected.accuracies[name])
        assert found["FT", "test", metric] == (scores.argmax(1) == labels).double().mean().item()
    assert found["FT", "validation", "accuracy"] == pytest.approx(expected.validation)
    for one in expected.conditions:
        name = one.name.replace(" ", "_")
        if one.holds is None:
            assert ("FT", "stage", name) not in found
        else:
            assert found["FT", "stage", name] == pytest.approx(one.value, rel=1e-6)
    assert record["stages"][1]["conditions"].keys() == {one.name for one in expected.conditions}


def test_the_derivative_is_that_of_autograd(task, tiny_checkpoint):
    settings = {"prompt": False, "model": str(tiny_checkpoint), "max_length": 16, "device": "cpu"}
    model = load_start(settings, task, 0, method="FT")
    logits = logits_of(model, task.train).double().requires_grad_()
    labels = torch.tensor(task.train["label"][:])
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = gradient.norm(dim=1).mean().item()
    assert output_derivative(model, task.train) == pytest.approx(expected, rel=1e-6)


def test_kernels_of_adapters_are_compared_with_the_backbones(task, checkpoint):
    settings = {
        "prompt": True,
        "model": str(checkpoint["masked"]),
        "max_length": 16,
        "device": "cpu",
    }
    settings |= {"template": MASKED.text, "words": list(MASKED.words[:2]), "task": task.name}
    model = load_start(settings, task, 0, method="FT")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    cut = few_shot(task, 2, 0)
    rows = lora_rows(model, cut.train, (4, 1), seed=7, memory="1GiB")
    assert [row["metric"] for row in rows] == ["lora_distance_4", "lora_distance_1"]
    assert all(row["stage"] == "start" and row["split"] == "train" for row in rows)
    assert lora_rows(model, cut.train, (), seed=7, memory="1GiB") == []
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(one, after[name]) for name, one in before.items())

    def gradients(one, chosen):  # (N·C, p), by autograd
        names = [name for name, _ in one.named_parameters() if chosen(name)]
        one.requires_grad_()
        return torch.stack(
            [
                torch.cat([part.flatten() for part in row])
                for text in cut.train
                for row in logit_gradients(
                    one, one.pad(one.encode(Dataset.from_list([text]))), names
                )
            ]
        ).double()

    adapted = copy.deepcopy(model)
    add_lora(adapted, r=4, alpha=4, seed=7)
    wide = gradients(model, lambda name: name.startswith("backbone."))
    thin = gradients(adapted, lambda name: "lora_" in name)
    first, second = (thin @ thin.T).flatten(), (wide @ wide.T).flatten()
    cosine = first @ second / first.norm() / second.norm()
    assert rows[0]["value"] == pytest.approx((1 - cosine**2).sqrt().item(), rel=1e-3)


def test_a_probe_comes_first_where_it_is_asked_for(task, tiny_checkpoint):
    settings = {"prompt": False, "model": str(tiny_checkpoint), "max_length": 16, "device": "cpu"}
    found = load_start(settings, task, 5, method="LP-FT")
    expected = load_start(settings, task, 5, method="FT")
    assert not torch.equal(found.head.weight, expected.head.weight)
    run_stages(expected, task, [LinearProbe()], seed=5, device="cpu")
    assert torch.equal(found.head.weight, expected.head.weight) and not found.training


def test_another_checkpoint_than_the_planned_one_is_refused(checkpoint, toy_task, task, tmp_path):
    folder = tmp_path / "language"
    shutil.copytree(checkpoint["masked"], folder)
    (run,) = planned(
        task, task=str(toy_task), model=str(folder), prompt=True, output=str(tmp_path),
        template=MASKED.text, words=list(MASKED.words[:2]),
    )  # fmt: skip
    shutil.rmtree(folder)
    changed = language_model("bert", dtype=torch.float32)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    changed.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    with pytest.raises(ParameterError, match="model="):
        run.make(run)


def test_a_readout_is_put_on_named_in_the_record_and_must_not_change(
    tiny_checkpoint, toy_task, task, tmp_path
):
    file = tmp_path / "own.safetensors"
    write_readout(drawn(tiny_checkpoint, places=()), file)
    asked = dict(
        task=str(toy_task), model=str(tiny_checkpoint), prompt=True, output=str(tmp_path), epochs=1,
        template=MASKED.text, words=list(MASKED.words[:2]), readout=str(file),
    )  # fmt: skip
    (run,) = planned(task, **asked)
    assert run.model["readout"] == readout_hash(file)
    run.make(run)
    assert read_record(run.path)["model"]["readout"] == readout_hash(file)
    write_readout(drawn(tiny_checkpoint, places=(), seed=2), file)
    with pytest.raises(ParameterError, match="the readout of .* changed after the run was planned"):
        run.make(run)
    (other,) = planned(task, **asked)
    assert other.name != run.name


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_prompted_run_reads_the_template(kind, checkpoint, toy_task, task, tmp_path):
    template = MASKED.text if kind == "masked" else "{text} is {mask}"
    (run,) = planned(
        task, task=str(toy_task), model=str(checkpoint[kind]), prompt=True, output=str(tmp_path),
        template=template, words=list(MASKED.words[:2]), epochs=1,
    )  # fmt: skip
    run.make(run)
    record = read_record(run.path)
    assert record["stages"][1]["template"] == template
    values = load_results([record]).set_index(["stage", "metric"])["value"]
    assert 0 <= values["FT", "kernel_accuracy"] <= 1


def test_a_task_with_a_template_needs_none(checkpoint, task):
    class Named:
        text_columns, label_names = ("sentence",), ("negative", "positive")

    for kind, known in (("masked", masked_template), ("causal", causal_template)):
        settings = {"task": "sst2", "model": str(checkpoint[kind])}
        assert template_of(settings, Named) == known("sst2")


def test_what_cannot_be_told_has_no_row(tiny_checkpoint, task):
    class Found:
        accuracies = {"fine-tuned": 0.5, "start": 0.5, "kernel": 0.5, "linearised": 0.5}
        conditions, holds, validation = (), None, 0.5

    metrics = {row["metric"] for row in view_rows(Found, 0.3)}
    assert metrics == {
        "output_derivative", "accuracy", "start_accuracy", "kernel_accuracy", "linearised_accuracy",
    }  # fmt: skip


def test_the_plan_has_a_run_for_each_split_kernel_and_optimiser(task, toy_task, tiny_checkpoint):
    runs = planned(
        task, task=str(toy_task), model=str(tiny_checkpoint), seeds=[1, 2],
        formula=["sgd", "signgd"], optimiser=["sgd", "adamw"], methods=["FT", "LP-FT"],
    )  # fmt: skip
    assert len(runs) == 16 and len({run.name for run in runs}) == 16
    prints = {run.seed: set() for run in runs}
    for run in runs:
        prints[run.seed].add(run.task["fingerprint"])
    assert all(len(one) == 1 for one in prints.values()) and prints[1] != prints[2]
    assert "template" not in runs[0].settings
    assert json.dumps(runs[0].settings)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (dict(methods=["LoRA"]), "expected some of FT, LP-FT"),
        (dict(shots=4), "4 shots take 8 training examples"),
        (dict(template="{text} is {mask}", words=["a", "b"]), "are for prompt=True"),
        (dict(readout="one.safetensors"), "are for prompt=True"),
        (dict(readout="one.safetensors", prompt=True), "readout='one.safetensors': No such file"),
        (dict(formula=["sign"]), "formula"),
        (dict(optimiser=["adam"]), "did you mean 'adamw'"),
        (dict(solver="lstsq"), "solver"),
    ],
)
def test_what_makes_no_sense_is_refused(request_, said, task, toy_task, tiny_checkpoint):
    with pytest.raises(ParameterError, match=said):
        planned(task, task=str(toy_task), model=str(tiny_checkpoint), **request_)


def test_a_template_that_does_not_fit_is_refused(checkpoint, task):
    settings = {"task": "own", "model": str(checkpoint["masked"])}
    for given, said in (
        ({"template": "{text} is {mask}"}, "expected both, or neither"),
        ({"template": "{sentence} is {mask}", "words": ["a", "b"]}, "expected a template of the"),
        ({"template": "{text} is {mask}", "words": ["a", "b", "c"]}, "expected 2 label words"),
        ({}, "unknown task with a template"),
    ):
        with pytest.raises(ParameterError, match=said):
            template_of(settings | given, task)
    with pytest.raises(ParameterError, match="model="):
        load_start(
            settings | {"template": "{text} is {mask}", "words": ["nosuchword", "good"]}
            | {"prompt": True, "max_length": 16, "device": "cpu"},
            task, 0, method="FT",
        )  # fmt: skip
