"""A readout with random numbers for an encoder in a folder."""

import torch
from transformers import BertForMaskedLM

from lpft_nb.models.checkpoints import model_file_hash
from lpft_nb.models.readout import HEAD, Readout

PLACES = ("encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense")


def drawn(folder, places=PLACES, seed=1):
    "A readout with random numbers for the encoder in a folder."
    torch.manual_seed(seed)
    model = BertForMaskedLM.from_pretrained(folder)
    layers = {name: model.bert.get_submodule(name) for name in places}
    return Readout(
        head={name: torch.randn(model.get_parameter(where).shape) for name, where in HEAD.items()},
        updates={
            name: (torch.randn(2, one.in_features), torch.randn(one.out_features, 2))
            for name, one in layers.items()
        },
        scale=0.25,
        base=model_file_hash(folder),
        facts={"run": "none", "steps": 3},
    )
