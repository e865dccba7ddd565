"""The training loop against a bare PyTorch loop, over accumulation steps, processes, kills and resumes."""

import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from process_fixtures import worlds_of
from toys import small_model, toy_data

from lpft_nb.training.batches import collate, epoch_order
from lpft_nb.training.checkpoints import last_checkpoint
from lpft_nb.training.arguments import training_arguments
from lpft_nb.training.loop import DivergenceCheck, DivergenceError, parameter_groups, train
from lpft_nb.training.optimisers import OPTIMISERS
from lpft_nb.training.stage import FineTune

SCRIPT = Path(__file__).parent / "train_script.py"


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- the loop ------------------------------------------------------------------------------------------------------


def bare_loop(model, data, stage, seed):
    "The same training, written out: the optimiser, linear decay, clipping, mean loss over each batch."
    head, backbone = stage.learning_rates()
    groups = parameter_groups(model, head_learning_rate=head, backbone_learning_rate=backbone)
    rules = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "signgd": torch.optim.SGD}
    optimizer = rules[stage.optimiser](groups)
    steps = math.ceil(len(data) / stage.batch_size) * int(stage.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / steps)
    )
    losses = []
    model.train()
    for epoch in range(int(stage.epochs)):
        order = epoch_order(
            data.lengths,
            stage.batch_size,
            seed=seed,
            epoch=epoch,
            length_grouping=stage.length_grouping,
        )
        for at in range(0, len(order), stage.batch_size):
            batch = collate(model, [data[i] for i in order[at : at + stage.batch_size]])
            labels = batch.pop("labels")
            loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
            loss.backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for parameter in trained if stage.optimiser == "signgd" else ():
                parameter.grad.sign_()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    return losses


def quick_stage(**changes):
    "Two epochs at two learning rates."
    start = dict(epochs=2, head_learning_rate=1e-2, backbone_learning_rate=1e-3, batch_size=8)
    return FineTune(**start | changes)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_agrees_with_a_bare_loop(tmp_path, optimiser):
    data, stage = toy_data(21), quick_stage(epochs=1, optimiser=optimiser)
    ours, theirs = (
        small_model(dropout=0.0, dtype=torch.float64) for _ in range(2)
    )  # Adam blows up rounding where gradients vanish
    theirs.load_state_dict(ours.state_dict())
    start = state(ours)
    history, facts = train(
        ours,
        data,
        data,
        stage,
        seed=3,
        folder=tmp_path,
        minutes_between_checkpoints=math.inf,
    )
    losses = bare_loop(theirs, data, stage, seed=3)
    logged = [row["value"] for row in history if row["metric"] == "loss"]
    assert facts["steps"] == len(losses) == len(logged) == 3
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), rtol=1e-5, atol=0)
    moved = 0
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        if optimiser != "signgd" or not name.endswith("key.bias"):  # their gradients are rounding
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
            quick_stage(gradient_accumulation=steps),
            seed=0,
            folder=tmp_path / str(steps),
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
    import lpft_nb.training.loop as loop

    scores, seen = iter([0.2, 0.9, 0.9, 0.1]), []
    model = small_model()

    def fake(prediction, selection):
        seen.append(state(model))
        return dict(accuracy=next(scores), nll=1.0)

    monkeypatch.setattr(loop, "validation_metrics", fake)
    _, facts = train(
        model,
        toy_data(16),
        toy_data(8, seed=1),
        quick_stage(epochs=4),
        seed=0,
        folder=tmp_path,
        minutes_between_checkpoints=math.inf,
    )
    assert (facts["best_step"], facts["best_value"]) == (
        4,
        0.9,
    )  # the first of equals: epoch 2 of 2 steps each
    for name, p in model.named_parameters():
        assert torch.equal(p, seen[1][name]), name


def test_a_validation_without_a_number_is_named(tmp_path, monkeypatch):
    import lpft_nb.training.loop as loop

    monkeypatch.setattr(
        loop, "validation_metrics", lambda prediction, selection: dict(accuracy=math.nan, nll=1.0)
    )
    data, stage = (toy_data(16), toy_data(8, seed=1)), quick_stage(epochs=1)
    with pytest.raises(ValueError, match="expected a number for eval_accuracy"):
        train(small_model(), *data, stage, seed=0, folder=tmp_path)


def test_two_learning_rates(tmp_path):
    model = small_model()
    before = state(model)
    train(
        model,
        toy_data(16),
        toy_data(8),
        quick_stage(epochs=1, backbone_learning_rate=0.0),
        seed=0,
        folder=tmp_path,
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
            quick_stage(),
            seed=0,
            folder=tmp_path,
            minutes_between_checkpoints=math.inf,
        )


def test_divergence_stops(tmp_path):
    model = small_model()
    stage = quick_stage(
        epochs=30, head_learning_rate=50.0, backbone_learning_rate=1.0, max_gradient_norm=0
    )
    with pytest.raises(DivergenceError, match="Lower the learning rate"):
        train(
            model,
            toy_data(40),
            toy_data(8),
            stage,
            seed=0,
            folder=tmp_path,
            minutes_between_checkpoints=math.inf,
        )


def test_divergence_in_the_last_step_is_seen_by_the_validation(tmp_path):
    stage = quick_stage(
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
            stage,
            seed=0,
            folder=tmp_path,
            minutes_between_checkpoints=math.inf,
        )


def test_batch_that_cannot_be_split():
    with pytest.raises(ValueError, match="multiple of 3"):
        FineTune(batch_size=8, gradient_accumulation=3).process_batch_size(1)


def test_no_checkpoint_between_an_epochs_last_step_and_its_evaluation(tmp_path, monkeypatch):
    import lpft_nb.training.loop as loop

    measure, seen = loop.validation_metrics, []

    def look(*given):  # what a kill during the evaluation would leave
        seen.append(last_checkpoint(tmp_path))
        return measure(*given)

    monkeypatch.setattr(loop, "validation_metrics", look)
    train(
        small_model(),
        toy_data(16),
        toy_data(8),
        quick_stage(epochs=3, batch_size=4),
        seed=0,
        folder=tmp_path,
        minutes_between_checkpoints=0.0,
    )
    assert [path.name for path in seen] == [
        "checkpoint-3",
        "checkpoint-7",
        "checkpoint-11",
    ]  # four steps an epoch
    assert last_checkpoint(tmp_path).name == "checkpoint-12"


class Cut(Exception):
    "Stands for a kill."


def test_cut_after_every_step_ends_with_the_same_numbers(tmp_path, monkeypatch):
    """Twelve steps in twelve calls, each of which is cut after one step more than the call before it."""
    import lpft_nb.training.loop as loop

    settings = dict(stage=quick_stage(epochs=3, batch_size=4), seed=0)
    data, validation = toy_data(16), toy_data(8, seed=1)
    whole = small_model()
    history, facts = train(
        whole,
        data,
        validation,
        **settings,
        folder=tmp_path / "whole",
        minutes_between_checkpoints=math.inf,
    )
    shown = loop.ShowProgress.on_step_begin

    def cut(self, args, state, control, **more):
        if state.global_step == step:
            raise Cut
        return shown(self, args, state, control, **more)

    monkeypatch.setattr(loop.ShowProgress, "on_step_begin", cut)
    often = dict(settings, folder=tmp_path / "cut", minutes_between_checkpoints=0.0)
    for step in range(1, 12):
        with pytest.raises(Cut):
            train(small_model(), data, validation, **often)
        left = last_checkpoint(tmp_path / "cut")  # none while an epoch waits for its evaluation
        assert step == 1 or int(left.name.split("-")[1]) >= step - 1
    monkeypatch.undo()
    again = small_model()
    resumed, same = train(again, data, validation, **often)
    assert resumed == history and same == facts
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


# --- other processes -----------------------------------------------------------------------------------------------


def start_script(python, arguments, **environment):
    return subprocess.Popen(
        [*python, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs_of(*processes) -> list[str]:
    "What processes that work together have printed, once all have ended well."
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def run_script(python, arguments, processes=1):
    if processes == 1:
        (output,) = outputs_of(start_script(python, arguments))
        return output
    worlds = worlds_of(processes)
    return outputs_of(*(start_script(python, arguments, **world) for world in worlds))


def test_two_processes_agree_with_one(tmp_path, python):
    run_script(python, [tmp_path / "one", "--dropout", "0.0"])
    run_script(python, [tmp_path / "two", "--dropout", "0.0"], processes=2)
    one, two = (
        torch.load(tmp_path / name / "end-0.pt", weights_only=True) for name in ("one", "two")
    )
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-5, atol=1e-5)
    assert (
        one["fillers"] == 0 and two["fillers"] == 3
    )  # 21 examples in batches of 4: the last one did not divide


def test_with_dropout_all_ranks_end_alike(tmp_path, python):
    run_script(python, [tmp_path / "two", "--dropout", "0.1"], processes=2)
    first, second = (
        torch.load(tmp_path / "two" / f"end-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name in first["weights"]:
        assert torch.equal(first["weights"][name], second["weights"][name]), name


def test_killed_run_ends_with_the_same_numbers(tmp_path, python):
    whole = ["--dropout", "0.1", "--epochs", "6", "--minutes"]
    run_script(python, [tmp_path / "whole", *whole, "inf"])
    process = start_script(python, [tmp_path / "cut", *whole, "0", "--pause", "0.3"])
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
    output = run_script(python, [tmp_path / "cut", *whole, "0"])
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
            check(loss, step=step, learning_rate=1e-3)
    check = DivergenceCheck(3, head_ratio=100)
    for step, loss in enumerate(losses):
        check(loss, step=step, learning_rate=1e-3)
    with pytest.raises(DivergenceError):
        for step in range(25):
            check(2e4, step=step, learning_rate=1e-3)


@pytest.mark.parametrize(
    "losses", [[0.7, 1e4], [0.7, 40.0, 60.0, 80.0], [math.inf], [0.7] + [9.0] * 20]
)
def test_a_loss_that_blows_up_in_a_few_steps_is_seen(losses):
    check = DivergenceCheck(classes=2)
    with pytest.raises(DivergenceError, match="Lower the learning rate"):
        for step, loss in enumerate(losses):
            check(loss, step=step, learning_rate=1.0)


def test_a_rough_start_is_no_divergence():
    check = DivergenceCheck(classes=2)
    for step, loss in enumerate([0.7, 30.0, 20.0, 10.0, 5.0] + [1.0] * 30):
        check(loss, step=step, learning_rate=1.0)


def test_a_process_uses_one_card_and_the_one_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
    chosen = []
    options = dict(seed=0, dtype=torch.float32, processes=1, examples=40)
    try:
        second = training_arguments(quick_stage(), tmp_path, device="cuda:1", **options)
        assert str(second.device) == "cuda:1" == chosen[-1]
        assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    finally:
        plain = training_arguments(quick_stage(), tmp_path, device="cpu", **options)
    assert str(plain.device) == "cpu"
    plain._n_gpu = 4  # what it would find on a machine with four cards
    assert plain.n_gpu == 1 and plain.train_batch_size == quick_stage().batch_size
