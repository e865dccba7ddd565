"""Templates and label words: against a tokenizer's own encoding and a cut by brute force, on three kinds of vocabulary, with faults."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers
from transformers import PreTrainedTokenizerFast

from lpft_nb.classifier import Classifier
from lpft_nb.data.named import NAMED
from lpft_nb.data.templates import (
    Template,
    TemplateError,
    causal_template,
    check_template,
    encode_causal,
    encode_masked,
    label_word_ids,
    masked_template,
    prompted_tasks,
    write_row,
)
from lpft_nb.tasks import load_task

TEXTS = [
    "it was terrible, it was bad, it was okay, it was good, it was great.",
    "a man sleeps ? Yes, somebody is asleep. No, Maybe",
    "Question: does this answer the question, Yes or No? Answer: Yes",
]
REVIEW = Template("{sentence} It was {mask}.", ("terrible", "great"))


@pytest.fixture(scope="module")
def word_pieces():
    """A vocabulary of word pieces, as BERT's."""
    return Classifier.from_pretrained("minilm", num_labels=2).tokenizer


def _bytes_tokenizer():
    "Byte pairs with the space in front of a word, and a mask that swallows the space before it, as RoBERTa's."
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True),
    )


@pytest.fixture(scope="module")
def byte_pairs():
    return _bytes_tokenizer()


@pytest.fixture(scope="module")
def no_mask():
    """Byte pairs with a beginning and no mask, as a causal model's."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXTS * 20,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


# --- the templates themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", prompted_tasks())
def test_each_task_has_a_word_for_each_class_and_reads_its_own_columns(name):
    known = NAMED[name]
    for template in (masked_template(name), causal_template(name)):
        columns = known.text_columns or known.inputs
        found = check_template(template, columns, known.label_names)
        assert list(found) == list(known.label_names)


def test_words_stand_in_the_order_of_the_labels():
    asked = lambda name: check_template(
        masked_template(name), masked_template(name).columns, NAMED[name].label_names
    )
    assert asked("lmbff_snli")["contradiction"] == "No"
    assert asked("lmbff_rte") == {"entailment": "Yes", "not_entailment": "No"}
    assert asked("lmbff_sst-5")["very negative"] == "terrible"
    assert asked("lmbff_qqp")["duplicate"] == "Yes"
    assert asked("cola")["acceptable"] == "correct"
    assert asked("lmbff_trec")["ABBR"] == "Expression"


def test_what_is_no_template_is_refused():
    for text in ("{sentence}", "{mask} {mask} {a}", "{mask}", "{a} {a} {mask}"):
        with pytest.raises(TemplateError):
            Template(text, ("bad", "good"))
    for text in ("{a!s} {mask}", "{a:upper} {mask}", "{} {mask}", "{a {mask}"):
        with pytest.raises(TemplateError):
            Template(text, ("bad", "good"))
    for words in ("good", ("good",), ("good", "good"), ("good", " "), ("good", 1)):
        with pytest.raises(TemplateError):
            Template("{a} {mask}", words)
    with pytest.raises(TemplateError, match="did you mean"):
        masked_template("lmbff_sst2")
    with pytest.raises(TemplateError, match="columns"):
        check_template(REVIEW, ("text",), ("a", "b"))
    with pytest.raises(TemplateError, match="expected 3 label words, for a, b, c, got 2"):
        check_template(REVIEW, ("sentence",), ("a", "b", "c"))


def test_a_row_is_written_with_its_texts_in_place():
    pair = Template("{one} ? {mask}, {two:lowered}", ("Yes", "No"))
    written = write_row(pair, {"one": "A b.", "two": "ÉCOLE", "label": 3}, "[X]")
    assert written.text == "A b. ? [X], éCOLE"
    assert [written.text[slice(*written.spans[name])] for name in ("one", "two")] == [
        "A b.",
        "éCOLE",
    ]
    braces = write_row(REVIEW, {"sentence": "{mask} {0}"}, "_")
    assert braces.text == "{mask} {0} It was _."  # a text's own braces are text


# --- encoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["word_pieces", "byte_pairs"])
def test_a_row_that_fits_is_what_the_tokenizer_makes_of_the_written_text(kind, request):
    tokenizer = request.getfixturevalue(kind)
    rows = [{"sentence": "it was good"}, {"sentence": ""}, {"sentence": "naïve 東京 🙂"}]
    prompts = encode_masked(tokenizer, REVIEW, rows, max_length=100)
    for row, example, place in zip(rows, prompts.encoded, prompts.positions, strict=True):
        text = f"{row['sentence']} It was {tokenizer.mask_token}."
        whole = tokenizer(text)
        assert example["input_ids"] == whole["input_ids"]
        assert example["attention_mask"] == whole["attention_mask"]
        assert example["input_ids"][place] == tokenizer.mask_token_id


TOKENIZERS = {}


@settings(max_examples=60, deadline=None)
@given(some.data())
@pytest.mark.parametrize("kind", ["word_pieces", "byte_pairs"])
def test_only_texts_are_cut_and_no_more_than_needed(kind, request, data):
    if kind not in TOKENIZERS:
        TOKENIZERS[kind] = request.getfixturevalue(kind)
    tokenizer = TOKENIZERS[kind]
    words = some.lists(some.sampled_from(["it", "was", "terrible,", "🙂", "great", "man", "東京"]))
    row = {name: " ".join(data.draw(words)) for name in ("one", "two")}
    template = Template("{one} ? {mask}, {two:lowered}", ("Yes", "No"))
    length = data.draw(some.integers(14, 40))
    prompts = encode_masked(tokenizer, template, [row], max_length=length)
    ids = prompts.encoded[0]["input_ids"]
    assert len(ids) <= length and ids.count(tokenizer.mask_token_id) == 1
    whole = tokenizer(write_row(template, row, tokenizer.mask_token).text)["input_ids"]
    if len(whole) <= length:
        assert ids == whole
        return
    assert len(ids) >= length - 4  # a character of several tokens goes as a whole
    begin, end = tokenizer.decode(ids).split(tokenizer.mask_token)
    assert "?" in begin and "," in end


def test_the_longest_text_is_cut_first(word_pieces):
    row = {"sentence1": "one two three", "sentence2": "a " * 60}
    ids = encode_masked(word_pieces, masked_template("rte"), [row], max_length=20).encoded[0]
    assert "one two three?" in word_pieces.decode(ids["input_ids"]) and len(ids["input_ids"]) == 20


def test_a_causal_prompt_ends_where_the_word_would_stand(no_mask):
    template = causal_template("sst2")
    prompts = encode_causal(no_mask, template, [{"sentence": "it was good"}], max_length=50)
    assert prompts.encoded[0]["input_ids"] == no_mask("it was good It was")["input_ids"]
    assert prompts.positions == [len(prompts.encoded[0]["input_ids"]) - 1]
    short = encode_causal(no_mask, template, [{"sentence": "it was good " * 30}], max_length=12)
    assert no_mask.decode(short.encoded[0]["input_ids"]).endswith("It was")
    assert len(short.encoded[0]["input_ids"]) == 12


def test_an_ending_token_is_not_where_a_causal_prompt_is_read(byte_pairs):
    prompts = encode_causal(
        byte_pairs, causal_template("sst2"), [{"sentence": "it was good"}], max_length=50
    )
    ids = prompts.encoded[0]["input_ids"]
    assert ids[-1] == byte_pairs.eos_token_id and prompts.positions == [len(ids) - 2]


def test_rows_that_would_give_a_wrong_prompt_are_refused(word_pieces, no_mask):
    ask = lambda rows, template=REVIEW, **said: encode_masked(
        word_pieces, template, rows, **{"max_length": 32} | said
    )
    with pytest.raises(TemplateError, match="holds '\\[MASK\\]'"):
        ask([{"sentence": "a [MASK] of sugar"}])
    with pytest.raises(TemplateError, match="row 1 has no column 'sentence'"):
        ask([{"sentence": "a"}, {"text": "a"}])
    with pytest.raises(
        TemplateError, match="expected text in column 'sentence' of row 0, got None"
    ):
        ask([{"sentence": None}])
    with pytest.raises(TemplateError, match="no rows"):
        ask([])
    with pytest.raises(TemplateError, match="no room for the words of the template"):
        ask([{"sentence": "a b c"}], max_length=5)
    for length in (0, True, 3.0):
        with pytest.raises(TemplateError, match="max_length must be"):
            ask([{"sentence": "a"}], max_length=length)
    with pytest.raises(TemplateError, match="a tokenizer with a mask token"):
        encode_masked(no_mask, REVIEW, [{"sentence": "a"}], max_length=32)
    with pytest.raises(TemplateError, match="ends in \\{mask\\}"):
        encode_causal(no_mask, REVIEW, [{"sentence": "a"}], max_length=32)
    with pytest.raises(TemplateError, match="fast tokenizer"):
        encode_masked(object(), REVIEW, [{"sentence": "a"}], max_length=32)


# --- label words -------------------------------------------------------------------------------------------------


def test_a_label_word_is_the_piece_that_stands_in_a_sentence(word_pieces, byte_pairs):
    (great,) = label_word_ids(word_pieces, ["great"])
    assert word_pieces.convert_ids_to_tokens(great) == "great"
    (great,) = label_word_ids(byte_pairs, ["great"])
    assert byte_pairs.convert_ids_to_tokens(great) == "Ġgreat"
    assert great in byte_pairs("it was great")["input_ids"]


@pytest.mark.parametrize("name", prompted_tasks())
def test_the_words_of_every_task_are_single_pieces_of_the_default_vocabulary(name, word_pieces):
    words = masked_template(name).words
    ids = label_word_ids(word_pieces, words)
    assert [word_pieces.convert_ids_to_tokens(n) for n in ids] == [word.lower() for word in words]


def test_words_of_several_pieces_are_refused_with_others_to_choose(word_pieces):
    with pytest.raises(TemplateError, match="'un' \\+ '##watch' \\+ '##able'.*in one piece there"):
        label_word_ids(word_pieces, ["unwatchable", "great"])
    with pytest.raises(TemplateError, match="'Great' and 'great' are one piece"):
        label_word_ids(word_pieces, ["Great", "great"])
    with pytest.raises(TemplateError, match="not one piece"):
        label_word_ids(word_pieces, ["\u2063\U000f0000", "great"])


@pytest.mark.parametrize("name", prompted_tasks())
def test_real_rows_become_prompts_with_one_mask(name, shared_data, monkeypatch, word_pieces):
    if not (shared_data / name).is_dir():
        pytest.skip(f"no copy of {name} at hand")
    monkeypatch.setenv("LPFT_DATA", str(shared_data))
    rows = list(load_task(name).test.select(range(100)))
    for length in (128, 24):
        prompts = encode_masked(word_pieces, masked_template(name), rows, max_length=length)
        assert max(len(one["input_ids"]) for one in prompts.encoded) <= length
        for example, place in zip(prompts.encoded, prompts.positions, strict=True):
            assert example["input_ids"].index(word_pieces.mask_token_id) == place
