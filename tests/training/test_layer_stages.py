"""Stages of one layer: exactly one block and the head move, in every architecture; the layer is chosen by NC1; a run comes back."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import ARCHITECTURES, build_tiny_model

from lpft_nb.classifier import Classifier, features_of, logits_of
from lpft_nb.collapse import variability
from lpft_nb.features import feature_sums
from lpft_nb.models.layers import LayerError, add_skip, block_parameters, layer_features
from lpft_nb.stages import (
    AddSkip,
    FineTune,
    LayerFineTune,
    LinearProbe,
    LoRA,
    SkipConnectionFineTune,
    method_stages,
    run_stages,
)
from lpft_nb.tasks import load_task
from lpft_nb.training.layer_stages import choose_layer, settle
from lpft_nb.training.stage import StageData
from toys import small_model, toy_data

OWN_BLOCKS = [name for name in ARCHITECTURES if name != "albert"]
QUICK = dict(epochs=2, learning_rate=1e-3, batch_size=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def task(tmp_path):
    "60 lines of words with two classes."
    words = [["good great movie", "film value head"], ["bad dull noise", "cat dog tree"]]
    rows = [
        dict(text=f"{words[n % 2][n // 2 % 2]} {'matrix ' * (n % 4)}sum", label=n % 2)
        for n in range(60)
    ]
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return load_task(path)


def small(name="bert", **fields):
    return build_tiny_model(name, num_labels=2, dtype=torch.float32, **fields)


def deep(layers=3):
    return small(backbone=dict(num_hidden_layers=layers))


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def moved_names(model, before):
    return {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}


def expected_names(model, layer):
    own = {f"backbone.{name}" for name in block_parameters(model.backbone, layer)}
    return own | {name for name, _ in model.named_parameters() if name.startswith("head.")}


# --- what moves


@pytest.mark.parametrize("name", OWN_BLOCKS)
@pytest.mark.parametrize("kind", [LayerFineTune, SkipConnectionFineTune])
def test_exactly_the_block_and_the_head_move(name, kind, task, capsys):
    model = small(name)
    before, wanted = weights(model), expected_names(model, 1)
    result = run_stages(model, task, [kind(layer=1, **QUICK)], device="cpu")
    assert moved_names(model, before) == wanted
    count = sum(before[one].numel() for one in wanted)
    rows = result.metrics.query("stage == @kind.name and metric == 'trainable_parameters'")
    assert rows.value.item() == count < sum(one.numel() for one in before.values())
    printed = capsys.readouterr().out
    assert f"{kind.name} trains" in printed and "block 1 of 2" in printed
    assert str(count - sum(one.numel() for one in model.head.parameters())) in printed


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_each_block_can_be_the_one(layer, task):
    model = deep()
    before = weights(model)
    run_stages(model, task, [LayerFineTune(layer=layer, **QUICK)], device="cpu")
    assert moved_names(model, before) == {
        name
        for name in before
        if name.startswith(("head.", f"backbone.encoder.layer.{layer - 1}."))
    }


def test_a_stage_after_adapters_trains_those_of_its_block(task):
    model = deep()
    LoRA(r=2).prepare(model, 0)
    before = weights(model)
    run_stages(model, task, [LayerFineTune(layer=2, **QUICK)], device="cpu")
    moved = moved_names(model, before)
    assert {name for name in moved if "lora_" in name} == {
        name for name in before if "lora_" in name and ".layer.1." in name
    }


# --- with a skip


def test_a_probe_behind_the_skip_fits_the_features_with_it(task):
    model = deep()
    result = run_stages(
        model, task, [AddSkip(layer=1), LinearProbe(), SkipConnectionFineTune(layer=1, **QUICK)],
        device="cpu",
    )  # fmt: skip
    by_hand = deep()
    add_skip(by_hand, 1)
    run_stages(by_hand, task, [LinearProbe()], device="cpu")
    assert torch.equal(result.arrays["logits/LP/test"], logits_of(by_hand, task.test))
    start, skip = (result.metrics.query("stage == @name") for name in ("start", "skip"))
    change = skip.query("metric == 'feature_change' and split == 'test'").value.item()
    plain = features_of(deep(), task.test)
    by_skip = features_of(by_hand, task.test)
    assert change == pytest.approx((by_skip - plain).norm(dim=1).mean().item(), rel=1e-5)
    assert skip.query("metric == 'trainable_parameters'").value.item() == 0 and len(start)
    torch.testing.assert_close(
        result.arrays["logits/SCL-FT/test"], logits_of(model, task.test), rtol=1e-5, atol=1e-5
    )


def test_a_probe_before_the_skip_is_fitted_without_it(task):
    model = deep()
    result = run_stages(
        model, task, [LinearProbe(), SkipConnectionFineTune(layer=1, **QUICK)], device="cpu"
    )
    plain = deep()
    run_stages(plain, task, [LinearProbe()], device="cpu")
    assert torch.equal(result.arrays["logits/LP/test"], logits_of(plain, task.test))
    assert model.config.skip == 1 and plain.config.skip is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
@pytest.mark.parametrize("method", ["LayerFT", "SCL-FT", "LP-LayerFT", "LP-SCL-FT"])
def test_a_trained_model_comes_back_bit_for_bit(name, method, task, tmp_path):
    model = small(name)
    kind = SkipConnectionFineTune if "SCL" in method else LayerFineTune
    stages = method_stages(method, layer_fine_tune=kind(layer=1, **QUICK))
    result = run_stages(model, task, stages, output=tmp_path / "run", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    again = Classifier.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again, task.test), logits_of(model, task.test))
    assert again.config.skip == (1 if "SCL" in method else None)
    other = small(name)
    taken = run_stages(other, task, stages, output=tmp_path / "run", device="cpu")
    for place, table in result.arrays.items():
        assert torch.equal(taken.arrays[place], table), place
    assert torch.equal(logits_of(other, task.test), logits_of(model, task.test))
    assert taken.metrics.equals(result.metrics)


def test_a_run_that_is_cut_goes_on_with_the_skip(task, tmp_path):
    first, last = [AddSkip(), LinearProbe()], SkipConnectionFineTune(**QUICK)
    run_stages(deep(), task, first, output=tmp_path / "run", device="cpu")
    continued = run_stages(deep(), task, [*first, last], output=tmp_path / "run", device="cpu")
    whole = run_stages(deep(), task, [*first, last], device="cpu")
    assert torch.equal(continued.arrays["logits/SCL-FT/test"], whole.arrays["logits/SCL-FT/test"])


# --- the choice


def nc1_by_layer(model, task):
    "NC1 of the training features of every layer, from one explicit pass."
    rows = layer_features(model, model.encode(task.train), [model.config.pooling])
    labels = torch.tensor(list(task.train["label"]))
    sums = {layer: feature_sums(one, labels=labels) for (layer, _), one in rows.items() if layer}
    return {layer: variability(one)["nc1"] for layer, one in sums.items()}


def test_auto_takes_the_layer_with_the_least_nc1_and_says_why(task, capsys):
    chosen = set()
    for seed in range(4):
        model = small(seed=seed, pooling="mean", backbone=dict(num_hidden_layers=3))
        known = nc1_by_layer(model, task)
        best = min(known, key=known.get)
        early = min((1, 2), key=known.get)
        result = run_stages(model, task, [LayerFineTune(**QUICK)], device="cpu", seed=seed)
        (fact,) = result.stages
        assert fact["settings"]["layer"] == best
        numbers = ", ".join(f"{layer}: {value:.3g}" for layer, value in known.items())
        assert fact["note"] == (
            f"block {best} of 3; layer {best} has the least NC1 on the training set ({numbers})"
        )
        assert fact["note"] in capsys.readouterr().out
        other = small(seed=seed, pooling="mean", backbone=dict(num_hidden_layers=3))
        run_stages(other, task, [SkipConnectionFineTune(**QUICK)], device="cpu", seed=seed)
        assert other.config.skip == early
        chosen.add(best)
    assert len(chosen) > 1  # or the least would be a constant


def test_auto_looks_at_the_model_that_the_stages_before_have_left(task):
    strong = FineTune(epochs=3, learning_rate=0.05, batch_size=8)
    model = small(seed=1, pooling="mean", backbone=dict(num_hidden_layers=3))
    known = nc1_by_layer(model, task)
    result = run_stages(model, task, [strong, LayerFineTune(**QUICK)], device="cpu")
    after = small(seed=1, pooling="mean", backbone=dict(num_hidden_layers=3))
    run_stages(after, task, [strong], device="cpu")
    then = nc1_by_layer(after, task)
    assert then != known
    assert result.stages[1]["settings"]["layer"] == min(then, key=then.get)


def test_a_skip_that_is_there_decides_where_its_stage_trains(task):
    model = deep()
    result = run_stages(
        model, task, [AddSkip(layer=2), SkipConnectionFineTune(**QUICK)], device="cpu"
    )
    assert result.stages[1]["settings"]["layer"] == 2
    assert "the skip connection starts at layer 2" in result.stages[1]["note"]
    with pytest.raises(LayerError, match="from layer 2 already, asked for one from layer 1"):
        run_stages(model, task, [SkipConnectionFineTune(layer=1, **QUICK)], device="cpu")


# --- what is refused


@pytest.mark.parametrize("kind", [LayerFineTune, SkipConnectionFineTune, AddSkip])
@pytest.mark.parametrize("layer", [0, -1, 1.5, True, "last", None])
def test_a_layer_that_no_model_has_is_refused_when_it_is_written(kind, layer):
    with pytest.raises(LayerError, match=rf"{kind.__name__}\(layer=.*0 is the embeddings"):
        kind(layer=layer)


def test_a_layer_beyond_the_model_is_refused_before_anything_is_trained(task, tmp_path):
    model = small()
    before = weights(model)
    for output in (None, tmp_path / "run"):
        with pytest.raises(LayerError, match="expected a number from 1 to 2"):
            run_stages(model, task, [LayerFineTune(layer=3, **QUICK)], output=output, device="cpu")
    assert not moved_names(model, before)


def test_a_model_without_blocks_of_its_own_is_refused(task):
    for stage in (LayerFineTune(**QUICK), LayerFineTune(layer=1, **QUICK), AddSkip()):
        with pytest.raises(LayerError, match="AlbertModel keeps no list of 2 blocks"):
            run_stages(small("albert"), task, [stage], device="cpu")


def test_a_model_of_one_block_has_no_place_for_a_skip(task):
    with pytest.raises(LayerError, match="one block only"):
        run_stages(deep(1), task, [AddSkip()], device="cpu")


def test_features_that_are_not_numbers_are_refused_by_layer():
    model, data = small_model(), toy_data(24)
    with torch.no_grad():
        model.backbone.encoder.layer[1].output.dense.bias[0] = math.nan
    given = StageData(encoded={"train": data}, features={}, num_labels=3)
    with pytest.raises(LayerError, match="layer 2 has none: features hold NaN .*; name a layer"):
        choose_layer(model, given, last=True)
    assert choose_layer(model, given, last=False)[0] == 1


def test_one_class_has_no_nc1_to_compare():
    data = toy_data(24)
    data.labels = [0] * 24
    given = StageData(encoded={"train": data}, features={}, num_labels=3)
    with pytest.raises(LayerError, match="layer 1 has none: collapse compares classes"):
        choose_layer(small_model(), given, last=True)


def test_auto_is_not_guessed_without_texts():
    with pytest.raises(LayerError, match="run_stages does it"):
        LayerFineTune().prepare(small(), 0)
    assert settle(LinearProbe(), small(), None) == (LinearProbe(), "")
    assert settle(LayerFineTune(), small(), None) == (LayerFineTune(layer=1), "")


def test_a_method_is_made_of_stages_of_its_kind():
    assert [type(one) for one in method_stages("LP-SCL-FT")] == [
        AddSkip,
        LinearProbe,
        SkipConnectionFineTune,
    ]
    assert method_stages("LayerFT") == [LayerFineTune()]
    skip = SkipConnectionFineTune(layer=2)
    assert method_stages("LP-SCL-FT", layer_fine_tune=skip)[0] == AddSkip(layer=2)
    with pytest.raises(TypeError, match="SCL-FT trains with a SkipConnectionFineTune"):
        method_stages("SCL-FT", layer_fine_tune=LayerFineTune())
    with pytest.raises(TypeError, match="LayerFT trains with a LayerFineTune"):
        method_stages("LayerFT", layer_fine_tune=skip)


def test_settings_stay_those_that_were_given():
    stage = LayerFineTune(layer=2, learning_rate=1e-4, head_learning_rate=1e-2)
    assert stage.learning_rates() == (1e-2, 1e-4)
    assert dataclasses.asdict(settle(stage, small(), None)[0]) == dataclasses.asdict(stage)
