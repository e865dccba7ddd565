"""Runs LP-FT on a small task in a process of its own, for the test of kills."""

import argparse
import os
import time
from pathlib import Path

import torch

from toys import small_model

from lpft_nb.stages import FineTune, LinearProbe, run_stages
from lpft_nb.tasks import load_task
from lpft_nb.training import loop


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="holds words.jsonl")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument(
        "--pause",
        type=float,
        default=0.0,
        help="seconds at each epoch's end, so that a test can cut in",
    )
    arguments = parser.parse_args()
    if arguments.pause:
        measure = loop.validation_metrics

        def slow(*given):
            time.sleep(arguments.pause)
            return measure(*given)

        loop.validation_metrics = slow
    task = load_task(arguments.folder / "words.jsonl")
    result = run_stages(
        small_model(arguments.dropout, num_labels=2),
        task,
        [LinearProbe(), FineTune(epochs=4, learning_rate=1e-3, batch_size=8)],
        output=arguments.folder / "out",
        device="cpu",
        minutes_between_checkpoints=0.0,
    )
    rows = result.metrics[~result.metrics.metric.isin(["seconds", "peak_memory_bytes"])]
    name = "end.pt" if os.environ.get("RANK", "0") == "0" else f"end-{os.environ['RANK']}.pt"
    torch.save(
        {
            **result.arrays,
            "metrics": torch.tensor(rows.value.to_numpy(), dtype=torch.float64),
            "history": torch.tensor(result.history.value.to_numpy(), dtype=torch.float64),
        },
        arguments.folder / name,
    )


if __name__ == "__main__":
    main()
