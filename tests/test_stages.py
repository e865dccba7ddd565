"""Stages: exactly what is listed moves, runs repeat bit for bit and survive a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model
from process_fixtures import worlds_of

import lpft_nb.stages as stages
from lpft_nb.calibration import calibration_metrics
from lpft_nb.classifier import Classifier, features_of, logits_of
from lpft_nb.linear_probe import ConvergenceError, fit_probe
from lpft_nb.stages import FineTune, LinearProbe, LoRA, ScaleHead, method_stages, run_stages
from lpft_nb.tasks import load_task
from lpft_nb.temperature import fit_temperature
from lpft_nb.training import measuring

SCRIPT = Path(__file__).parent / "training" / "stages_script.py"
QUICK = dict(epochs=2, learning_rate=1e-3, batch_size=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))


def write_task(folder):
    "Lines of words with two classes, in a file; 60 examples."
    generator = torch.Generator().manual_seed(0)
    words = (
        ("good great movie film value", "bad dull noise cat dog"),
        "matrix vector norm sum mean graph tree".split(),
    )
    lines = []
    for number in range(60):
        label = number % 2
        pick = lambda pool, count: [
            pool[int(i)] for i in torch.randint(len(pool), (count,), generator=generator)
        ]
        text = pick(words[0][label].split(), 2) + pick(words[1], 2 + number % 5)
        lines.append(json.dumps(dict(text=" ".join(text), label=label)))
    path = Path(folder) / "words.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def task(tmp_path):
    return load_task(write_task(tmp_path))


def small(seed=0, **fields):
    return build_tiny_model("bert", num_labels=2, seed=seed, dtype=torch.float32, **fields)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LP", "FT", "LP-FT", "LoRA", "LP-LoRA"])
def test_exactly_the_listed_parameters_move(method, task):
    for stage in method_stages(method, fine_tune=FineTune(**QUICK), lora=LoRA(r=2, **QUICK)):
        model = small()
        stage.prepare(model, 0)
        listed, before = {n for n, p in model.named_parameters() if p.requires_grad}, weights(model)
        model = small()
        result = run_stages(model, task, [stage], device="cpu")
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        if stage.name == "LP":
            assert listed == {"head.weight", "head.bias"}
        if stage.name == "LoRA":
            assert all(n.startswith("head.") or "lora_" in n for n in listed)
        assert moved == listed  # Adam moves even a key bias, by rounding
        rows = result.metrics
        assert rows[
            (rows.stage == stage.name) & (rows.metric == "trainable_parameters")
        ].value.item() == sum(before[n].numel() for n in listed)


def test_subset_patterns(task):
    model = small()
    before = weights(model)
    run_stages(
        model,
        task,
        [FineTune(trainable=("head.*", "backbone.encoder.layer.1.*"), **QUICK)],
        device="cpu",
    )
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith(("head.", "backbone.encoder.layer.1."))}


def test_a_pattern_without_a_match_is_refused(task):
    with pytest.raises(ValueError, match=r"'layer\.9' matches no parameter"):
        run_stages(small(), task, [FineTune(trainable=("layer.9",), **QUICK)], device="cpu")


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LP", "FT", "LP-FT", "LoRA", "LP-LoRA"])
def test_every_stage_end_is_calibrated_from_its_own_logits(method, task):
    stages_of_method = method_stages(method, fine_tune=FineTune(**QUICK), lora=LoRA(r=2, **QUICK))
    result = run_stages(small(), task, stages_of_method, device="cpu")
    for stage in [stage.name for stage in stages_of_method]:
        value = result.metrics[result.metrics.stage == stage].set_index(["split", "metric"])[
            "value"
        ]
        logits, labels = (
            {split: result.arrays[f"{kind}/{split}"] for split in ("validation", "test")}
            for kind in (f"logits/{stage}", "labels")
        )
        for name, number in calibration_metrics(logits["test"], labels["test"]).items():
            assert value["test", name] == pytest.approx(number, rel=1e-9, nan_ok=True), name
        fact = next(fact for fact in result.stages if fact["name"] == stage)
        if fact["no_temperature"]:
            assert value["validation", "temperature"] != value["validation", "temperature"]
            continue
        assert value["validation", "temperature"] == pytest.approx(
            fit_temperature(logits["validation"], labels["validation"]), rel=1e-9
        )
        scaled = calibration_metrics(
            logits["test"].double() / value["validation", "temperature"], labels["test"]
        )
        assert {
            name: value["test", f"{name}_after_temperature"] for name in scaled
        } == pytest.approx(scaled, rel=1e-9, nan_ok=True)
    assert not result.metrics.duplicated(["stage", "split", "metric"]).any()
    assert not (
        (result.metrics.split == "train") & result.metrics.metric.isin(["ece", "temperature"])
    ).any()


def test_a_validation_split_with_one_class_does_not_end_a_run(task):
    one_class = dataclasses.replace(
        task, validation=task.validation.filter(lambda row: row["label"] == 0)
    )
    result = run_stages(small(), one_class, [LinearProbe(), FineTune(**QUICK)], device="cpu")
    assert ["one class" in fact["no_temperature"] for fact in result.stages] == [True, True]
    needs = result.metrics.metric.str.contains("temperature")
    assert result.metrics[needs].value.isna().all() and needs.sum() > 30
    assert result.metrics.query("metric == 'ece' and split == 'test'").value.notna().all()


# --- a scaled head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_head_multiplies_all_logits_and_nothing_else(task, bias, capsys):
    model = small(head_bias=bias)
    before, logits = weights(model), logits_of(model, task.test)
    result = run_stages(model, task, [ScaleHead(50)], device="cpu")
    torch.testing.assert_close(logits_of(model, task.test), 50 * logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        result.arrays["logits/scale/test"], 50 * logits, rtol=1e-5, atol=1e-5
    )
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach(),
            before[name] * (50 if name.startswith("head.") else 1),
            rtol=0,
            atol=0,
        )
    value = lambda stage, metric, split="stage": result.metrics.query(
        "stage == @stage and split == @split and metric == @metric"
    ).value.item()
    assert value("scale", "head_norm") == pytest.approx(50 * value("start", "head_norm"), rel=1e-6)
    assert value("scale", "trainable_parameters") == 0 and value(
        "scale", "accuracy", "test"
    ) == value("start", "accuracy", "test")
    assert result.stages[0]["settings"] == {"factor": 50} and result.stages[0]["trainable"] == []
    assert (
        "scale trains nothing\nthe head, weights and bias, is multiplied by 50"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), True, None, "2"])
def test_a_factor_that_scales_to_nothing_is_refused(factor):
    with pytest.raises(ValueError, match="expected a positive number"):
        ScaleHead(factor)


def test_a_scaled_head_is_what_training_starts_from(task):
    stage = FineTune(**QUICK)
    whole = run_stages(small(), task, [LinearProbe(), ScaleHead(10), stage], device="cpu")
    by_hand = small()
    run_stages(by_hand, task, [LinearProbe()], device="cpu")
    with torch.no_grad():
        for parameter in by_hand.head.parameters():
            parameter.mul_(10)
    assert torch.equal(
        run_stages(by_hand, task, [stage], device="cpu").arrays["logits/FT/test"],
        whole.arrays["logits/FT/test"],
    )
    plain = run_stages(small(), task, [LinearProbe(), stage], device="cpu")
    assert torch.equal(
        run_stages(small(), task, [LinearProbe(), ScaleHead(1), stage], device="cpu").arrays[
            "logits/FT/test"
        ],
        plain.arrays["logits/FT/test"],
    )


def test_a_run_cut_after_the_scaling_goes_on_with_the_scaled_head(task, tmp_path):
    first, second = [LinearProbe(), ScaleHead(5)], FineTune(**QUICK)
    run_stages(small(), task, first, output=tmp_path, device="cpu")
    continued = run_stages(small(), task, [*first, second], output=tmp_path, device="cpu")
    whole = run_stages(small(), task, [*first, second], device="cpu")
    assert torch.equal(continued.arrays["logits/FT/test"], whole.arrays["logits/FT/test"])


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_probe_stage_is_the_exact_probe(task):
    model = small()
    labels = torch.tensor(list(task.train["label"]))
    fit = fit_probe(features_of(model, task.train), labels, seed=0, num_classes=2)
    result = run_stages(model, task, [LinearProbe()], device="cpu")
    torch.testing.assert_close(model.head.weight.double(), fit.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        result.arrays["logits/LP/test"], logits_of(model, task.test), rtol=1e-4, atol=1e-4
    )
    assert result.stages[0]["penalty"] == fit.penalty


def test_measured_rows_agree_with_the_model(task):
    model = small()
    reference = features_of(model, task.test)
    result = run_stages(model, task, [LinearProbe(), FineTune(**QUICK)], device="cpu")
    value = lambda metric, split="test": result.metrics.query(
        "stage == 'FT' and split == @split and metric == @metric"
    ).value.item()
    logits, labels = logits_of(model, task.test), torch.tensor(list(task.test["label"]))
    torch.testing.assert_close(result.arrays["logits/FT/test"], logits, rtol=1e-5, atol=1e-5)
    assert value("accuracy") == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert value("nll") == pytest.approx(
        torch.nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-5
    )
    assert value("feature_change") == pytest.approx(
        (features_of(model, task.test) - reference).double().norm(dim=1).mean().item(), rel=1e-5
    )
    assert value("head_norm", "stage") == pytest.approx(model.head.weight.norm().item(), rel=1e-6)
    moved = (features_of(model, task.test).double() * reference.double()).sum(dim=1).mean()
    assert value("dot_to_reference") == pytest.approx(moved.item(), rel=1e-5)
    cut = (
        run_stages(small(), task, [LinearProbe()], device="cpu", max_length=7)
        .metrics.query("metric == 'truncated' and split == 'train'")
        .value.item()
    )
    assert cut == sum(len(text.split()) + 2 > 7 for text in task.train["text"]) > 0
    assert set(result.metrics.stage) == {"start", "LP", "FT"} and set(result.arrays) >= {
        "labels/test",
        "logits/LP/train",
    }


def test_every_stage_end_has_the_energy_of_the_whole_training_set(task):
    """Against a loop over examples, at the start, after the probe and after training; dropout is on in none of them."""
    noisy = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = small(head_dropout=0.5, backbone=noisy)
    before = logits_of(model, task.train)
    result = run_stages(model, task, [LinearProbe(penalty=1.0), FineTune(**QUICK)], device="cpu")
    rows = result.metrics.query("metric == 'energy'")
    assert list(rows["stage"]) == ["start", "LP", "FT"] and set(rows["split"]) == {"train"}
    for stage, value in zip(rows["stage"], rows["value"], strict=True):
        logits = result.arrays.get(f"logits/{stage}/train", before).double()
        lengths = []
        for row, label in zip(logits, task.train["label"], strict=True):
            left = -row.softmax(dim=0)
            left[label] += 1
            lengths.append(left.square().sum().sqrt().item())
        assert value == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
    again = logits_of(model, task.train)
    torch.testing.assert_close(result.arrays["logits/FT/train"], again, rtol=1e-5, atol=1e-5)


def test_same_seed_same_bits(task):
    first, second = (
        run_stages(small(), task, [LinearProbe(), FineTune(**QUICK)], seed=3, device="cpu")
        for _ in range(2)
    )
    keep = lambda rows: rows[~rows.metric.isin(["seconds", "peak_memory_bytes"])].reset_index(
        drop=True
    )
    assert keep(first.metrics).equals(keep(second.metrics)) and first.history.equals(second.history)
    for name, value in first.arrays.items():
        assert torch.equal(value, second.arrays[name]), name
    other = run_stages(small(), task, [FineTune(**QUICK)], seed=4, device="cpu")
    assert not torch.equal(other.arrays["logits/FT/test"], first.arrays["logits/FT/test"])


def test_gradient_steps_are_recorded(task):
    result = run_stages(small(), task, [LinearProbe(epochs=20, learning_rate=0.01)], device="cpu")
    norms = result.history[result.history.metric == "head_norm"]
    assert list(norms.epoch) == list(range(21)) and (result.history.stage == "LP").all()


# --- computed once ---------------------------------------------------------------------------------------------------


def test_a_second_seed_computes_neither_tokens_nor_features(task, monkeypatch):
    run_stages(small(), task, [LinearProbe()], seed=0, device="cpu")

    def refuse(*given, **more):
        raise AssertionError("computed again")

    monkeypatch.setattr(measuring, "features_of", refuse)
    monkeypatch.setattr(Classifier, "encode", refuse)
    run_stages(small(), task, [LinearProbe()], seed=1, device="cpu")
    changed = small()
    with torch.no_grad():
        next(changed.backbone.parameters())[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="computed again"):
        run_stages(changed, task, [LinearProbe()], seed=1, device="cpu")


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_a_run_takes_the_fingerprint_of_its_tokenizer_once(task, monkeypatch):
    taken, real = [], measuring.tokenizer_fingerprint
    monkeypatch.setattr(
        measuring, "tokenizer_fingerprint", lambda one: (taken.append(one), real(one))[1]
    )
    run_stages(small(), task, [LinearProbe(penalty=1.0)], device="cpu")
    assert len(taken) == 1 and len(task.splits()) > 1


def test_fused_matrices_are_named_in_the_stage_table(task, capsys):
    model = build_tiny_model("gpt2", num_labels=2, dtype=torch.float32)
    result = run_stages(model, task, [LoRA(r=2, **QUICK)], device="cpu")
    assert (
        "adapted matrices: c_attn" in capsys.readouterr().out
        and result.stages[0]["note"] == "adapted matrices: c_attn"
    )


def test_lora_head_trains_and_comes_back(task, tmp_path):
    model = small()
    head = model.head.weight.detach().clone()
    run_stages(model, task, [LoRA(r=2, **QUICK)], device="cpu")
    assert not torch.equal(model.head.weight, head)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits_of(Classifier.from_pretrained(tmp_path / "saved"), task.test),
        logits_of(model, task.test),
    )


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FineTune(epochs=0), "epochs=0"),
        (lambda: FineTune(learning_rate=float("inf")), "learning_rate=inf"),
        (lambda: FineTune(batch_size=True), "batch_size=True"),
        (lambda: LoRA(r=0), "r=0"),
        (lambda: FineTune(warmup_share=1.0), "warmup_share"),
        (lambda: LinearProbe(epochs=5), "give both"),
        (lambda: LinearProbe(batch_size=5), "gradient steps"),
        (lambda: FineTune(head_learning_rate=-1e-3), "head_learning_rate=-0.001"),
        (lambda: FineTune(backbone_learning_rate=float("nan")), "backbone_learning_rate=nan"),
        (lambda: LoRA(weight_decay=-1), "LoRA.weight_decay=-1"),
        (lambda: method_stages("LPFT"), "did you mean 'LP-FT'"),
    ],
)
def test_settings_that_cannot_train_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_head_of_another_size_is_refused(task):
    with pytest.raises(ValueError, match="num_labels=2"):
        run_stages(build_tiny_model("bert", num_labels=3), task, [LinearProbe()], device="cpu")


def test_a_folder_of_another_run_is_refused(task, tmp_path):
    run_stages(small(), task, [LinearProbe()], output=tmp_path / "out", device="cpu")
    for model, seed in ((small(seed=5), 0), (small(), 1)):
        with pytest.raises(ValueError, match="another model, task, seed or settings"):
            run_stages(
                model, task, [LinearProbe()], seed=seed, output=tmp_path / "out", device="cpu"
            )


def test_a_finished_stage_comes_back_with_every_parameter(task, tmp_path):
    "A head alone would give plausible answers from the wrong backbone."
    for stage in (FineTune(**QUICK), LoRA(r=2, **QUICK)):
        first, second, folder = small(), small(), tmp_path / stage.name
        run_stages(first, task, [stage], output=folder, device="cpu")
        result = run_stages(second, task, [stage], output=folder, device="cpu")
        theirs = dict(second.named_parameters())
        for name, p in first.named_parameters():
            assert torch.equal(p, theirs[name]), name
        torch.testing.assert_close(
            result.arrays[f"logits/{stage.name}/test"], logits_of(second, task.test)
        )


def test_settings_go_by_name():
    for kind in (FineTune, LoRA, LinearProbe):
        with pytest.raises(TypeError):
            kind(1)
    assert ScaleHead(10) == ScaleHead(factor=10)
    assert isinstance(LoRA(), stages.TrainingStage) and isinstance(FineTune(), stages.TrainingStage)
    assert (FineTune().learning_rate, LoRA().learning_rate) == (1e-5, 5e-4)


def test_nan_weights_stop_the_run(task):
    model = small()
    with torch.no_grad():
        model.backbone.encoder.layer[0].attention.self.value.weight[:] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        run_stages(model, task, [FineTune(**QUICK)], device="cpu")


def test_a_model_without_a_tokenizer_is_refused(task):
    model = small()
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        run_stages(model, task, [LinearProbe()], device="cpu")


# --- a kill between and inside stages --------------------------------------------------------------------------------


def same_numbers(a, b):
    "Bit for bit the same; NaN, where a measure has no value, in the same places."
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def start_script(python, folder, *more, **world):
    write_task(folder)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LPFT_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        **world,
    }
    return subprocess.Popen(
        [*python, str(SCRIPT), str(folder), *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_agree_with_one(tmp_path, python):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    runs = [start_script(python, one, "--dropout", "0")]
    runs += [start_script(python, two, "--dropout", "0", **world) for world in worlds_of(2)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    first, second, other = (
        torch.load(folder / name, weights_only=True)
        for folder, name in ((one, "end.pt"), (two, "end.pt"), (two, "end-1.pt"))
    )
    for name in first:
        torch.testing.assert_close(
            second[name], first[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
        )  # each element, the smallest logits too
        assert (second[name] - first[name]).double().nan_to_num().norm() <= 1e-5 * first[
            name
        ].double().nan_to_num().norm(), name
        assert same_numbers(second[name], other[name]), name


def test_killed_inside_a_stage_ends_like_an_uninterrupted_run(tmp_path, python):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    run = start_script(python, whole)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0, output
    run, limit = start_script(python, cut, "--pause", "0.3"), time.monotonic() + 120
    while not list(cut.glob("out/2-FT/checkpoint-*/complete.json")) and time.monotonic() < limit:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert list(cut.glob("out/2-FT/checkpoint-*/complete.json")) and not (cut / "end.pt").exists()
    run = start_script(python, cut)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "LP: taken from the output folder" in output, output
    first, second = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, cut))
    for name in first:
        assert same_numbers(first[name], second[name]), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("LP", "expected a list"),
        (LinearProbe(), "expected a list"),
        (["LP"], r"'LP' is no stage: method_stages\('LP'\)"),
        ([LinearProbe], r"is no stage: write LinearProbe\(\)"),
        ([LinearProbe(), 3], "3 is no stage"),
    ],
)
def test_what_is_no_stage_is_refused_before_anything_is_encoded(given, said, task):
    with pytest.raises(TypeError, match=said):
        run_stages(small(), task, given)


# --- settings that mean nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LoRA, {"alpha": 0}, "alpha=0"),
        (LoRA, {"alpha": -8}, "alpha=-8"),
        (LoRA, {"r": 2.5}, "r=2.5"),
        (LoRA, {"r": True}, "r=True"),
        (LoRA, {"targets": "query"}, "targets='query'"),
        (LoRA, {"targets": ()}, "targets=()"),
        (FineTune, {"trainable": "head.*"}, "trainable='head.*'"),
        (FineTune, {"trainable": ()}, "trainable=()"),
        (FineTune, {"batch_size": 2.5}, "batch_size=2.5"),
        (FineTune, {"batch_size": 8.0}, "batch_size=8.0"),
        (FineTune, {"length_grouping": "no"}, "length_grouping='no'"),
        (LinearProbe, {"penalty": -1}, "penalty=-1"),
        (LinearProbe, {"penalty": float("nan")}, "penalty=nan"),
        (LinearProbe, {"folds": 1}, "folds"),
        (LinearProbe, {"repeats": 0}, "repeats=0"),
        (LinearProbe, {"epochs": -3, "learning_rate": 0.1}, "epochs=-3"),
        (LinearProbe, {"epochs": 3, "learning_rate": -0.1}, "learning_rate=-0.1"),
        (LinearProbe, {"epochs": 3, "learning_rate": 0.1, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_said(kind, settings, message):
    with pytest.raises(ValueError) as found:
        kind(**settings)
    assert message in str(found.value)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": True},
        {"seed": -1},
        {"seed": 1.5},
        {"max_length": 0},
        {"max_length": False},
        {"minutes_between_checkpoints": float("nan")},
        {"minutes_between_checkpoints": -1},
    ],
)
def test_options_that_mean_nothing_are_refused(options, task):
    with pytest.raises(ValueError, match=next(iter(options))):
        run_stages(small(), task, [LinearProbe()], device="cpu", **options)


def test_a_probe_without_a_penalty_runs_as_far_as_there_is_a_best_head(task):
    with pytest.raises(ConvergenceError, match="linearly separable"):
        run_stages(small(), task, [LinearProbe(penalty=float("inf"))], device="cpu")
    stage = LinearProbe(penalty=float("inf"), epochs=2, learning_rate=0.1)
    result = run_stages(small(), task, [stage], device="cpu")
    assert result.stages[0]["settings"]["penalty"] == "inf"


def test_weights_in_half_precision_are_probed_and_not_trained(task):
    model = small().to(torch.bfloat16)
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        run_stages(model, task, [FineTune(**QUICK)], device="cpu")


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_damaged_key_is_named_and_the_stage_made_again(how, task, tmp_path, caplog):
    where = {"output": tmp_path / "out", "device": "cpu"}
    first = run_stages(small(), task, [FineTune(**QUICK)], **where)
    path = tmp_path / "out" / "1-FT" / "key.json"
    data = path.read_bytes()
    changed = {"flipped": data.replace(b"key", b"kez", 1), "cut": data[:30], "emptied": b""}
    path.write_bytes(changed[how])
    stray = path.parent / "checkpoint-1"
    stray.mkdir()
    again = run_stages(small(), task, [FineTune(**QUICK)], **where)
    assert "key.json" in caplog.text and "made again" in caplog.text and not stray.exists()
    rows = [
        frame.metrics.query("metric != 'seconds' and metric != 'peak_memory_bytes'")
        for frame in (first, again)
    ]
    assert rows[0].equals(rows[1]) and path.read_bytes() == data
