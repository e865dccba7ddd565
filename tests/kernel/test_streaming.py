"""Budgets, blocks and devices without memory change the plan, never the kernel."""

import re

import pytest
import torch

import lpft_nb.kernel.budget as budget
import lpft_nb.kernel.streaming as streaming
import lpft_nb.tangent_kernel as face
from conftest import build_tiny_model
from kernel_oracle import OTHERS, TEXTS, assert_exact, oracle, quick
from lpft_nb.kernel.gradient_factors import KernelError
from lpft_nb.kernel.plan import probe
from lpft_nb.kernel.progress import Store
from lpft_nb.tangent_kernel import tangent_kernel


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("two_sides", [False, True])
def test_small_budgets_agree_with_large_ones(name, two_sides):
    model = build_tiny_model(name)
    a, b = model.tokenize(TEXTS * 3), model.tokenize(OTHERS * 3) if two_sides else None
    large = quick(model, a, b, by="group")
    assert len(large.plan.passes) == 1 and large.plan.block == (15, 9 if two_sides else 15)
    passes, blocks = set(), set()
    for memory in (600_000, 430_000):
        try:
            small = quick(model, a, b, by="group", memory=memory)
        except KernelError:
            continue
        passes.add(len(small.plan.passes)), blocks.add(small.plan.block)
        assert small.plan.peak_bytes <= memory
        for label in large.shares:
            torch.testing.assert_close(
                small.shares[label], large.shares[label], rtol=1e-10, atol=1e-12
            )
        torch.testing.assert_close(small.gram, large.gram)
    assert max(passes) > 1


@pytest.mark.parametrize("two_sides", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2), (4, 1), (3, 2), (1, 1)])
def test_blocks_of_examples(monkeypatch, two_sides, sizes):
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS) if two_sides else None
    large = quick(model, a, b)
    sizes = sizes if two_sides else sizes[:1]
    monkeypatch.setattr(budget, "block_sizes", lambda *given: list(sizes))
    small = quick(model, a, b)
    assert small.plan.block == (sizes[0], sizes[-1])
    torch.testing.assert_close(small.total, large.total, rtol=1e-10, atol=1e-12)


def test_a_budget_forces_blocks():
    model = build_tiny_model("bert", backbone=dict(hidden_size=64, intermediate_size=512))
    a = model.tokenize(TEXTS * 8)
    large = quick(model, a)
    for memory in range(6_000_000, 2_000_000, -250_000):
        try:
            small = quick(model, a, memory=memory)
        except KernelError:
            break
        if small.plan.block != (40, 40):
            break
    assert small.plan.block[0] < 40
    torch.testing.assert_close(small.total, large.total, rtol=1e-10, atol=1e-12)


def test_a_budget_too_small_names_one_that_works(architecture):
    model = build_tiny_model(architecture)
    a = model.tokenize(TEXTS)
    with pytest.raises(KernelError, match="would do") as caught:
        quick(model, a, memory=1000)
    size = re.search(r"at least ([\d.]+ \w+) would", str(caught.value)).group(1)
    quick(model, a, memory=size)


def lean_card(model, examples):
    "A forward pass over more than some examples finds no memory."

    def refuse(module, arguments, keywords):
        if len([*arguments, *keywords.values()][0]) > examples:
            raise torch.OutOfMemoryError("no room")

    return model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)


@pytest.mark.parametrize("two_sides", [False, True])
def test_out_of_memory_means_smaller_chunks(two_sides, capsys):
    model = build_tiny_model("bert")
    batches = [model.tokenize(TEXTS)] + ([model.tokenize(OTHERS)] if two_sides else [])
    expected = oracle(model, *batches)
    lean_card(model, 2)
    kernel = tangent_kernel(model, *batches)
    assert kernel.plan.chunk <= 2
    assert_exact(kernel, expected)
    assert (
        "is out of memory: going on from the last finished part with a plan for"
        in capsys.readouterr().out
    )


def test_out_of_memory_in_the_middle_of_a_part_counts_nothing_twice(monkeypatch):
    "The sums of a device are taken back to the last finished part; half of a part may have been added by then."
    model = build_tiny_model("bert")
    batch, calls, contract, build = (
        model.tokenize(TEXTS),
        [],
        streaming.contract,
        Store.__init__,
    )

    def on_a_device(self, folder, key, accumulators):
        build(self, folder, key, accumulators)
        self.copies = {label: table.clone() for label, table in accumulators.items()}

    def failing(left, right, names, **named):
        contract(left, right, names, **named)
        calls.append(names)
        if len(calls) in (3, 8):
            raise torch.OutOfMemoryError("full after the sum, before the note of it")

    monkeypatch.setattr(Store, "__init__", on_a_device)
    monkeypatch.setattr(streaming, "contract", failing)
    for memory in ("1GiB", 1_800_000):
        calls.clear()
        assert_exact(quick(model, batch, by="layer", memory=memory), oracle(model, batch))
        assert len(calls) > 8


def test_a_device_too_small_for_one_example_says_so():
    model = build_tiny_model("bert")
    batch = model.tokenize(TEXTS)
    ready = probe(model, batch)
    lean_card(model, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(face, "probe", lambda *given: ready)
        with pytest.raises(
            KernelError, match="ran out of memory even with a plan for .*shorten the examples"
        ):
            quick(model, batch)
