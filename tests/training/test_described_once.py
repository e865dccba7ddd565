"""What a stage does not move is described once: the same rows as if they were computed again."""

import pandas as pd

from lpft_nb.classifier import Classifier
from lpft_nb.stages import FineTune, LinearProbe, ScaleHead, run_stages
from lpft_nb.tasks import load_task
from lpft_nb.training import measuring


def test_only_features_that_moved_are_described_again(toy_task, tiny_checkpoint, monkeypatch):
    task, real, calls = load_task(str(toy_task)), measuring.feature_statistics, []

    def noted(features, reference):
        calls.append(features is reference)
        return real(features, reference)

    monkeypatch.setattr(measuring, "feature_statistics", noted)
    model = Classifier.from_pretrained(
        tiny_checkpoint, 2, seed=0, max_length=16, label_names=list(task.label_names)
    )
    stages = [LinearProbe(penalty=1.0), ScaleHead(2.0), FineTune(epochs=1, learning_rate=1e-2)]
    result = run_stages(model, task, stages, device="cpu")
    assert calls == [True] * 3 + [False] * 3  # splits at the start, and after training
    rows = result.metrics.set_index(["split", "metric"])
    names = ["mean_norm", "mean_cosine", "feature_change", "fisher_ratio_shrunk", "nc1_quotient"]
    wanted = rows.index.get_level_values("metric").isin(names)
    of = lambda stage: rows.loc[(rows["stage"] == stage) & wanted, "value"]
    assert len(of("start")) == 3 * len(names)
    for stage in ("LP", "scale"):
        pd.testing.assert_series_equal(of(stage), of("start"))
    of_one = lambda stage, name: of(stage).xs(name, level="metric")
    assert (of_one("FT", "feature_change") > 0).all()
    assert (of_one("FT", "mean_norm") != of_one("start", "mean_norm")).all()
