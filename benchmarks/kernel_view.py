"""Kernels of a prompted model and the solvers' grids, against the way of paper C's code, in one run on one machine.

    python benchmarks/kernel_view.py

Model: minilm with a head for words (random numbers: they change no time) and a template, random token ids, T = 64, two
classes, 16 training and 16 validation examples of each, 1,000 test examples; float32. What is compared:

- ours: `tangent_kernel` between the training set and all three splits, for each formula, with its plan and its check;
- the published way for SGD and asymmetric SignGD: for each training example and class a gradient by reverse mode (its
  sign), then products with a batch of examples by forward mode;
- the published way for SignGD: Jacobians of both sides written out, their signs multiplied. Here each Jacobian is taken
  once, which the peer's code does not do.

The peer takes hours, so it is timed on a few of the training examples, and on a few examples of the other side where
Jacobians are written out; its cost is linear in both, and the record says how many were timed. Its kernels are compared
with ours: a fast wrong answer does not count.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForMaskedLM

from lpft_nb.kernel.signs import FORMULAS
from lpft_nb.kernel_grid import GRID_SOLVERS, Examples, fit_on_development
from lpft_nb.kernel.result import flipped
from lpft_nb.models.checkpoints import locate, quiet_transformers
from lpft_nb.prompts import PromptedClassifier, Template
from lpft_nb.store.cache import write_atomically
from lpft_nb.tangent_kernel import tangent_kernel

CLASSES, SHOTS, LENGTH, TEST = 2, 16, 64, 1000
WANTED = {"sgd": 10, "asymmetric_signgd": 5, "signgd": 5}  # times as fast as the published way
GRIDS_WITHIN = 10  # seconds
APART = {"sgd": 1e-4, "asymmetric_signgd": 1e-3, "signgd": 1e-2}  # a sign at its limit may differ
ZERO = 1e-6  # of a parameter's largest gradient; what is smaller has no sign


def seconds_of(function) -> tuple[float, object]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def prompted(name: str) -> PromptedClassifier:
    "The encoder of this name with a random head for words, in evaluation mode."
    folder = locate(name)[0]
    torch.manual_seed(0)
    with quiet_transformers():
        model = BertForMaskedLM.from_pretrained(folder, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    template = Template("{text} It was {mask}.", ("terrible", "great"))
    return PromptedClassifier.from_language_model(
        model, template, tokenizer=tokenizer, max_length=LENGTH
    ).eval()


def random_prompts(model: PromptedClassifier, examples: int, seed: int) -> dict[str, torch.Tensor]:
    "Random ids with one gap near the end."
    generator = torch.Generator().manual_seed(seed)
    words = model.backbone.get_input_embeddings().num_embeddings
    ids = torch.randint(words // 30 + 1, words, (examples, LENGTH), generator=generator)
    ids[:, -4] = model.config.gap_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def some(batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: table[:count] for name, table in batch.items()}


def signs(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Signs of one example's gradient; what is zero up to rounding has none."
    return {
        name: torch.where(part.abs() <= ZERO * part.abs().max(), 0.0, part.sign())
        for name, part in gradient.items()
    }


class Peer:
    "Rows by reverse mode, columns by forward mode or by Jacobians written out."

    def __init__(self, model: PromptedClassifier):
        self.model = model
        self.parameters = {name: one.detach() for name, one in model.named_parameters()}

    def logits(self, values, batch):
        return torch.func.functional_call(self.model, values, (), batch).logits

    def gradients(self, batch):
        "The gradient of every logit of a batch of one."
        output, pull = torch.func.vjp(lambda values: self.logits(values, batch)[0], self.parameters)
        return [pull(unit)[0] for unit in torch.eye(len(output))]

    def forward_products(self, outer, inner, *, signed, batch_size):
        "K(inner, outer), (M, C, n, C): each gradient of the outer side, or its sign, through all of the inner side."
        parts = list(zip(*(table.split(batch_size) for table in inner.values()), strict=True))
        columns = []
        for one in range(len(outer["input_ids"])):
            rows = self.gradients({name: table[one : one + 1] for name, table in outer.items()})
            for gradient in map(signs, rows) if signed else rows:
                moved = [
                    torch.func.jvp(
                        lambda values, part=part: self.logits(values, dict(zip(inner, part))),
                        (self.parameters,),
                        (gradient,),
                    )[1]
                    for part in parts
                ]
                columns.append(torch.cat(moved))
        return torch.stack(columns, dim=2).unflatten(2, (-1, CLASSES))

    def sign_rows(self, batch):
        "Signs of the gradients of one example, written out: (C, p)."
        rows = [signs(gradient) for gradient in self.gradients(batch)]
        return torch.stack([torch.cat([part.flatten() for part in row.values()]) for row in rows])

    def sign_products(self, outer, inner):
        "K(inner, outer), (M, C, n, C), with the seconds of a Jacobian and of a product."
        one = lambda batch, at: {name: table[at : at + 1] for name, table in batch.items()}
        count = len(outer["input_ids"])
        left, rows = seconds_of(
            lambda: torch.cat([self.sign_rows(one(outer, at)) for at in range(count)])
        )
        products, blocks, spent = 0.0, [], left
        for at in range(len(inner["input_ids"])):
            seconds, mine = seconds_of(lambda at=at: self.sign_rows(one(inner, at)))
            spent += seconds
            seconds, block = seconds_of(lambda mine=mine: mine @ rows.T)
            products += seconds
            blocks.append(block)
        inner_count = len(inner["input_ids"])
        found = torch.stack(blocks).unflatten(2, (-1, CLASSES))
        return found, spent / (count + inner_count), products / (count * inner_count)


def ours(model, splits, formula):
    "The kernels of all splits with the training set."
    return {
        name: tangent_kernel(
            model, batch, splits["train"], formula=formula, memory="2GiB", quiet=True
        ).total
        for name, batch in splits.items()
    }


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    "Relative to the norm."
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def all_grids(kernels, turned, logits) -> dict[str, float]:
    "Seconds of every solver's grid on kernels that are there."
    labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    found = {}
    for solver in GRID_SOLVERS:
        one_sided = solver == "asymmetric"
        kernel = kernels["asymmetric_signgd" if one_sided else "sgd"]
        development = Examples(
            kernel["validation"],
            labels,
            logits=logits["validation"],
            flipped=turned if one_sided else None,
        )
        start = logits["train"] if solver == "least_squares" else None
        found[solver], _ = seconds_of(
            lambda kernel=kernel, development=development, solver=solver, start=start: (
                fit_on_development(
                    kernel["train"], labels, development, solver=solver, logits_train=start
                )
            )
        )
    return found


def main() -> int:
    """Measure, compare, and write a record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm", help="a BERT encoder: a name or a folder")
    parser.add_argument("--outer", type=int, default=2, help="training examples the peer takes")
    parser.add_argument("--inner", type=int, default=8, help="others whose Jacobians it writes out")
    parser.add_argument("--batch-size", type=int, default=32, help="of the peer's forward mode")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/kernel_view.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = prompted(options.model)
    sizes = {"train": CLASSES * SHOTS, "validation": CLASSES * SHOTS, "test": TEST}
    splits = {
        name: random_prompts(model, size, seed) for seed, (name, size) in enumerate(sizes.items())
    }
    everything = {
        name: torch.cat([split[name] for split in splits.values()]) for name in splits["train"]
    }
    ours(model, {name: some(batch, 4) for name, batch in splits.items()}, "sgd")
    kernels, seconds = {}, {}
    for formula in FORMULAS:
        seconds[formula], kernels[formula] = seconds_of(
            lambda formula=formula: ours(model, splits, formula)
        )
        print(f"ours, {formula}: {seconds[formula]:.1f} s", flush=True)
    peer, outer = Peer(model), some(splits["train"], options.outer)
    share = sizes["train"] / options.outer
    theirs, error = {}, {}
    peer.forward_products(some(outer, 1), some(splits["test"], 4), signed=False, batch_size=4)
    for formula, signed in (("sgd", False), ("asymmetric_signgd", True)):
        spent, found = seconds_of(
            lambda signed=signed: peer.forward_products(
                outer, everything, signed=signed, batch_size=options.batch_size
            )
        )
        theirs[formula] = share * spent
        whole = torch.cat(list(kernels[formula].values()))
        error[formula] = apart(whole[:, :, : options.outer], found)
        print(f"theirs, {formula}: {theirs[formula]:.0f} s, apart {error[formula]:.1e}", flush=True)
    found, jacobian, product = peer.sign_products(outer, some(splits["test"], options.inner))
    rows, columns = sizes["train"], sum(sizes.values())
    theirs["signgd"] = (rows + columns) * jacobian + rows * columns * product
    error["signgd"] = apart(kernels["signgd"]["test"][: options.inner, :, : options.outer], found)
    print(f"theirs, signgd: {theirs['signgd']:.0f} s, apart {error['signgd']:.1e}", flush=True)
    turned = flipped(
        tangent_kernel(
            model, splits["train"], splits["validation"], formula="asymmetric_signgd", quiet=True
        ).total
    )
    with torch.no_grad():
        logits = {name: model(**splits[name]).logits for name in ("train", "validation")}
    all_grids(kernels, turned, logits)  # imports what it needs
    grids = all_grids(kernels, turned, logits)
    times = {formula: theirs[formula] / seconds[formula] for formula in FORMULAS}
    record = {
        "command": "python benchmarks/kernel_view.py",
        "model": options.model,
        "classes": CLASSES,
        "tokens": LENGTH,
        "sizes": sizes,
        "timed of the peer": {
            "training examples": options.outer,
            "Jacobians of others": options.inner,
        },
        "ours (s)": {name: round(value, 1) for name, value in seconds.items()},
        "published way, scaled up (s)": {name: round(value) for name, value in theirs.items()},
        "times as fast": {name: round(value, 1) for name, value in times.items()},
        "wanted at least": WANTED,
        "apart, relative to the norm": {
            name: float(f"{value:.1e}") for name, value in error.items()
        },
        "grids of the solvers (s)": {name: round(value, 3) for name, value in grids.items()},
        "all grids (s)": round(sum(grids.values()), 2),
        "wanted at most (s)": GRIDS_WITHIN,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    print(json.dumps(record, indent=1))
    write_atomically(options.output, json.dumps(record, indent=1).encode() + b"\n")
    right = all(error[name] <= APART[name] for name in FORMULAS)
    enough = all(times[name] >= WANTED[name] for name in FORMULAS)
    return 0 if right and enough and sum(grids.values()) <= GRIDS_WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
