"""Trains a tiny model in a process of its own, for the tests of several processes and of kills."""

import argparse
import os
import time
from pathlib import Path

import torch

from test_loop import small_model, toy_data

import lpft_nb.training.loop as fine_tuning


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument(
        "--pause",
        type=float,
        default=0.0,
        help="seconds after each epoch, so that a test can cut in",
    )
    arguments = parser.parse_args()
    model = small_model(arguments.dropout)
    training, validation = toy_data(21), toy_data(9, seed=1)
    resumed = fine_tuning.last_checkpoint(arguments.folder)
    if resumed is not None:
        print("resumed from step", resumed.name.split("-")[1], flush=True)
    if arguments.pause:
        measure = fine_tuning.validation_metrics

        def slow(*given):
            time.sleep(arguments.pause)
            return measure(*given)

        fine_tuning.validation_metrics = slow
    plan = fine_tuning.TrainingPlan(arguments.epochs, 1e-2, 1e-3, batch_size=4)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    history, facts = fine_tuning.train(
        model,
        training,
        validation,
        plan,
        0,
        arguments.folder,
        minutes_between_checkpoints=arguments.minutes,
    )
    with torch.no_grad():
        logits = model(**model.pad(validation.inputs)).logits
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = fine_tuning.EpochSampler(
        training.lengths, 4, plan.process_batch_size(processes), processes, 0, True
    )
    end = dict(
        losses=torch.tensor([row["value"] for row in history if row["metric"] == "loss"]),
        logits=logits,
        weights={name: p.detach() for name, p in model.named_parameters()},
        fillers=sampler.fillers,
    )
    torch.save(end, arguments.folder / f"end-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
