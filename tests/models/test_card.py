"""The page beside the weights says what the model knows, and spares pages that are not ours."""

import pytest
from huggingface_hub import ModelCard

from lpft_nb.classifier import Classifier
from lpft_nb.models.card import SIGNATURE, model_card
from lpft_nb.models.lora import add_lora


def row(stage, split, metric, value):
    return dict(stage=stage, split=split, metric=metric, value=value)


RUN = {
    "task": {"name": "weather", "fingerprint": "12ab", "sizes": {"train": 9, "test": 3}},
    "stages": [{"name": "LP", "settings": {"folds": 4}}, {"name": "FT", "settings": {}}],
    "seed": 3,
    "metrics": [
        row("LP", "test", "accuracy", 0.5),
        row("LP", "test", "ece", 0.4),
        row("FT", "validation", "temperature", 1.75),
        row("FT", "test", "accuracy", 0.8125),
        row("FT", "test", "ece", 0.25),
        row("FT", "test", "ece_after_temperature", 0.125),
    ],
}


def test_the_page_says_what_the_model_knows(tiny_model):
    model = tiny_model("bert", num_labels=2, max_tokens=21, id2label={0: "a|b\nc", 1: "sun"})
    model.config.source = {
        "id": "mine",
        "sha256": "77",
        "base": {"id": "some/bert", "sha256": "88"},
    }
    model.config.history = [RUN]
    page = model_card(model.config)
    card = ModelCard(page)
    assert card.data.library_name == "transformers" and card.data.base_model == "some/bert"
    assert card.data.pipeline_tag == "text-classification" and "lpft-nb" in card.data.tags
    for text in (
        SIGNATURE,
        "# A text classifier on some/bert",
        "cuts a text at 21 tokens",
        "| 0 | a\\|b c |",
        "LP → FT on the task weather (9 train, 3 test examples), seed 3.",
        "| LP | folds | 4 |",
        "| stage | split | accuracy | ece |",
        "| FT | test | 0.8125 | 0.25 |",
        "| test | 0.25 | 0.125 |",
        "The temperature 1.75 was fitted on the validation split.",
        "No temperature is in the weights",
        "| pooling | cls |",
        "| transformers | ",
    ):
        assert text in page, text
    assert "LoRA" not in page and "peft" not in page


def test_a_temperature_and_adapters_stand_on_the_page(tiny_model):
    model = tiny_model("bert")
    model.config.history = [RUN]
    add_lora(model, r=2, alpha=4)
    softer = model.with_temperature(1.75)
    page = model_card(softer.config)
    assert "Then the head was divided by the temperature 1.75." in page
    assert "A temperature is in the weights" in page
    assert '"alpha": 4' in page and "| peft | " in page
    assert model.config.history == [RUN]  # the first model was not softened
    softer.config.history.append(RUN)  # trained on: the head has moved since
    assert "No temperature is in the weights" in model_card(softer.config)


def test_a_model_without_history_says_so(tiny_model):
    page = model_card(tiny_model("bert").config)
    assert "No training is recorded" in page and "Not measured." in page
    assert (
        not hasattr(ModelCard(page).data, "base_model") or ModelCard(page).data.base_model is None
    )


@pytest.mark.parametrize("name", ["C:/a/b", "folder", "/models/bert", "a/b/c"])
def test_a_folder_is_no_base_model(tiny_model, name):
    config = tiny_model("bert").config
    config.source = {"id": name}
    assert "base_model" not in model_card(config)


def test_the_history_comes_back_and_the_card_with_it(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.config.history = [RUN]
    model.with_temperature(2.0).save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path)
    assert again.config.history == [RUN, {"temperature": 2.0}]
    assert "weather" in (tmp_path / "README.md").read_text()


def test_only_our_own_page_is_written_again(tiny_model, tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    model.config.history = [RUN]
    model.save_pretrained(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "weather" in page
    mine = page.replace(SIGNATURE, "") + "my words"
    (tmp_path / "README.md").write_text(mine)
    tiny_model("gpt2").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine
    assert Classifier.from_pretrained(tmp_path).config.backbone.model_type == "gpt2"
