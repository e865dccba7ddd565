"""The tangent kernel by plain autograd, one example and one class at a time; texts, models and modules that are hard on the engine."""

import torch
from torch import nn

from lpft_nb.kernel.gradient_factors import Factors
from lpft_nb.tangent_kernel import tangent_kernel

TEXTS = [
    "the cat sat",
    "a dog ran over the small matrix",
    "sparse dense",
    "the the the cat",
    "under a tree",
]
OTHERS = ["great film", "a dog saw the small small matrix under the tree", "no"]


def quick(*arguments, **options):
    "The kernel without a word."
    return tangent_kernel(*arguments, quiet=True, **options)


def random_factors(seed, n, c, t, height, width):
    "One matrix's gradients of n examples and c classes over t tokens, height × width, the same for a seed."
    g = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(n, t, width, generator=g, dtype=torch.float64),
        torch.randn(n, c, t, height, generator=g, dtype=torch.float64),
    )


def gradient_rows(model, batch):
    "Gradients of every logit by the head's and by the backbone's trainable parameters, (N·C, sizes) each; every example alone."
    sides = [
        [p for p in part.parameters() if p.requires_grad] for part in (model.head, model.backbone)
    ]
    rows = [[], []]
    for n in range(len(batch["input_ids"])):
        with torch.enable_grad():
            logits = (
                model(**{name: table[n : n + 1] for name, table in batch.items()})
                .logits[0]
                .unbind()
            )
        for logit in logits:
            for parameters, found in zip(sides, rows):
                gradients = (
                    torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
                    if parameters
                    else []
                )
                full = [
                    torch.zeros_like(p) if g is None else g.to_dense()
                    for g, p in zip(gradients, parameters)
                ]
                found.append(torch.cat([logit.new_zeros(1), *(g.flatten() for g in full)]).detach())
    return [torch.stack(found) for found in rows]


def oracle(model, batch_a, batch_b=None):
    "P and F, (N, C, M, C) each."
    left = gradient_rows(model, batch_a)
    right = left if batch_b is None else gradient_rows(model, batch_b)
    c = model.head.out_features
    return [(a @ b.T).view(len(a) // c, c, len(b) // c, c) for a, b in zip(left, right)]


def distance(got, expected):
    "Relative Frobenius distance."
    return (
        float(
            (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
        )
        if expected.norm() > 0
        else float(got.norm())
    )


def assert_exact(kernel, expected, tolerance=1e-9):
    "P, F and their sum within the tolerance, and no gradient left on them."
    p, f = expected
    for name, got, wanted in (
        ("P", kernel.pretrain_effective, p),
        ("F", kernel.ft_effective, f),
        ("P + F", kernel.total, p + f),
    ):
        assert got.shape == wanted.shape and not got.requires_grad
        assert distance(got, wanted) <= tolerance, f"{name} is off by {distance(got, wanted):.1e}"


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Module):
    "An RMS norm that multiplies by 1 + weight, after another module."

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(0.3 * torch.randn(size, dtype=torch.float64))

    def forward(self, x):
        return self.inner(x) * (1 + self.weight)


class ShiftedNorm(nn.Module):
    "The same as a module without children: it looks like a norm."

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(size, dtype=torch.float64))

    def forward(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class Gained(nn.Linear):
    "A linear layer with a parameter more."

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.full((sizes[1],), 1.3, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) * self.gain


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class After(nn.Module):
    "Calls one module and hands its output on."

    def __init__(self, inner, use):
        super().__init__()
        self.inner, self.use = inner, use

    def forward(self, x):
        return self.use(self.inner, x)


class Conv(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.conv = nn.Conv1d(size, size, 1, dtype=torch.float64)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Expert(nn.Module):
    "Sends only the chosen examples through a second matrix, and does not call it where there are none."

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.extra, self.chosen = (
            inner,
            nn.Linear(size, size, dtype=torch.float64),
            lambda y: y[:, 0, 0] > 0,
        )

    def forward(self, x):
        y = self.inner(x)
        chosen = self.chosen(y)
        return y + self.extra(y) * chosen[:, None, None] if chosen.any() else y
