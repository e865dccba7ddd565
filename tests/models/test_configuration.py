"""What a saved model says about itself comes back unchanged."""

import copy
import json

import transformers
from conftest import build_backbone_config

from lpft_nb.models.configuration import ClassifierConfig


def test_configuration_round_trip(tiny_model, tmp_path):
    config = tiny_model("t5", source={"id": "x"}).config
    config.save_pretrained(tmp_path)
    again = ClassifierConfig.from_pretrained(tmp_path)
    assert type(again.backbone) is transformers.T5Config
    assert again.to_dict() == {
        **config.to_dict(),
        "transformers_version": again.to_dict()["transformers_version"],
    }
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "lpft_classifier"
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_importing_the_module_registers_the_configuration():
    assert transformers.AutoConfig.for_model("lpft_classifier").__class__ is ClassifierConfig


def test_the_length_of_a_feature_vector_is_the_backbones_unless_it_is_given():
    backbone = build_backbone_config("bert")
    assert ClassifierConfig(backbone=backbone).hidden_size == 16
    assert ClassifierConfig(backbone=backbone.to_dict()).hidden_size == 16
    assert ClassifierConfig(backbone=backbone, hidden_size=8).hidden_size == 8
    empty = ClassifierConfig()
    assert empty.backbone is None and empty.hidden_size is None
