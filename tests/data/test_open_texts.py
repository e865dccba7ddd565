"""Text to learn words from: what is read, what is left out because it judges, and how a part is held out."""

import json

import pytest

from lpft_nb.data.open_texts import (
    OPEN_SETS,
    OpenText,
    held_out,
    judged_texts,
    read_open_texts,
    sentences_of,
    words_alone,
)
from lpft_nb.data.table import TaskError


def write(root, name, **splits):
    folder = root / name
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def pair(premise, hypothesis):
    return {"sentence1": premise, "sentence2": hypothesis, "label": 0}


def question(text, passage):
    return {"question": text, "passage": passage, "label": 1}


@pytest.fixture
def root(tmp_path):
    write(
        tmp_path,
        "boolq",
        train=[question("is it big", "It is big. It is old.")],
        validation=[question("was it", "It was sold.")],
    )
    write(
        tmp_path,
        "lmbff_snli",
        train=[pair("A man runs.", "A man moves."), pair("A man runs.", "It sleeps.")],
    )
    return tmp_path


def test_texts_keep_their_order_place_and_source(root):
    assert read_open_texts(root, packages=()) == [
        OpenText("boolq", "It is big. It is old.", "is it big"),
        OpenText("boolq", "It is big. It is old.", "It is big. It is old."),
        OpenText("lmbff_snli", "A man runs.", "A man runs."),
        OpenText("lmbff_snli", "A man runs.", "A man moves."),
        OpenText("lmbff_snli", "A man runs.", "It sleeps."),
    ]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_another_set_judges_by_is_left_out(root, split):
    write(root, "other", **{split: [{"text": "Once more. A MAN , moves", "label": 0}]})
    texts = [one.text for one in read_open_texts(root, packages=())]
    assert "A man moves." not in texts and "It sleeps." in texts


def test_training_rows_of_another_set_judge_nothing(root):
    write(root, "other", train=[{"text": "A man moves.", "label": 0}])
    assert "A man moves." in [one.text for one in read_open_texts(root, packages=())]


def test_sentences_of_the_docstring_tasks_are_left_out(root):
    judged = judged_texts(root)
    found = [
        one for one in read_open_texts(root, packages=("scipy",)) if one.source == "docstrings"
    ]
    assert len(found) > 500
    assert not judged & {words_alone(part) for one in found for part in sentences_of(one.text)}
    seen = [words_alone(part) for one in found for part in sentences_of(one.text)]
    assert len(seen) == len(set(seen))


def test_a_set_that_is_missing_is_named(tmp_path):
    write(tmp_path, "boolq", train=[question("is it", "It is.")])
    with pytest.raises((TaskError, OSError)):
        read_open_texts(tmp_path, packages=())
    assert set(OPEN_SETS) == {"boolq", "lmbff_snli"}


def test_held_out_places_are_whole_and_do_not_depend_on_the_rest():
    texts = [OpenText("boolq", f"place {number // 3}", str(number)) for number in range(3000)]
    learned, kept = held_out(texts, 0.1)
    places = {one.place for one in kept}
    assert places.isdisjoint(one.place for one in learned) and 60 < len(places) < 140
    again = held_out(texts[:1500], 0.1)[1]
    assert again == [one for one in kept if int(one.text) < 1500]
    wider = {one.place for one in held_out(texts, 0.2)[1]}
    assert places < wider


@pytest.mark.parametrize("share", [0, 1, -0.1, 2])
def test_a_share_without_two_sides_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        held_out([OpenText("boolq", "a", "a")], share)


def test_two_sides_that_are_not_both_there_are_refused():
    with pytest.raises(ValueError, match="some on both sides"):
        held_out([OpenText("boolq", "a", "a")])
