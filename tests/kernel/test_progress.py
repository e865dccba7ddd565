"""Interrupted computations and several processes: what is finished counts, once, and only for its own kernel."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lpft_nb.kernel.streaming as streaming
from conftest import build_tiny_model
from kernel_oracle import OTHERS, TEXTS, assert_exact, oracle, quick
from lpft_nb.kernel.gradient_factors import KernelError
from lpft_nb.kernel.progress import Store


class Cut(Exception):
    pass


@pytest.fixture
def often(monkeypatch):
    "Every finished part is written at once."
    add = Store.add
    monkeypatch.setattr(
        Store, "add", lambda self, names, labels, now=False: add(self, names, labels, True)
    )


def cut_after(monkeypatch, parts):
    "Raise when some parts are contracted."
    contract, calls = streaming.contract, []

    def failing(*given, **named):
        if len(calls) == parts:
            raise Cut
        calls.append(1)
        return contract(*given, **named)

    monkeypatch.setattr(streaming, "contract", failing)


@pytest.mark.parametrize(
    "memory, by, two_sides",
    [("1GiB", None, False), ("1GiB", "layer", True), (430_000, "group", False)],
)
def test_resumes_from_finished_parts(tmp_path, monkeypatch, often, memory, by, two_sides):
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS) if two_sides else None
    whole = quick(model, a, b, memory=memory, by=by)
    assert any(len(one) > 1 for one in whole.plan.passes) or len(whole.plan.passes) > 6
    with monkeypatch.context() as patch:
        cut_after(patch, 6)
        with pytest.raises(Cut):
            quick(model, a, b, memory=memory, by=by, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    captured, capture = [], streaming.capture
    monkeypatch.setattr(
        streaming,
        "capture",
        lambda *given, rules, **named: (
            captured.extend(rules) or capture(*given, rules=rules, **named)
        ),
    )
    resumed = quick(model, a, b, memory=memory, by=by, directory=tmp_path)
    every = {name for one in whole.plan.passes for part in one for name in part}
    done = {name for part in [p for one in whole.plan.passes for p in one][:6] for name in part}
    assert set(captured) == every - done
    torch.testing.assert_close(resumed.total, whole.total, rtol=1e-13, atol=1e-14)
    assert not list(tmp_path.iterdir())


def test_states_of_other_models_do_not_mix(tmp_path, monkeypatch, often):
    a = build_tiny_model("bert").tokenize(TEXTS)
    models = [
        build_tiny_model("bert"),
        build_tiny_model("bert", backbone=dict(num_attention_heads=4)),
        build_tiny_model("bert", seed=3),
    ]
    models[2].backbone.embeddings.requires_grad_(False)
    for model in models:
        with monkeypatch.context() as patch:
            cut_after(patch, 4)
            with pytest.raises(Cut):
                quick(model, a, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    for model in models:
        assert_exact(quick(model, a, directory=tmp_path), oracle(model, a))


@pytest.mark.parametrize("place", [10, 0.5, -1])
def test_a_damaged_state_is_an_error(tmp_path, monkeypatch, often, place):
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS)
    with monkeypatch.context() as patch:
        cut_after(patch, 4)
        with pytest.raises(Cut):
            quick(model, a, directory=tmp_path)
    path = next(tmp_path.iterdir())
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 0x55
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=path.name):
        quick(model, a, directory=tmp_path)


def test_the_state_of_another_computation_is_refused(tmp_path):
    "The file's name holds the first digits of the key only; the whole key stands inside."
    key, others = "a" * 16 + "b" * 48, "a" * 16 + "c" * 48
    Store(tmp_path, key, {"all": torch.ones(2, 2)}).add(["weight"], {"all"}, now=True)
    resumed = Store(tmp_path, key, {"all": torch.zeros(2, 2)})
    assert resumed.finished == {"weight"} and resumed.accumulators["all"].tolist() == [[1, 1]] * 2
    sums = {"all": torch.zeros(2, 2)}
    with pytest.raises(KernelError, match="belongs to another computation"):
        Store(tmp_path, others, sums)
    assert not sums["all"].any()


def test_a_state_under_a_wrong_name_is_refused(tmp_path, monkeypatch, often):
    "The state of one model, renamed to that of another, is not gone on from."
    models = [build_tiny_model("bert"), build_tiny_model("bert", seed=3)]
    batch, paths = models[0].tokenize(TEXTS), []
    for model in models:
        with monkeypatch.context() as patch:
            cut_after(patch, 4)
            with pytest.raises(Cut):
                quick(model, batch, directory=tmp_path)
        paths += [path for path in tmp_path.iterdir() if path not in paths]
    paths[0].replace(paths[1])
    with pytest.raises(KernelError, match="belongs to another computation"):
        quick(models[1], batch, directory=tmp_path)


def run_script(*arguments, processes=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = (
        []
        if processes == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    return subprocess.run(
        [sys.executable, *launcher, __file__, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_killed_process_loses_little(tmp_path, monkeypatch):
    killed = run_script("kill", tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS)
    captured, capture = [], streaming.capture
    monkeypatch.setattr(
        streaming,
        "capture",
        lambda *given, rules, **named: (
            captured.extend(rules) or capture(*given, rules=rules, **named)
        ),
    )
    assert_exact(quick(model, a, directory=tmp_path), oracle(model, a))
    assert 0 < len(captured) < len(list(model.backbone.parameters()))


RANKS = {"whole": {}, "sides": {}, "groups": dict(by="group")}


def test_two_processes_agree_with_one(tmp_path):
    done = run_script("ranks", tmp_path, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert "different models or examples" in found.pop("refused")
        alone = found.pop("alone")
        assert (
            alone == "mine"
            if rank
            else "process 1 stopped" in alone and "ZeroDivisionError" in alone
        )
        for name, options in RANKS.items():
            kernel = quick(model, a, b if name == "sides" else None, **options)
            assert set(found[name]) == {*kernel.shares, "P"}
            for label, share in {**kernel.shares, "P": kernel.gram}.items():
                torch.testing.assert_close(found[name][label], share, rtol=1e-12, atol=1e-13)
                if rank == 1 and name == "whole" and label == "all":
                    assert share.any()


def main(task, folder):
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    if task == "kill":
        add, calls = Store.add, []

        def adding(self, names, labels, now=False):
            add(self, names, labels, True)
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Store.add = adding
        quick(model, a, directory=folder)
    found = {}
    for name, options in RANKS.items():
        kernel = quick(model, a, b if name == "sides" else None, **options)
        found[name] = {**kernel.shares, "P": kernel.gram}
    rank = int(os.environ["RANK"])
    try:
        quick(model, a if rank else b)
    except KernelError as error:
        found["refused"] = str(error)
    if rank:
        streaming.contract = lambda *given, **named: 1 / 0
    try:
        quick(model, a)
    except ZeroDivisionError:
        found["alone"] = "mine"
    except KernelError as error:
        found["alone"] = str(error)
    torch.save(found, Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
