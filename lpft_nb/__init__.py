__version__ = "0.1.0"

from transformers import AutoConfig, AutoModelForSequenceClassification

from .models.configuration import ClassifierConfig


class LazyClassifier:
    "Stands in for `lpft_nb.classifier.Classifier` until the first model is loaded: importing it takes seconds."

    config_class = ClassifierConfig

    @classmethod
    def from_pretrained(cls, name, *arguments, **options):
        "Import the real class, which then takes this one's place, and load with it."
        from .classifier import Classifier

        return Classifier.from_pretrained(name, *arguments, **options)

    @classmethod
    def _from_config(cls, config, **options):
        "Import the real class and build a model with random weights."
        from .classifier import Classifier

        return Classifier._from_config(config, **options)


AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(ClassifierConfig, LazyClassifier, exist_ok=True)
