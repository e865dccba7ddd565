"""Maps and planes of features: what is drawn equals what was counted, scikit-learn's components, and what is refused."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from feature_oracle import draw

from lpft_nb.feature_figures import change_map, draw_plane, neighbour_plane, principal_plane
from lpft_nb.features import layer_sums, statistics_table


@pytest.fixture(autouse=True)
def no_display():
    matplotlib.use("agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")


LABELS = torch.arange(30) % 3
HEAD = 2 * torch.eye(3, 6) + 5
FEATURES = draw(30, 6, 0) + 6 * torch.eye(3, 6).double()[LABELS]


def table_of_two_layers():
    after = {"first": FEATURES + 1, "last": FEATURES + 2}
    sums = layer_sums(after, dict.fromkeys(after, FEATURES), labels=LABELS)
    return statistics_table(sums, ["layer", "class"])


def test_a_map_shows_each_cell_where_it_belongs():
    table = table_of_two_layers()
    axes = change_map(table, "feature_change")
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, np.array([[1], [2]]) * np.full((2, 4), 6**0.5))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["all", "0", "1", "2"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "last"]
    assert {text.get_text() for text in axes.texts} == {f"{6**0.5:.3g}", f"{2 * 6**0.5:.3g}"}


def test_a_cell_that_is_not_defined_stays_empty():
    axes = change_map(table_of_two_layers(), "fisher_ratio")
    shown = np.ma.getmaskarray(axes.images[0].get_array())
    assert shown.tolist() == [[False, True, True, True]] * 2  # one class has no ratio
    assert len(axes.texts) == 2


@pytest.mark.parametrize(
    ("change", "metric", "message"),
    [
        (lambda table: table, "feature_chang", "did you mean"),
        (lambda table: table.drop(columns="layer"), "feature_change", "no column 'layer'"),
        (lambda table: pd.concat([table, table]), "feature_change", "filter to one split"),
        (lambda table: table.assign(value=np.nan), "feature_change", "defined nowhere"),
    ],
)
def test_a_map_refuses(change, metric, message):
    with pytest.raises(ValueError, match=message):
        change_map(change(table_of_two_layers()), metric)


def test_the_plane_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    plane = principal_plane(FEATURES, HEAD)
    fitted = PCA(2).fit(FEATURES.numpy())
    signs = np.sign((plane.points * fitted.transform(FEATURES.numpy())).sum(axis=0))
    np.testing.assert_allclose(plane.points * signs, fitted.transform(FEATURES.numpy()), atol=1e-9)
    assert f"{fitted.explained_variance_ratio_[1]:.0%}" in plane.names[1]
    centred = HEAD.double().numpy() - HEAD.double().numpy().mean(axis=0)
    ends = centred @ (fitted.components_ * signs[:, None]).T
    reach = np.quantile(np.linalg.norm(plane.points, axis=1), 0.9)
    np.testing.assert_allclose(
        plane.rows, ends * reach / np.linalg.norm(ends, axis=1).max(), atol=1e-9
    )
    turned = principal_plane(FEATURES + 3, 7 * HEAD - 2)  # nothing that a softmax would notice
    np.testing.assert_allclose(turned.points, plane.points, atol=1e-9)
    np.testing.assert_allclose(turned.rows, plane.rows, atol=1e-6)


def test_neighbours_of_one_class_lie_together_with_its_row():
    plane = neighbour_plane(FEATURES, HEAD, seed=3)
    assert plane.points.shape == (30, 2) and plane.rows.shape == (3, 2)
    centres = np.stack([plane.points[k == LABELS].mean(axis=0) for k in range(3)])
    assert np.linalg.norm(plane.rows[:, None] - centres, axis=2).argmin(axis=1).tolist() == [
        0,
        1,
        2,
    ]
    np.testing.assert_array_equal(neighbour_plane(FEATURES, HEAD, seed=3).points, plane.points)


def test_what_is_drawn_is_the_plane():
    plane = principal_plane(FEATURES, HEAD)
    axes = draw_plane(plane, LABELS, ["cat", "dog", "owl"])
    drawn = [np.asarray(dots.get_offsets()) for dots in axes.collections]
    for label, points in enumerate(drawn):
        np.testing.assert_allclose(points, plane.points[label == LABELS])
    stars = [line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() == "*"]
    np.testing.assert_allclose(stars, plane.rows)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cat", "dog", "owl"]
    without = draw_plane(principal_plane(FEATURES), LABELS)
    assert len(without.get_lines()) == 0 and len(without.collections) == 3


REFUSED = {
    "a head of another size": (lambda: principal_plane(FEATURES, torch.eye(3)), "two rows of 6"),
    "a head of one row": (lambda: principal_plane(FEATURES, HEAD[:1]), "two rows"),
    "a cloud on a line": (
        lambda: principal_plane(torch.ones(9, 6) * torch.arange(1, 10)[:, None]),
        "vary in 1",
    ),
    "few neighbours": (lambda: neighbour_plane(FEATURES[:9]), "ten examples"),
    "equal rows of a head": (lambda: neighbour_plane(FEATURES, torch.ones(3, 6)), "no direction"),
    "a label without a row": (
        lambda: draw_plane(principal_plane(FEATURES, HEAD), LABELS + 1),
        "below the 3 rows",
    ),
    "labels that do not match": (
        lambda: draw_plane(principal_plane(FEATURES), LABELS[:5]),
        "each of 30 rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    work, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        work()
