"""Heads with a hidden layer or the last blocks: what moves, the steps of a plain loop, dropout off, resume, save and load."""

import json

import pytest
import torch
from conftest import build_tiny_model
from test_stages import write_task

from lpft_nb.classifier import Classifier, features_of, logits_of
from lpft_nb.energy import energy
from lpft_nb.linear_probe import ConvergenceError
from lpft_nb.models.hidden_layer import below_hidden_layer
from lpft_nb.models.lora import add_lora
from lpft_nb.solvers.descent import soft_targets
from lpft_nb.stages import FineTune, LinearProbe, run_stages
from lpft_nb.tasks import load_task
from lpft_nb.training.larger_heads import CHUNK, last_blocks

NOISY = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
STEPS = dict(epochs=3, learning_rate=3e-3, batch_size=8)
HEADS = {
    "hidden": LinearProbe(hidden=6, **STEPS),
    "all at once": LinearProbe(hidden=6, epochs=20, learning_rate=1e-2),  # in pieces of 32
    "block": LinearProbe(blocks=1, **STEPS),
    "kept block": LinearProbe(blocks=1, fresh=False, **STEPS),
    "both": LinearProbe(hidden=6, blocks=1, smoothing=0.2, **STEPS),
}
MOVES = {
    "hidden": ("head.", "backbone.hidden_layer."),
    "all at once": ("head.", "backbone.hidden_layer."),
    "block": ("head.", "backbone.encoder.layer.1."),
    "kept block": ("head.", "backbone.encoder.layer.1."),
    "both": ("head.", "backbone.hidden_layer.", "backbone.encoder.layer.1."),
}


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))
    return load_task(write_task(tmp_path))


def noisy(**fields):
    fields = {"backbone": NOISY, "dtype": torch.float32} | fields
    return build_tiny_model("bert", num_labels=2, head_dropout=0.5, **fields)


@pytest.mark.parametrize("name", HEADS)
def test_exactly_the_head_and_what_belongs_to_it_moves(name, task):
    model, before = noisy(), noisy().state_dict()
    run_stages(model, task, [HEADS[name]], device="cpu")
    for key, table in model.state_dict().items():
        new = key not in before or before[key].shape != table.shape
        assert (new or not torch.equal(before[key], table)) == key.startswith(MOVES[name]), key


@pytest.mark.parametrize("name", HEADS)
def test_the_walk_is_a_plain_loop_without_dropout(name, task):
    """An oracle of its own: the whole model, read text by text in evaluation mode, and torch's AdamW."""
    probe, model, oracle = HEADS[name], noisy(), noisy()
    result = run_stages(model, task, [probe], device="cpu", seed=5)
    probe.prepare(oracle, 5)
    labels = torch.tensor(list(task.train["label"]))
    assert len(labels) > CHUNK and len(labels) % CHUNK
    targets = soft_targets(labels, 2, probe.smoothing or 0.0).float()
    moving = [p for p in oracle.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, probe.learning_rate, weight_decay=0)
    order = torch.Generator().manual_seed(5)
    oracle.eval()
    energies = [energy(logits_of(oracle, task.train), labels)]
    for _ in range(probe.epochs):
        for rows in torch.randperm(len(labels), generator=order).split(
            probe.batch_size or len(labels)
        ):
            scores = [
                oracle(**oracle.tokenize([task.train["text"][int(row)]])).logits for row in rows
            ]
            loss = -(targets[rows] * torch.cat(scores).log_softmax(dim=1)).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        energies.append(energy(logits_of(oracle, task.train), labels))
    torch.testing.assert_close(
        result.arrays["logits/LP/test"], logits_of(oracle, task.test), rtol=1e-3, atol=1e-4
    )
    walked = result.history.query("metric == 'energy'")["value"].tolist()
    assert walked == pytest.approx(energies, rel=1e-3) and len(walked) == probe.epochs + 1
    measured = result.metrics.query("stage == 'LP' and metric == 'energy'")["value"].item()
    assert measured == pytest.approx(walked[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["hidden", "both"])
def test_a_run_goes_on_saves_and_loads(name, task, tmp_path):
    stages = [HEADS[name], FineTune(epochs=1, learning_rate=1e-3, batch_size=8)]
    model, again = noisy(), noisy()
    run = run_stages(model, task, stages, device="cpu", output=tmp_path / "run")
    back = run_stages(again, task, stages, device="cpu", output=tmp_path / "run")
    assert all(torch.equal(value, back.arrays[key]) for key, value in run.arrays.items())
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    loaded = Classifier.from_pretrained(tmp_path / "saved")
    expected = run.arrays["logits/FT/test"]
    torch.testing.assert_close(logits_of(loaded, task.test), expected, rtol=1e-5, atol=1e-6)
    assert json.loads(json.dumps(run.stages[0], allow_nan=False))["note"]


def test_features_that_are_measured_are_those_below_the_hidden_layer(task):
    model, plain = noisy(), noisy()
    stages = [HEADS["hidden"], FineTune(epochs=1, learning_rate=1e-3, batch_size=8)]
    rows = run_stages(model, task, stages, device="cpu").metrics
    change = rows.query("metric == 'feature_change' and split == 'test'").set_index("stage")[
        "value"
    ]
    assert change["start"] == change["LP"] == 0
    with below_hidden_layer(model):
        moved = (features_of(model, task.test) - features_of(plain, task.test)).double()
    assert (
        change["FT"] == pytest.approx(moved.norm(dim=1).mean().item(), rel=1e-4)
        and change["FT"] > 0
    )


def test_fresh_blocks_are_those_of_an_untrained_model(task):
    one, other, kept = noisy(), noisy(), noisy()
    step = dict(epochs=0, learning_rate=0.1, blocks=1)
    LinearProbe(**step).prepare(one, 0)
    LinearProbe(**step).prepare(other, 1)
    LinearProbe(**step, fresh=False).prepare(kept, 0)
    part = lambda model: model.backbone.encoder.layer[1].intermediate.dense.weight
    assert torch.equal(part(kept), part(noisy())) and not torch.equal(part(one), part(other))
    assert part(one).std().item() == pytest.approx(0.02, rel=0.2)  # BERT's initializer_range


def test_it_stops_at_a_requested_energy(task):
    walk = LinearProbe(hidden=6, epochs=60, learning_rate=3e-3, batch_size=8, energy=0.6)
    result = run_stages(noisy(), task, [walk], device="cpu")
    left = result.history.query("metric == 'energy'")["value"].tolist()
    assert left[-1] <= 0.6 < min(left[:-1]) and len(left) < 61
    facts = result.stages[0]
    assert facts["energy_reached"] == left[-1] and facts["epochs_taken"] == len(left) - 1
    with pytest.raises(ConvergenceError, match="after 1 epochs, wanted 0.01"):
        few = LinearProbe(hidden=6, epochs=1, learning_rate=1e-4, energy=0.01)
        run_stages(noisy(), task, [few], device="cpu")


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "t5", "llama", "mpnet"])
def test_the_last_blocks_of_an_architecture_are_those_with_the_largest_number(architecture):
    backbone = build_tiny_model(architecture).backbone
    (name,) = last_blocks(backbone, 1)
    assert name.endswith(".1") or name == "h.1"
    assert last_blocks(backbone, 2)[-1] == name
    with pytest.raises(ValueError, match=r"blocks=3: \w+ has 2"):
        last_blocks(backbone, 3)


def test_blocks_that_share_their_weights_are_refused():
    with pytest.raises(ValueError, match="has no list of 2 blocks of their own"):
        last_blocks(build_tiny_model("albert").backbone, 1)


def test_blocks_with_adapters_are_refused(task):
    model = noisy()
    add_lora(model, r=2, alpha=2)
    with pytest.raises(ValueError, match="LoRA adapters cannot start anew"):
        HEADS["block"].prepare(model, 0)


def test_half_precision_is_refused_before_a_larger_head_trains(task):
    with pytest.raises(ValueError, match="is torch.bfloat16"):
        HEADS["hidden"].prepare(noisy(dtype=torch.bfloat16), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden=8), "no exact optimum; give epochs"),
        (dict(blocks=1), "no exact optimum; give epochs"),
        (dict(hidden=0, **STEPS), "hidden=0"),
        (dict(blocks=True, **STEPS), "blocks=True"),
        (
            dict(hidden=8, penalty=1.0, **STEPS),
            r"LinearProbe\(penalty=…\) belongs to a linear head",
        ),
        (dict(hidden=8, loss="squared", **STEPS), r"LinearProbe\(loss=…\) belongs"),
        (dict(blocks=1, keep=(3,), **STEPS), r"LinearProbe\(keep=…\) belongs"),
        (dict(fresh=True), "says how blocks start"),
    ],
)
def test_settings_that_a_larger_head_does_not_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**settings)
