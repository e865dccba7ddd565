"""FineTune against a bare PyTorch loop on the same batches, and against padding every text to 128 tokens.

    python benchmarks/fine_tuning.py --data DIR --model minilm

DIR holds cb/, rte/ and sst2/ (or set LPFT_DATA). Writes results/benchmarks/fine_tuning.json. Run it on an idle machine.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from lpft_nb.classifier import Classifier
from lpft_nb.records import environment
from lpft_nb.store.cache import write_atomically
from lpft_nb.tasks import load_task
from lpft_nb.training.batches import EncodedDataset, collate, epoch_order, padding_share
from lpft_nb.training.loop import ShowProgress, parameter_groups, train
from lpft_nb.training.stage import FineTune

TASKS = {"sst2": 32, "rte": 16, "cb": 16}  # batch sizes of paper A's FT
MAX_LENGTH, SEED = 128, 0


def head_of(data: EncodedDataset, count: int) -> EncodedDataset:
    """The first examples of a data set."""
    return EncodedDataset(data.inputs[:count], torch.tensor(data.labels[:count]))


def between(ends: list[float]) -> list[float]:
    """Seconds from each step's end to the next one's."""
    return [after - before for before, after in pairwise(ends)]


def stage_steps(model, data: EncodedDataset, stage: FineTune) -> list[float]:
    """Seconds of each step of a real stage, by the clock at each step's end."""
    ends, shown = [], ShowProgress.on_step_end

    def tick(self, *given, **more):
        ends.append(time.perf_counter())
        return shown(self, *given, **more)

    ShowProgress.on_step_end = tick
    try:
        with tempfile.TemporaryDirectory() as folder:
            train(
                model,
                data,
                head_of(data, 8),
                stage,
                seed=SEED,
                folder=Path(folder),
                minutes_between_checkpoints=math.inf,
            )
    finally:
        ShowProgress.on_step_end = shown
    return between(ends)


def bare_steps(
    model, data: EncodedDataset, stage: FineTune, steps: int, pad_to: int | None = None
) -> list[float]:
    """Seconds of each step of the same training, written out; `pad_to` pads every text to that many tokens."""
    head, backbone = stage.learning_rates()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, head_learning_rate=head, backbone_learning_rate=backbone),
        fused=True,
    )
    order = epoch_order(
        data.lengths, stage.batch_size, seed=SEED, epoch=0, length_grouping=stage.length_grouping
    )
    ends = [time.perf_counter()]
    model.train()
    for at in range(0, min(len(order), steps * stage.batch_size), stage.batch_size):
        batch = collate(model, [data[i] for i in order[at : at + stage.batch_size]])
        labels = batch.pop("labels")
        if pad_to is not None:
            batch = {
                name: torch.nn.functional.pad(value, (0, pad_to - value.shape[1]))
                for name, value in batch.items()
            }
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    model.eval()
    return between(ends)


def measure(task_name: str, root: Path, model_name: str, steps: int, repeats: int) -> dict:
    """One row: the stage over the bare loop, the padding left, the gain over padding to 128."""
    task = load_task(root / task_name, protocol="paper")
    model = Classifier.from_pretrained(model_name, num_labels=task.num_labels, seed=SEED)
    whole = EncodedDataset(
        model.encode(task.train, MAX_LENGTH), torch.tensor(list(task.train["label"]))
    )
    batch_size = TASKS[task_name]
    data = head_of(whole, min(len(whole), steps * batch_size) // batch_size * batch_size)
    grouped, plain = (
        FineTune(epochs=1, learning_rate=1e-5, batch_size=batch_size, length_grouping=by_length)
        for by_length in (True, False)
    )
    stage, bare, padded = [], [], []
    for _ in range(repeats):  # in turn, so that a busy moment hits all alike
        stage.append(statistics.fmean(stage_steps(model, data, grouped)))
        bare.append(statistics.fmean(bare_steps(model, data, grouped, steps)[1:]))
        padded.append(
            statistics.fmean(
                bare_steps(model, data, plain, max(3, steps // 4), pad_to=MAX_LENGTH)[1:]
            )
        )
    order = epoch_order(whole.lengths, batch_size, seed=SEED, epoch=0)
    return {
        "task": task_name,
        "batch_size": batch_size,
        "steps": len(data) // batch_size,
        "repeats": repeats,
        "seconds_a_step": min(stage),
        "stage_over_bare_loop": min(stage) / min(bare),
        "padding_share": padding_share(whole.lengths, order, batch_size),
        "speed_up_over_128": min(padded) / min(bare),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("LPFT_DATA"))
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "results/benchmarks/fine_tuning.json",
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        sys.exit("name the folder of the data sets with --data or LPFT_DATA")
    rows = [
        measure(name, Path(arguments.data), arguments.model, arguments.steps, arguments.repeats)
        for name in TASKS
    ]
    for row in rows:
        print(json.dumps(row))
    report = {
        "command": "python benchmarks/fine_tuning.py --model " + arguments.model,
        "rows": rows,
        **environment(),
    }
    write_atomically(arguments.output, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
