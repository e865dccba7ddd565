"""Trains a tiny model in a process of its own, for the tests of several processes and of kills."""

import argparse
import os
import time
from pathlib import Path

import torch

from toys import small_model, toy_data

from lpft_nb.training import loop
from lpft_nb.training.batches import EpochSampler
from lpft_nb.training.checkpoints import last_checkpoint
from lpft_nb.training.stage import FineTune


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
    resumed = last_checkpoint(arguments.folder)
    if resumed is not None:
        print("resumed from step", resumed.name.split("-")[1], flush=True)
    if arguments.pause:
        measure = loop.validation_metrics

        def slow(*given):
            time.sleep(arguments.pause)
            return measure(*given)

        loop.validation_metrics = slow
    stage = FineTune(
        epochs=arguments.epochs, learning_rate=1e-3, head_learning_rate=1e-2, batch_size=4
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    history, facts = loop.train(
        model,
        training,
        validation,
        stage,
        seed=0,
        folder=arguments.folder,
        minutes_between_checkpoints=arguments.minutes,
    )
    with torch.no_grad():
        logits = model(**model.pad(validation.inputs)).logits
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sampler = EpochSampler(
        training.lengths,
        global_batch_size=4,
        process_batch_size=stage.process_batch_size(processes),
        processes=processes,
        seed=0,
        length_grouping=True,
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
