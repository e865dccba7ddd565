"""What could not be loaded again is refused before training; a run leaves a summary in the model."""

import json
import math

import pytest
import torch
import transformers
from conftest import build_tiny_model, build_tokenizer
from model_oracle import TEXTS

from lpft_nb.classifier import Classifier
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.stages import FineTune, LinearProbe, LoRA, run_stages
from lpft_nb.tasks import load_task
from lpft_nb.training.round_trip import check_round_trip, run_summary


def small(name="bert", **fields):
    return build_tiny_model(name, num_labels=2, dtype=torch.float32, **fields)


def tried(model, folder, *stages):
    check_round_trip(model, stages, seed=0, texts=TEXTS, folder=folder)


def state(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return flags, modes, model.config.to_dict(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_trial_passes_and_leaves_nothing(name, tmp_path):
    model = small(name)
    model.train()
    before = state(model)
    tried(model, tmp_path / "new", LinearProbe(), LoRA(r=2), FineTune())
    assert state(model) == before and list((tmp_path / "new").iterdir()) == []


def test_the_global_random_numbers_are_left_alone(tmp_path):
    class Drawing(LinearProbe):
        def prepare(self, model, seed):
            torch.rand(3)
            return super().prepare(model, seed)

    before = torch.get_rng_state()
    tried(small(), tmp_path, Drawing())
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_come_back_as_others_are_named_and_the_attention_is_the_models(tmp_path):
    asked = []

    class Forgetful(Classifier):
        @classmethod
        def from_pretrained(cls, name, attention=None):
            asked.append(attention)
            model = super().from_pretrained(name, attention=attention)
            torch.nn.init.zeros_(model.head.weight)
            return model

    model = small()
    model.backbone.config._attn_implementation = "eager"
    model.__class__ = Forgetful
    with pytest.raises(ClassifierError, match=r"what differs: head\.weight$"):
        tried(model, tmp_path)
    assert asked == ["eager"]


def test_every_type_and_attention_comes_back(tmp_path):
    tried(build_tiny_model("bert", dtype=torch.bfloat16), tmp_path)
    model = small()
    model.save_pretrained(tmp_path / "saved")
    tried(Classifier.from_pretrained(tmp_path / "saved", attention="eager"), tmp_path)


class UnknownConfig(transformers.BertConfig):
    model_type = "of_somebody"


def test_a_backbone_whose_code_is_elsewhere_is_refused(tmp_path):
    model = small()
    model.config.source = {"id": "somebody/own-code"}
    own = UnknownConfig(
        **{k: v for k, v in model.config.backbone.to_dict().items() if k != "model_type"}
    )
    model.config.backbone = own
    with pytest.raises(
        ClassifierError, match="BertModel somebody/own-code could not .* of_somebody"
    ):
        tried(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_modules_put_in_by_hand_are_named(tmp_path):
    model = small()
    model.backbone.encoder.layer[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ClassifierError, match=r"layer\.0\.extra\.bias, .*layer\.0\.extra\.weight"):
        tried(model, tmp_path)


def test_a_stage_that_adds_what_no_file_knows_is_refused(tmp_path):
    class Adding(LinearProbe):
        def prepare(self, model, seed):
            model.backbone.more = torch.nn.Parameter(torch.ones(2))
            return super().prepare(model, seed)

    model = small()
    with pytest.raises(ClassifierError, match=r"no place: backbone\.more"):
        tried(model, tmp_path, Adding())
    assert not hasattr(model.backbone, "more")


def test_another_function_with_the_same_weights_is_refused(tmp_path):
    model = small()
    model.backbone.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.Tanh()
    with pytest.raises(ClassifierError, match="the logits, which differ"):
        tried(model, tmp_path)


def test_another_tokenizer_is_refused(tmp_path, monkeypatch):
    other = build_tokenizer()
    other.add_tokens(["cat sat"])
    monkeypatch.setattr("lpft_nb.classifier.load_tokenizer", lambda *_, **__: other)
    with pytest.raises(ClassifierError, match="the tokenizer"):
        tried(small(), tmp_path)


def test_a_model_without_tokenizer_is_compared_by_its_weights(tmp_path):
    model = small()
    model.tokenizer = None
    tried(model, tmp_path)


@pytest.mark.parametrize(
    "second, message", [(LoRA(r=2), "merge"), (FineTune(trainable=("nowhere.*",)), "nowhere")]
)
def test_a_later_stage_that_cannot_start_is_refused_before_the_first_is_trained(
    second, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        tried(small(), tmp_path, LoRA(r=2), second)


def test_a_run_tries_first_and_trains_nothing_where_it_fails(toy_task, tmp_path):
    model, task = small(), load_task(toy_task)
    model.backbone.extra = torch.nn.Linear(2, 2)
    head = model.head.weight.detach().clone()
    with pytest.raises(ClassifierError, match="nothing was trained"):
        run_stages(model, task, [LinearProbe()], output=tmp_path / "run", device="cpu")
    assert torch.equal(model.head.weight, head) and list((tmp_path / "run").iterdir()) == []
    run_stages(model, task, [LinearProbe()], device="cpu")  # leaves nothing: nothing is tried


def test_a_run_that_continues_is_not_tried_again(toy_task, tmp_path, monkeypatch):
    from lpft_nb import stages

    calls, task = [], load_task(toy_task)
    monkeypatch.setattr(stages, "check_round_trip", lambda *a, **k: calls.append(1))
    run = lambda: run_stages(small(), task, [LinearProbe()], output=tmp_path, device="cpu")
    run(), run()
    assert calls == [1]


def test_a_summary_has_no_number_that_could_not_be_computed(toy_task):
    row = dict(stage="LP", split="test", metric="ece", value=0.5)
    rows = [row, row | dict(value=math.nan), row | dict(value=math.inf), row | dict(split="train")]
    found = run_summary(load_task(toy_task), facts=[], rows=[*rows, row | dict(metric="x")], seed=0)
    assert found["metrics"] == [row]


def test_a_run_leaves_its_summary_in_the_model(toy_task, tmp_path):
    model, task = small(), load_task(toy_task)
    result = run_stages(
        model, task, [LinearProbe(), LinearProbe(penalty=2.0)], seed=5, device="cpu"
    )
    (run,) = model.config.history
    assert run["task"]["name"] == task.name and run["task"]["fingerprint"] == task.fingerprint
    assert run["task"]["sizes"] == task.sizes and run["seed"] == 5
    assert run["stages"] == [
        {"name": "LP", "settings": {}},
        {"name": "LP2", "settings": {"penalty": 2.0}},
    ]
    assert {row["split"] for row in run["metrics"]} == {"validation", "test"}
    assert {row["stage"] for row in run["metrics"]} == {"LP", "LP2"}
    table = result.metrics.set_index(["stage", "split", "metric"])["value"]
    for row in run["metrics"]:
        assert row["value"] == table[row["stage"], row["split"], row["metric"]]
        assert math.isfinite(row["value"])
    run_stages(model, task, [LinearProbe()], device="cpu")
    assert len(model.config.history) == 2
    model.save_pretrained(tmp_path)
    assert Classifier.from_pretrained(tmp_path).config.history == model.config.history
    json.dumps(model.config.history, allow_nan=False)
    assert "LP → LP2 on the task toy" in (tmp_path / "README.md").read_text()
