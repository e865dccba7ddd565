"""The exact tangent kernel against three ways of others, and its memory and growth, in one run on one machine.

    python benchmarks/tangent_kernel.py --peers --gram --growth --output results/benchmarks

Model: minilm (BERT, 6 layers), random token ids, T = 32 without padding, C = 3, float32. What is compared:

- ours: `lpft_nb.tangent_kernel.tangent_kernel`, plan and check against autograd included;
- forward-over-reverse: for each example and class a reverse-mode gradient, then forward-mode products with all examples (LM-Kernel-FT);
- torch.func: `vmap(jacrev)` with Jacobian contraction, and NTK-vector products (`vjp` and `jvp`), as in PyTorch's tutorial;
- hidden-feature Jacobians: one backward pass for every feature, by parameter group, contracted with the head (lp-ft_ntk), N = 8;
- gram: the plain products of all dense-layer gradients, from this machine's measured rate of matrix products.

Every peer's kernel is compared with ours: a fast wrong answer does not count. Peers run twice where they take under a minute,
and the better time counts: memory that is fresh from the system makes first calls slow. A profile says where our time goes.
"""

import argparse
import cProfile
import json
import pstats
import signal
import time
from pathlib import Path

import torch
from measuring import Peak

from lpft_nb.store.cache import parse_size, write_atomically
from lpft_nb.classifier import Classifier
from lpft_nb.records import environment
from lpft_nb.tangent_kernel import tangent_kernel

CLASSES, LENGTH = 3, 32
FEATURES = 64  # hidden features differentiated at once by the peer that differentiates all of them
COMMAND = "python benchmarks/tangent_kernel.py --peers --gram --growth --output results/benchmarks"


def random_batch(examples: int, device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30000, (examples, LENGTH), generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: table.to(device) for name, table in batch.items()}


def seconds_of(function, device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def seconds_within(function, limit: int, device: str) -> tuple[float, object]:
    "Like `seconds_of`; None as the result where the limit in seconds has stopped the function."

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        return seconds_of(function, device)
    except TimeoutError:
        return float(limit), None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def best_of(function, repeats: int, device: str) -> tuple[float, object]:
    found = [seconds_of(function, device) for _ in range(repeats)]
    return min(seconds for seconds, _ in found), found[-1][1]


STAGES = {
    "probe and plan": ("probe", "make_plan"),
    "forward and backward": ("capture",),
    "writing gradients out": ("written_out",),
    "Gram products": ("add_gram",),
    "products through tokens": ("add_by_tokens",),
    "embedding tables": ("add_rows",),
    "features": ("feature_gram",),
}


def profile(function, device: str) -> dict[str, float]:
    "Seconds by stage of one more call; stages do not overlap, and what is left over is 'other'."
    profiler = cProfile.Profile()
    total, _ = seconds_of(lambda: profiler.runcall(function), device)
    entries = pstats.Stats(profiler).stats.items()
    found = {
        stage: sum(
            row[3] for (path, _, name), row in entries if name in names and "lpft_nb" in path
        )
        for stage, names in STAGES.items()
    }
    return found | {"other": total - sum(found.values()), "all": total}


def show(stages: dict[str, float]) -> None:
    print(
        "  " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items()),
        flush=True,
    )


def ours(model, batch, memory="2GiB"):
    return tangent_kernel(model, batch, memory=memory, quiet=True).total


def functional(model):
    "Logits of one example as a function of all trainable parameters; no mask, for vmap cannot build one."
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(values, ids):
        backbone = {
            name.removeprefix("backbone."): value
            for name, value in values.items()
            if name.startswith("backbone.")
        }
        hidden = torch.func.functional_call(
            model.backbone, backbone, (), {"input_ids": ids}
        ).last_hidden_state
        return hidden[:, 0] @ values["head.weight"].T + values["head.bias"]

    return parameters, logits


def forward_over_reverse(model, batch):
    "Rows by reverse mode, columns by forward mode: N·C gradients, each pushed through all N examples."
    parameters, logits = functional(model)
    ids, rows = batch["input_ids"], []
    for n in range(len(ids)):
        output, pull = torch.func.vjp(
            lambda values, n=n: logits(values, ids[n : n + 1])[0], parameters
        )
        for unit in torch.eye(len(output), device=output.device):
            (gradient,) = pull(unit)
            rows.append(
                torch.func.jvp(lambda values: logits(values, ids), (parameters,), (gradient,))[1]
            )
    return torch.stack(rows).view(len(ids), CLASSES, len(ids), CLASSES)


def jacobian_contraction(model, batch):
    "All Jacobians by vmap(jacrev), contracted parameter by parameter."
    parameters, logits = functional(model)
    ids = batch["input_ids"]
    jacobian = torch.func.vmap(
        torch.func.jacrev(lambda values, one: logits(values, one[None])[0]), (None, 0)
    )(parameters, ids)
    total = torch.zeros(len(ids) * CLASSES, len(ids) * CLASSES, device=ids.device)
    for name in list(jacobian):
        rows = jacobian.pop(name).flatten(2).flatten(0, 1)
        total += rows @ rows.T
    return total.view(len(ids), CLASSES, len(ids), CLASSES)


def vector_products(model, batch):
    "NTK-vector products: for each pair of examples one vjp and one jvp with every unit vector."
    parameters, logits = functional(model)
    ids = batch["input_ids"]

    def pair(a, b):
        def product(unit):
            _, pull = torch.func.vjp(lambda values: logits(values, a[None])[0], parameters)
            return torch.func.jvp(
                lambda values: logits(values, b[None])[0], (parameters,), pull(unit)
            )[1]

        return torch.func.vmap(product)(torch.eye(CLASSES, device=ids.device))

    rows = [torch.func.vmap(lambda b, a=a: pair(a, b))(ids) for a in ids]
    return torch.stack(rows).permute(0, 2, 1, 3).contiguous()


def hidden_jacobians(model, batch):
    "Differentiate all h features by every parameter group, contract with the head afterwards; plus the head's own part."
    ids, weight = batch["input_ids"], model.head.weight.detach()
    groups = {}
    for name, parameter in model.backbone.named_parameters():
        key = (
            ".".join(name.split(".")[:3]) + ("attention" if "attention" in name else "rest")
            if "layer." in name
            else "embeddings"
        )
        groups.setdefault(key, {})[name] = parameter
    features = model.features(**batch).detach()
    total = torch.einsum(
        "nm,cd->ncmd", features @ features.T + 1, torch.eye(CLASSES, device=ids.device)
    )
    units = torch.eye(weight.shape[1], device=ids.device)
    for group in groups.values():
        rows = []
        for n in range(len(ids)):
            hidden = model.features(**{key: table[n : n + 1] for key, table in batch.items()})[0]
            rows.append(0)
            for first in range(
                0, len(units), FEATURES
            ):  # all at once would take 18 GB for the word embeddings
                some = slice(first, first + FEATURES)
                pieces = torch.autograd.grad(
                    hidden,
                    list(group.values()),
                    units[some],
                    retain_graph=some.stop < len(units),
                    is_grads_batched=True,
                    allow_unused=True,
                )
                rows[-1] = rows[-1] + torch.cat(
                    [weight[:, some] @ piece.flatten(1) for piece in pieces if piece is not None],
                    dim=1,
                )
        rows = torch.cat(rows)
        total += (rows @ rows.T).view(len(ids), CLASSES, len(ids), CLASSES)
    return total


def gemm_rate(device: str, size: int = 4096) -> float:
    a = torch.randn(size, size, device=device)
    a @ a
    seconds, _ = best_of(lambda: a @ a, 5, device)
    return 2.0 * size**3 / seconds


def agreement(kernel, reference) -> float:
    return float((kernel - reference).norm() / reference.norm())


def measure_peers(model, device, repeats, limit, keep) -> None:
    found = {}
    eager = (
        Classifier.from_pretrained("minilm", num_labels=CLASSES, seed=0, attention="eager")
        .to(device)
        .eval()
    )  # forward mode needs it
    for examples, peers in (
        (32, [forward_over_reverse, jacobian_contraction, vector_products]),
        (8, [hidden_jacobians]),
    ):
        batch = random_batch(examples, device)
        seconds, reference = best_of(lambda batch=batch: ours(model, batch), repeats, device)
        row = {
            "ours_seconds": seconds,
            "ours_profile": profile(lambda batch=batch: ours(model, batch), device),
        }
        print(f"N = {examples}: ours {seconds:.2f} s", flush=True)
        show(row["ours_profile"])
        for peer in peers:
            other, kernel = seconds_within(
                lambda peer=peer, batch=batch: peer(eager, batch), limit, device
            )
            if other < 60:
                other = min(
                    other, seconds_of(lambda peer=peer, batch=batch: peer(eager, batch), device)[0]
                )
            row[peer.__name__] = {
                "seconds": other,
                "ratio": other / seconds,
                "stopped": kernel is None,
                "relative_difference": None
                if kernel is None
                else agreement(kernel.detach(), reference),
            }
            said = (
                "stopped, at least"
                if kernel is None
                else f"relative difference {row[peer.__name__]['relative_difference']:.1e},"
            )
            print(
                f"N = {examples}: {peer.__name__} {other:.2f} s, {said} {other / seconds:.1f} times ours",
                flush=True,
            )
            keep({"peers": found | {str(examples): row}})
        found[str(examples)] = row


def measure_gram(model, device, examples, memory, keep) -> None:
    dense = sum(
        m.weight.numel() for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)
    )
    rate = gemm_rate(device)
    gram = 2.0 * (examples * CLASSES) ** 2 * dense / rate
    batch = random_batch(examples, device)
    seconds, _ = best_of(lambda: ours(model, batch, memory), 2, device)
    stages = profile(lambda: ours(model, batch, memory), device)
    print(
        f"N = {examples}: ours {seconds:.1f} s, plain Gram products {gram:.1f} s at {rate / 1e9:.0f} GFLOP/s, ratio {seconds / gram:.2f}",
        flush=True,
    )
    show(stages)
    keep(
        {
            "gram": {
                "profile": stages,
                "examples": examples,
                "memory": memory,
                "seconds": seconds,
                "gram_seconds": gram,
                "gemm_gflops": rate / 1e9,
                "ratio": seconds / gram,
            }
        }
    )


def measure_growth(model, device, sizes, memory, keep) -> None:
    rows = []
    for examples in sizes:
        batch = random_batch(examples, device)
        with Peak(device) as peak:
            seconds, _ = seconds_of(
                lambda batch=batch: tangent_kernel(model, batch, memory=memory), device
            )
        rows.append(
            {
                "examples": examples,
                "seconds": seconds,
                "peak_bytes": peak.bytes,
                "peak_over_memory": peak.bytes / parse_size(memory),
            }
        )
        print(
            f"N = {examples}: {seconds:.1f} s, peak {peak.bytes / 2**30:.2f} GiB of {memory}",
            flush=True,
        )
    x, y = (
        torch.tensor([row[key] for row in rows]).double().log() for key in ("examples", "seconds")
    )
    power = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    print(f"time grows with N to the power {power:.2f}", flush=True)
    keep(
        {
            "growth": {
                "memory": memory,
                "rows": rows,
                "power": power,
                "peaks": "highest resident memory over that before the call",
            }
        }
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--peers",
        action="store_true",
        help="compare with the peers at N = 32 and N = 8 (about ten minutes on two cores)",
    )
    parser.add_argument(
        "--gram",
        type=int,
        nargs="?",
        const=250,
        help="compare with the plain Gram products, N = 250",
    )
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        help="time and memory at these N; 100 250 500 1000 if none is given",
    )
    parser.add_argument("--memory", default="4GiB", help="budget for --gram and --growth")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--limit",
        type=int,
        default=460,
        help="seconds after which a peer is stopped; its time is then a lower bound",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for tangent_kernel-<device>.json; what is there already is kept and updated",
    )
    arguments = parser.parse_args()
    if not arguments.peers and arguments.gram is None and arguments.growth is None:
        arguments.gram = 100
    model = (
        Classifier.from_pretrained("minilm", num_labels=CLASSES, seed=0).to(arguments.device).eval()
    )
    ours(model, random_batch(4, arguments.device))
    path = (
        None
        if arguments.output is None
        else arguments.output / f"tangent_kernel-{arguments.device}.json"
    )

    def keep(measured: dict) -> None:
        "Written after each measurement: the next one may take all memory."
        if path is not None:
            before = json.loads(path.read_text()) if path.is_file() else {}
            facts = {
                "command": COMMAND,
                "runs": "measurements of one or more runs of the program",
                "environment": environment(),
                "threads": torch.get_num_threads(),
            }
            write_atomically(
                path, (json.dumps(before | facts | measured, indent=1) + "\n").encode()
            )

    if arguments.peers:
        measure_peers(model, arguments.device, arguments.repeats, arguments.limit, keep)
    if arguments.gram is not None:
        measure_gram(model, arguments.device, arguments.gram, arguments.memory, keep)
    if arguments.growth is not None:
        measure_growth(
            model,
            arguments.device,
            arguments.growth or [100, 250, 500, 1000],
            arguments.memory,
            keep,
        )


if __name__ == "__main__":
    main()
