"""The training loop against a bare PyTorch loop, over accumulation steps, processes, kills and resumes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lpft_nb.classifier import Classifier
from lpft_nb.training.loop import (
    DivergenceCheck,
    DivergenceError,
    EncodedDataset,
    TrainingPlan,
    collate,
    epoch_order,
    last_checkpoint,
    padding_share,
    parameter_groups,
    train,
)

SCRIPT = Path(__file__).parent / "train_script.py"


def toy_data(examples, seed=0, vocabulary=50, classes=3):
    "Random token lists whose label can be read off the tokens."
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = [], []
    for _ in range(examples):
        label = int(torch.randint(classes, (1,), generator=generator))
        length = int(torch.randint(4, 14, (1,), generator=generator))
        ids = (
            torch.randint(10 + 12 * label, 22 + 12 * label, (length,), generator=generator)
            % vocabulary
        ).tolist()
        inputs.append(dict(input_ids=ids, attention_mask=[1] * length))
        labels.append(label)
    return EncodedDataset(inputs, torch.tensor(labels))


def small_model(dropout=0.1, dtype=torch.float32, num_labels=3):
    from conftest import build_tiny_model

    return build_tiny_model(
        "bert",
        num_labels=num_labels,
        dtype=dtype,
        head_dropout=dropout,
        backbone=dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
    )


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- the order of the examples -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    grouped=st.booleans(),
)
def test_every_example_once_and_reproducible(lengths, batch, seed, epoch, grouped):
    order = epoch_order(lengths, batch, seed, epoch, grouped)
    assert sorted(order) == list(range(len(lengths)))
    assert order == epoch_order(lengths, batch, seed, epoch, grouped)


def test_global_random_state_is_neither_read_nor_changed():
    before = torch.get_rng_state()
    first = epoch_order(list(range(100)), 8, 0, 0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert first == epoch_order(list(range(100)), 8, 0, 0)


def test_padding_share_by_hand():
    assert padding_share([1, 3, 2, 2], [0, 1, 2, 3], 2) == pytest.approx(1 - 8 / 10)


@pytest.mark.parametrize(
    "name, columns, batch, limit",
    [
        ("rte", ("sentence1", "sentence2"), 16, 0.05),
        ("sst2", ("sentence",), 32, 0.05),
        ("cb", ("premise", "hypothesis"), 16, 0.20),
        ("cb", ("premise", "hypothesis"), 8, 0.20),
    ],
)
def test_little_padding_on_real_data(shared_data, embedded_model, name, columns, batch, limit):
    rows = [
        json.loads(line)
        for line in (shared_data / name / "train.jsonl").read_text().split("\n")
        if line
    ]
    texts = [
        tuple(row[c] for c in columns) if len(columns) > 1 else row[columns[0]] for row in rows
    ]
    model = Classifier.from_pretrained(embedded_model, num_labels=2)
    lengths = [len(example["input_ids"]) for example in model.encode(texts, max_length=128)]
    assert padding_share(lengths, epoch_order(lengths, batch, 0, 0), batch) <= limit


# --- the loop ------------------------------------------------------------------------------------------------------


def bare_loop(model, data, plan, seed):
    "The same training, written out: AdamW, linear decay, clipping, mean loss over each batch."
    groups = parameter_groups(model, plan.head_learning_rate, plan.backbone_learning_rate)
    optimizer = torch.optim.AdamW(groups)
    steps = math.ceil(len(data) / plan.batch_size) * int(plan.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / steps)
    )
    losses = []
    model.train()
    for epoch in range(int(plan.epochs)):
        order = epoch_order(data.lengths, plan.batch_size, seed, epoch, plan.length_grouping)
        for at in range(0, len(order), plan.batch_size):
            batch = collate(model, [data[i] for i in order[at : at + plan.batch_size]])
            labels = batch.pop("labels")
            loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    return losses


def last_epoch_plan(**changes):
    return TrainingPlan(
        **{
            **dict(epochs=2, head_learning_rate=1e-2, backbone_learning_rate=1e-3, batch_size=8),
            **changes,
        }
    )


def test_agrees_with_a_bare_loop(tmp_path):
    data = toy_data(21)
    ours, theirs = (
        small_model(dropout=0.0, dtype=torch.float64) for _ in range(2)
    )  # Adam blows up rounding where gradients vanish
    theirs.load_state_dict(ours.state_dict())
    start = state(ours)
    history, facts = train(
        ours,
        data,
        data,
        last_epoch_plan(epochs=1),
        seed=3,
        folder=tmp_path,
        minutes_between_checkpoints=math.inf,
    )
    losses = bare_loop(theirs, data, last_epoch_plan(epochs=1), seed=3)
    logged = [row["value"] for row in history if row["metric"] == "loss"]
    assert facts["steps"] == len(losses) == len(logged) == 3
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), rtol=1e-5, atol=0)
    moved = 0
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(a, start[name])
    assert moved > 10


def test_accumulation_changes_nothing(tmp_path):
    data, ends = toy_data(21), []
    for steps in (1, 4):
        model = small_model(dropout=0.0)
        history, _ = train(
            model,
            data,
            data,
            last_epoch_plan(gradient_accumulation=steps),
            0,
            tmp_path / str(steps),
            minutes_between_checkpoints=math.inf,
        )
        losses = [row["value"] for row in history if row["metric"] == "loss"]
        ends.append((torch.tensor(losses), model(**model.pad(data.inputs)).logits))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-5)


def test_padding_does_not_change_the_loss():
    data, model = toy_data(9), small_model().eval()
    batch = collate(model, [data[i] for i in range(9)])
    wide = {
        key: torch.nn.functional.pad(value, (0, 40))
        for key, value in batch.items()
        if key != "labels"
    }
    narrow_loss = torch.nn.functional.cross_entropy(
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    )
    wide_loss = torch.nn.functional.cross_entropy(model(**wide).logits, batch["labels"])
    torch.testing.assert_close(narrow_loss, wide_loss, rtol=1e-6, atol=1e-6)


def test_best_epoch_is_kept(tmp_path, monkeypatch):
    import lpft_nb.training.loop as fine_tuning

    scores, seen = iter([0.2, 0.9, 0.9, 0.1]), []
    model = small_model()

    def fake(prediction, selection):
        seen.append(state(model))
        return dict(accuracy=next(scores), nll=1.0)

    monkeypatch.setattr(fine_tuning, "validation_metrics", fake)
    _, facts = train(
        model,
        toy_data(16),
        toy_data(8, seed=1),
        last_epoch_plan(epochs=4),
        0,
        tmp_path,
        minutes_between_checkpoints=math.inf,
    )
    assert (facts["best_step"], facts["best_value"]) == (
        4,
        0.9,
    )  # the first of equals: epoch 2 of 2 steps each
    for name, p in model.named_parameters():
        assert torch.equal(p, seen[1][name]), name


def test_two_learning_rates(tmp_path):
    model = small_model()
    before = state(model)
    train(
        model,
        toy_data(16),
        toy_data(8),
        last_epoch_plan(epochs=1, backbone_learning_rate=0.0),
        0,
        tmp_path,
        minutes_between_checkpoints=math.inf,
    )
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head.weight", "head.bias"}


# --- faults --------------------------------------------------------------------------------------------------------


def test_nan_stops_with_step_and_learning_rate(tmp_path):
    model = small_model()
    with torch.no_grad():
        next(model.backbone.parameters())[:] = float("nan")
    with pytest.raises(DivergenceError, match=r"step 0 .*learning rate 0.01"):
        train(
            model,
            toy_data(16),
            toy_data(8),
            last_epoch_plan(),
            0,
            tmp_path,
            minutes_between_checkpoints=math.inf,
        )


def test_divergence_stops(tmp_path):
    model = small_model()
    plan = last_epoch_plan(
        epochs=30, head_learning_rate=50.0, backbone_learning_rate=1.0, max_gradient_norm=0
    )
    with pytest.raises(DivergenceError, match="Lower the learning rate"):
        train(
            model,
            toy_data(40),
            toy_data(8),
            plan,
            0,
            tmp_path,
            minutes_between_checkpoints=math.inf,
        )


def test_divergence_in_the_last_step_is_seen_by_the_validation(tmp_path):
    plan = last_epoch_plan(
        epochs=1,
        batch_size=16,
        head_learning_rate=1e30,
        backbone_learning_rate=1e30,
        max_gradient_norm=0,
    )
    with pytest.raises(DivergenceError, match="step 1"):
        train(
            small_model(),
            toy_data(16),
            toy_data(8),
            plan,
            0,
            tmp_path,
            minutes_between_checkpoints=math.inf,
        )


def test_batch_that_cannot_be_split():
    with pytest.raises(ValueError, match="multiple of 3"):
        TrainingPlan(1, 1e-3, 1e-3, 8, gradient_accumulation=3).process_batch_size(1)


def test_no_checkpoint_between_an_epochs_last_step_and_its_evaluation(tmp_path, monkeypatch):
    import lpft_nb.training.loop as fine_tuning

    measure, seen = fine_tuning.validation_metrics, []

    def look(*given):  # what a kill during the evaluation would leave
        seen.append(last_checkpoint(tmp_path))
        return measure(*given)

    monkeypatch.setattr(fine_tuning, "validation_metrics", look)
    train(
        small_model(),
        toy_data(16),
        toy_data(8),
        last_epoch_plan(epochs=3, batch_size=4),
        0,
        tmp_path,
        minutes_between_checkpoints=0.0,
    )
    assert [path.name for path in seen] == [
        "checkpoint-3",
        "checkpoint-7",
        "checkpoint-11",
    ]  # four steps an epoch
    assert last_checkpoint(tmp_path).name == "checkpoint-12"


@pytest.mark.parametrize("step", range(1, 12))
def test_cut_after_any_step_ends_with_the_same_numbers(tmp_path, monkeypatch, step):
    import lpft_nb.training.loop as fine_tuning

    plan, data, validation = (
        last_epoch_plan(epochs=3, batch_size=4),
        toy_data(16),
        toy_data(8, seed=1),
    )
    whole = small_model()
    history, facts = train(
        whole, data, validation, plan, 0, tmp_path / "whole", minutes_between_checkpoints=math.inf
    )

    class Cut(Exception):
        "Stands for a kill."

    shown = fine_tuning.Progress.on_step_begin

    def cut(self, args, state, control, **more):
        if state.global_step == step:
            raise Cut
        return shown(self, args, state, control, **more)

    monkeypatch.setattr(fine_tuning.Progress, "on_step_begin", cut)
    with pytest.raises(Cut):
        train(
            small_model(),
            data,
            validation,
            plan,
            0,
            tmp_path / "cut",
            minutes_between_checkpoints=0.0,
        )
    monkeypatch.undo()
    again = small_model()
    resumed, same = train(
        again, data, validation, plan, 0, tmp_path / "cut", minutes_between_checkpoints=0.0
    )
    assert resumed == history and same == facts
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    assert last_checkpoint(tmp_path) is None


# --- other processes -----------------------------------------------------------------------------------------------


def run_script(arguments, processes=1, wait=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = (
        []
        if processes == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    process = subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_two_processes_agree_with_one(tmp_path):
    run_script([tmp_path / "one", "--dropout", "0.0"])
    run_script([tmp_path / "two", "--dropout", "0.0"], processes=2)
    one, two = (
        torch.load(tmp_path / name / "end-0.pt", weights_only=True) for name in ("one", "two")
    )
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-5)
    assert (
        one["fillers"] == 0 and two["fillers"] == 3
    )  # 21 examples in batches of 4: the last one did not divide


def test_with_dropout_all_ranks_end_alike(tmp_path):
    run_script([tmp_path / "two", "--dropout", "0.1"], processes=2)
    first, second = (
        torch.load(tmp_path / "two" / f"end-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name in first["weights"]:
        assert torch.equal(first["weights"][name], second["weights"][name]), name


def test_killed_run_ends_with_the_same_numbers(tmp_path):
    run_script([tmp_path / "whole", "--dropout", "0.1", "--epochs", "6", "--minutes", "inf"])
    process = run_script(
        [tmp_path / "cut", "--dropout", "0.1", "--epochs", "6", "--minutes", "0", "--pause", "0.3"],
        wait=False,
    )
    limit = time.monotonic() + 120
    while last_checkpoint(tmp_path / "cut") is None and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (
        last_checkpoint(tmp_path / "cut") is not None
        and not (tmp_path / "cut" / "end-0.pt").exists()
    )
    output = run_script([tmp_path / "cut", "--dropout", "0.1", "--epochs", "6", "--minutes", "0"])
    whole, cut = (
        torch.load(tmp_path / name / "end-0.pt", weights_only=True) for name in ("whole", "cut")
    )
    assert "resumed from step" in output
    assert torch.equal(whole["losses"], cut["losses"]) and torch.equal(
        whole["logits"], cut["logits"]
    )
    for name in whole["weights"]:
        assert torch.equal(whole["weights"][name], cut["weights"][name]), name


def test_a_large_head_may_lose_many_nats_without_diverging():
    losses = [0.0] + [50.0] * 25
    with pytest.raises(DivergenceError):
        check = DivergenceCheck(3)
        for step, loss in enumerate(losses):
            check(loss, step, 1e-3)
    check = DivergenceCheck(3, head_ratio=100)
    for step, loss in enumerate(losses):
        check(loss, step, 1e-3)
    with pytest.raises(DivergenceError):
        for step in range(25):
            check(2e4, step, 1e-3)
