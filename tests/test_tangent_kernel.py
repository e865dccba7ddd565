"""The tangent kernel against brute-force autograd, over architectures, freezings and odd modules; laws and refusals."""

import copy
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

import lpft_nb.kernel.budget as budget
from conftest import build_tiny_model, build_tokenizer
from kernel_oracle import (
    OTHERS,
    TEXTS,
    After,
    Conv,
    Doubled,
    Expert,
    Gained,
    Pair,
    Shifted,
    ShiftedNorm,
    assert_exact,
    distance,
    oracle,
    quick,
)
from lpft_nb.kernel.gradient_factors import KernelError
from lpft_nb.kernel.result import as_matrix
from lpft_nb.models.lora import add_lora
from lpft_nb.store.cache import format_size, parse_size
from lpft_nb.tangent_kernel import label_of, tangent_kernel

DENSE = "encoder.layer.0.intermediate.dense"


def replaced(model, name, module):
    model.backbone.set_submodule(name, module)
    return model.eval()


# --- exact ---------------------------------------------------------------------------------------------------------


def test_every_architecture(architecture):
    model = build_tiny_model(architecture)
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    kernel = quick(model, a, by="module")
    assert_exact(kernel, oracle(model, a))
    names = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert {label_of(name, "module") for name in names} == set(kernel.shares)
    torch.testing.assert_close(sum(kernel.shares.values()), kernel.ft_effective)
    assert_exact(quick(model, a, b), oracle(model, a, b))


def test_float32(architecture):
    model = build_tiny_model(architecture, dtype=torch.float32)
    double = copy.deepcopy(model).double()
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    assert quick(model, a).total.dtype == torch.float32
    assert_exact(quick(model, a, b), oracle(double, a, b), 1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
@pytest.mark.parametrize("bias, classes", [(True, 2), (False, 3)])
def test_poolings_and_heads(name, pooling, bias, classes):
    model = build_tiny_model(name, classes, pooling=pooling, head_bias=bias)
    a, b = model.tokenize(TEXTS[:3]), model.tokenize(OTHERS[:2])
    kernel = quick(model, a, b)
    assert_exact(kernel, oracle(model, a, b))
    with torch.no_grad():
        product = model.features(**a) @ model.features(**b).T
    torch.testing.assert_close(kernel.gram, product + bias)


@pytest.mark.parametrize(
    "name, change", [("bert", {}), ("modernbert", dict(local_attention=64)), ("llama", {})]
)
def test_eager_attention_and_left_padding(name, change):
    model = build_tiny_model(name, backbone=change)
    expected = quick(model, model.tokenize(TEXTS))
    model.tokenizer = build_tokenizer("left")
    model.backbone.set_attn_implementation("eager")
    left = model.tokenize(TEXTS)
    assert left["attention_mask"][0, 0] == 0
    kernel = quick(model, left)
    assert (
        distance(kernel.total, expected.total) < 1e-5
    )  # eager attention takes its softmax in float32
    assert_exact(kernel, oracle(model, left))


def test_backbones_whose_gradient_is_nan_are_refused():
    model = build_tiny_model(
        "modernbert"
    )  # eager attention: padding beyond the window attends to nothing, 0 / 0
    model.backbone.set_attn_implementation("eager")
    with pytest.raises(KernelError, match="NaN"):
        quick(model, model.tokenize(TEXTS))


@pytest.mark.parametrize("examples, tokens", [(1, 9), (5, 1), (5, 2), (2, 2), (3, 3), (1, 1)])
def test_few_examples_and_tokens(examples, tokens):
    model = build_tiny_model("deberta-v2")
    batch = {
        name: table[:examples, :tokens]
        for name, table in model.tokenize(TEXTS[1:] + TEXTS[:1]).items()
    }
    assert_exact(quick(model, batch), oracle(model, batch))


def test_more_padding_changes_nothing():
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS)
    wider = {
        name: nn.functional.pad(table, (0, 6), value=int(name == "input_ids"))
        for name, table in a.items()
    }
    torch.testing.assert_close(
        quick(model, wider).total, quick(model, a).total, rtol=1e-12, atol=1e-14
    )


def test_a_padding_id_among_the_words():
    model = build_tiny_model("roberta")
    batch = {name: table.clone() for name, table in model.tokenize(TEXTS).items()}
    batch["input_ids"][1, 2] = 1
    assert_exact(quick(model, batch), oracle(model, batch))


@pytest.mark.parametrize("change", [lambda t: t.int(), lambda t: t.bool()], ids=["int32", "bool"])
def test_other_integer_types(change):
    model = build_tiny_model("bert")
    batch = model.tokenize(TEXTS)
    other = {
        name: (
            change(table)
            if name == "attention_mask" or change(table).dtype != torch.bool
            else table
        )
        for name, table in batch.items()
    }
    torch.testing.assert_close(quick(model, other).total, quick(model, batch).total)


# --- shared, frozen, adapted ---------------------------------------------------------------------------------------


def tie_layers(model):
    first, second = model.backbone.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight


def tie_norms(model):
    layers = model.backbone.encoder.layer
    layers[1].output.LayerNorm = layers[0].output.LayerNorm
    layers[1].attention.output.LayerNorm.weight = layers[0].output.LayerNorm.weight


def tie_embedding(model):
    "Position table (64, 16) and a dense layer that goes 16 → 64."
    layer = model.backbone.encoder.layer[0]
    layer.intermediate.dense = nn.Linear(16, 64, dtype=torch.float64)
    layer.intermediate.dense.weight = model.backbone.embeddings.position_embeddings.weight
    layer.output.dense = nn.Linear(64, 16, dtype=torch.float64)


def tie_transposed(model):
    "A square matrix used as it is and, by another module, transposed."
    attention = model.backbone.encoder.layer[0].attention
    weight = attention.self.query.weight
    attention.output.dense = After(nn.Identity(), lambda _, x: x @ weight)
    attention.output.dense.weight = weight


@pytest.mark.parametrize("tie", [tie_layers, tie_norms, tie_embedding, tie_transposed])
def test_tied_by_hand(tie):
    model = build_tiny_model("bert")
    tie(model)
    model.eval()
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    kernel = quick(model, a, b, by="layer")
    assert_exact(kernel, oracle(model, a, b))


FREEZINGS = {
    "a layer": lambda name: "layer.0" not in name,
    "embeddings": lambda name: "embeddings" not in name,
    "all but biases": lambda name: name.endswith("bias"),
    "head": lambda name: not name.startswith("head"),
    "head bias": lambda name: name != "head.bias",
    "head weight": lambda name: name != "head.weight",
    "backbone": lambda name: name.startswith("head"),
    "all but one matrix": lambda name: name.endswith("layer.1.output.dense.weight"),
}


@pytest.mark.parametrize("trained", FREEZINGS.values(), ids=FREEZINGS)
def test_frozen_parts(trained):
    model = build_tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    for by in (None, "group"):
        assert_exact(quick(model, a, b, by=by), oracle(model, a, b))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_lora(name):
    model = build_tiny_model(name)
    model.requires_grad_(False)
    add_lora(model, 2, 4.0)
    model.eval()
    a = model.tokenize(TEXTS)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapters)
    start = quick(model, a, by="module")
    assert_exact(start, oracle(model, a))
    for label, share in start.shares.items():
        assert bool(share.any()) == ("lora_B" in label)  # A has no gradient while B is zero
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(torch.randn_like(parameter))
    kernel = quick(model, a)
    assert_exact(kernel, oracle(model, a))
    assert not kernel.plan.reasons


def test_half_precision_is_computed_in_float32_and_left_alone():
    model = build_tiny_model("bert", dtype=torch.bfloat16)
    double = copy.deepcopy(model).double()
    kernel = quick(model, model.tokenize(TEXTS))
    assert kernel.total.dtype == torch.float32 and {p.dtype for p in model.parameters()} == {
        torch.bfloat16
    }
    assert_exact(kernel, oracle(double, model.tokenize(TEXTS)), 1e-5)


def test_the_model_is_left_as_it_was():
    model = build_tiny_model("bert")
    model.backbone.embeddings.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        inside = quick(model, model.tokenize(TEXTS)).total
    torch.testing.assert_close(quick(model, model.tokenize(TEXTS)).total, inside)
    for name, parameter in model.named_parameters():
        assert (
            torch.equal(parameter, before[name][0])
            and parameter.requires_grad == before[name][1]
            and parameter.grad is None
        )
    assert not any(module.training or module._forward_hooks for module in model.modules())


# --- modules without a rule ----------------------------------------------------------------------------------------


def linear(kind):
    return kind(16, 32, dtype=torch.float64)


def in_place(inner, x):
    return torch.relu_(inner(x))


def by_keyword(inner, x):
    return inner(input=x)


def without_gradient(inner, x):
    with torch.no_grad():
        return inner(x) + 0 * x.sum()


def checkpointed(inner, x):
    return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)


def around(inner, x):
    return inner(x) + x @ inner.weight.T


def in_turns(inner, x):
    return torch.stack([inner(one) for one in x])


class GatedNorm(nn.Module):
    "A norm whose output depends on a second input."

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width, dtype=torch.float64))

    def forward(self, x, gate):
        return self.weight * x * gate.sigmoid()


ODD_MODULES = {  # how to build it, and the parameters that must be computed by plain autograd
    "doubled": (lambda: linear(Doubled), {"weight", "bias"}),
    "gained": (lambda: linear(Gained), {"weight", "bias", "gain"}),
    "shifted": (lambda: Shifted(linear(nn.Linear), 32), {"weight"}),
    "shifted norm": (lambda: nn.Sequential(linear(nn.Linear), ShiftedNorm(32)), {"1.weight"}),
    "gated norm": (
        lambda: nn.Sequential(
            linear(nn.Linear), After(GatedNorm(32), lambda inner, x: inner(x, x.flip(-1)))
        ),
        {"1.inner.weight"},
    ),
    "gated by keyword": (
        lambda: nn.Sequential(
            linear(nn.Linear), After(GatedNorm(32), lambda inner, x: inner(x, gate=x.flip(-1)))
        ),
        {"1.inner.weight"},
    ),
    "prelu": (
        lambda: nn.Sequential(linear(nn.Linear), nn.PReLU(dtype=torch.float64)),
        {"1.weight"},
    ),
    "tuple": (
        lambda: After(linear(Pair), lambda inner, x: inner(x)[0]),
        {"inner.weight", "inner.bias"},
    ),
    "in place": (lambda: After(linear(nn.Linear), in_place), {"inner.weight", "inner.bias"}),
    "keyword": (lambda: After(linear(nn.Linear), by_keyword), {"inner.weight", "inner.bias"}),
    "no_grad": (lambda: After(linear(nn.Linear), without_gradient), {"inner.weight", "inner.bias"}),
    "checkpoint": (lambda: After(linear(nn.Linear), checkpointed), set()),
    "outside": (lambda: After(linear(nn.Linear), around), {"inner.weight"}),
    "one by one": (lambda: After(linear(nn.Linear), in_turns), {"inner.weight", "inner.bias"}),
    "convolution": (
        lambda: nn.Sequential(Conv(16), linear(nn.Linear)),
        {"0.conv.weight", "0.conv.bias"},
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(linear(nn.Linear)),
        {"parametrizations.weight.original0", "parametrizations.weight.original1"},
    ),
}


@pytest.mark.parametrize("build, explicit", ODD_MODULES.values(), ids=ODD_MODULES)
def test_odd_modules_fall_back_and_are_named(build, explicit):
    torch.manual_seed(1)
    model = replaced(build_tiny_model("bert"), DENSE, build())
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    kernel = quick(model, a, b)
    assert_exact(kernel, oracle(model, a, b))
    assert set(kernel.plan.reasons) == {f"{DENSE}.{name}" for name in explicit}
    assert all(name in str(kernel.plan) for name in list(kernel.plan.reasons)[:4])


@pytest.mark.parametrize(
    "change", [dict(max_norm=1.0), dict(scale_grad_by_freq=True), dict(sparse=True)], ids=str
)
def test_odd_embeddings(change):
    model = build_tiny_model("bert")
    table = model.backbone.embeddings.word_embeddings
    for name, value in change.items():
        setattr(table, name, value)
    batch = model.tokenize(TEXTS)
    with torch.no_grad():
        model(**batch)  # max_norm changes the rows that are read
    kernel = quick(model, batch)
    if "scale_grad_by_freq" not in change:
        assert_exact(kernel, oracle(model, batch))
    assert bool(kernel.plan.reasons) == ("sparse" not in change)


def test_an_expert_that_the_probe_does_not_see():
    model = replaced(build_tiny_model("bert"), DENSE, Expert(linear(nn.Linear), 32))
    expert, batch, seen = (
        model.backbone.encoder.layer[0].intermediate.dense,
        model.tokenize(TEXTS),
        [],
    )
    handle = expert.inner.register_forward_hook(
        lambda module, given, output: seen.append(output[:, 0])
    )
    expert.chosen = lambda y: torch.zeros(len(y), dtype=torch.bool)
    model(**batch)
    handle.remove()
    table = seen[0].detach()
    probed = [1, 2]  # longest and shortest text
    others = [0, 3, 4]
    feature = max(range(32), key=lambda f: float(table[others, f].max() - table[probed, f].max()))
    limit = float(table[probed, feature].max()) + 1e-9
    expert.chosen = lambda y: y[:, 0, feature] > limit
    kernel = quick(model, batch)
    assert_exact(kernel, oracle(model, batch))
    assert any("extra" in name for name in kernel.plan.reasons)


def test_an_expert_that_only_some_passes_call(monkeypatch):
    monkeypatch.setattr(budget, "CHUNK", 1)
    model = replaced(build_tiny_model("bert"), DENSE, Expert(linear(nn.Linear), 32))
    batch = model.tokenize(TEXTS)
    expert = model.backbone.encoder.layer[0].intermediate.dense
    alone = {name: table[[1, 2]] for name, table in batch.items()}
    expert.chosen = lambda y: y[:, 0, 0] > table_middle
    seen = []
    table_middle = float("inf")
    handle = expert.inner.register_forward_hook(
        lambda module, given, output: seen.append(output[:, 0, 0])
    )
    model(**batch)
    handle.remove()
    order = seen[0][[1, 2]].sort().values
    table_middle = float(order.mean())  # one of the two that the probe looks at is sent there
    for sides in ((alone,), (batch,), (batch, alone), (alone, batch)):
        assert_exact(quick(model, *sides), oracle(model, *sides))


# --- laws ----------------------------------------------------------------------------------------------------------


def test_symmetric_to_the_last_bit_and_psd():
    model = build_tiny_model("bert", dtype=torch.float32)
    for n in (5, 17, 40):
        batch = {
            name: table[1:4].repeat(14, 1)[:n].clone()
            for name, table in model.tokenize(TEXTS).items()
        }
        batch["input_ids"][:, 1] = 5 + torch.arange(n)
        kernel = quick(model, batch)
        for part in (kernel.pretrain_effective, kernel.ft_effective, kernel.total):
            matrix = as_matrix(part)
            assert torch.equal(matrix, matrix.T)
            values = torch.linalg.eigvalsh(matrix.double())
            assert values[0] >= -1e-5 * values[-1]


@given(order=st.permutations(range(5)), cut=st.integers(1, 4))
@settings(deadline=None, max_examples=3)
def test_permutation_and_concatenation(order, cut):
    model = build_tiny_model("gpt2")
    a = model.tokenize(TEXTS)
    whole = quick(model, a)
    moved = quick(model, {name: table[list(order)] for name, table in a.items()})
    torch.testing.assert_close(moved.total, whole.total[list(order)][:, :, list(order)])
    first, rest = (
        {name: table[part] for name, table in a.items()} for part in (slice(cut), slice(cut, None))
    )
    torch.testing.assert_close(quick(model, first, rest).total, whole.total[:cut, :, cut:])
    torch.testing.assert_close(quick(model, rest, first).total, whole.total[cut:, :, :cut])
    torch.testing.assert_close(quick(model, rest).total, whole.total[cut:, :, cut:])


@pytest.mark.parametrize("scale", [0.0, 0.5, 40.0])
def test_head_scale(scale):
    model = build_tiny_model("bert")
    a = model.tokenize(TEXTS)
    before = quick(model, a)
    with torch.no_grad():
        model.head.weight.mul_(scale)
    after = quick(model, a)
    torch.testing.assert_close(after.ft_effective, scale**2 * before.ft_effective)
    assert torch.equal(after.gram, before.gram)


# --- refusals ------------------------------------------------------------------------------------------------------


def with_training_part(model):
    model.backbone.embeddings.dropout.train()


def with_nan(model):
    model.backbone.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")


def tied_head(model):
    model.head.weight = model.backbone.encoder.layer[1].attention.self.query.weight


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda model: model.train(), "training mode"),
        (with_training_part, "embeddings.dropout is in training mode"),
        (with_nan, "layer.0.output.dense.weight holds NaN"),
        (lambda model: model.requires_grad_(False), "no parameter"),
        (tied_head, "share a parameter"),
    ],
)
def test_models_refused(spoil, message):
    model = build_tiny_model("bert", num_labels=16)
    spoil(model)
    with pytest.raises(KernelError, match=message):
        quick(model, model.tokenize(TEXTS))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda batch: {name: table[:0] for name, table in batch.items()}, "empty batch"),
        (lambda batch: {"input_ids": batch["input_ids"]}, "attention_mask"),
        (lambda batch: {"attention_mask": batch["attention_mask"]}, "input_ids"),
        (lambda batch: batch | {"labels": torch.zeros(5, dtype=torch.long)}, "labels"),
        (lambda batch: {name: table[0] for name, table in batch.items()}, "input_ids"),
        (
            lambda batch: (
                batch
                | {
                    "attention_mask": batch["attention_mask"]
                    * torch.tensor([[1], [1], [0], [1], [1]])
                }
            ),
            "no real token",
        ),
    ],
)
def test_batches_refused_on_either_side(change, message):
    model = build_tiny_model("bert")
    good = model.tokenize(TEXTS)
    for sides in ((change(good),), (good, change(good)), (change(good), good)):
        with pytest.raises(ValueError, match=message):
            quick(model, *sides)


def test_contexts_that_change_gradients_are_refused():
    model = build_tiny_model("bert")
    batch = model.tokenize(TEXTS)
    with torch.inference_mode(), pytest.raises(KernelError, match="inference_mode"):
        quick(model, batch)
    with torch.autocast("cpu"), pytest.raises(KernelError, match="autocast is on"):
        quick(model, batch)
    with torch.no_grad():
        assert_exact(quick(model, batch), oracle(model, batch))


def test_other_arguments_refused():
    model = build_tiny_model("bert")
    a, b = model.tokenize(TEXTS), model.tokenize(OTHERS)
    del b["token_type_ids"]
    with pytest.raises(KernelError, match="same columns"):
        quick(model, a, b)
    with pytest.raises(KernelError, match="'layer'"):
        quick(model, a, by="layers")
    for memory in ("2 GiBs", "much", None, True, -5):
        with pytest.raises(ValueError, match="size"):
            quick(model, a, memory=memory)
    for error in (0, 1, -0.1, 2, float("nan")):
        with pytest.raises(KernelError, match="relative_error"):
            quick(model, a, relative_error=error)


def test_a_model_that_mixes_examples_is_refused(tiny_model, monkeypatch):
    model = tiny_model("bert")
    alone = model.features
    monkeypatch.setattr(
        model,
        "features",
        lambda *batch, **named: alone(*batch, **named) + 0.1 * alone(*batch, **named).mean(dim=0),
    )
    with pytest.raises(KernelError, match="with padding or with the other examples"):
        tangent_kernel(
            model, model.tokenize(["the cat sat", "a dog ran over the small matrix"]), quiet=True
        )


def test_a_head_of_another_width_is_refused(tiny_model):
    model = tiny_model("bert")
    model.head = torch.nn.Linear(7, 3, dtype=torch.float64).eval()
    with pytest.raises(KernelError, match="the head expects 7 features, the backbone has 16"):
        tangent_kernel(model, model.tokenize(["the cat sat"]), quiet=True)


# --- what a user holds ---------------------------------------------------------------------------------------------


def test_texts_encoded_examples_data_sets_and_arrays_are_as_good_as_a_batch(tiny_model):
    model, texts = tiny_model("bert"), ["the cat sat", "a dog", "the dog sat on a cat"]
    batch = model.tokenize(texts)
    expected = quick(model, batch).total
    forms = (
        texts,
        model.encode(texts),
        Dataset.from_dict({"text": texts, "label": [0, 1, 0]}),
        {name: table.numpy() for name, table in batch.items()},
        BatchEncoding(batch),
    )
    for form in forms:
        assert torch.equal(quick(model, form).total, expected)
        assert torch.equal(quick(model, batch, form).total, quick(model, batch, batch).total)


def test_the_budget_that_is_advised_is_the_smallest_that_does():
    model = build_tiny_model("bert")
    batch = model.tokenize(TEXTS)
    with pytest.raises(KernelError, match="would do") as found:
        tangent_kernel(model, batch, memory=1000, quiet=True)
    advised = parse_size(re.search(r"at least (.*) would do", str(found.value)).group(1))
    tangent_kernel(model, batch, memory=advised, quiet=True)
    with pytest.raises(KernelError, match=f"at least {format_size(advised)} would do"):
        tangent_kernel(model, batch, memory=advised - 2**20, quiet=True)
