"""A prompted classifier against the language model it was made of, brute-force autograd, a hand-written loop, and its own files."""

import copy

import pytest
import torch
from conftest import WORDS, build_backbone_config, build_tokenizer
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from kernel_oracle import assert_exact
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, Gemma2Config

from lpft_nb.classifier import Classifier, logits_of
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.language_heads import TiedHead, language_model_class
from lpft_nb.models.trials import trial_examples
from lpft_nb.prompts import (
    PromptedClassifier,
    Template,
    TemplateError,
    causal_template,
    masked_template,
    prompted_tasks,
)
from lpft_nb.stages import FineTune, LinearProbe, LoRA, ScaleHead, run_stages
from lpft_nb.tangent_kernel import tangent_kernel
from lpft_nb.tasks import load_task
from lpft_nb.training.batches import epoch_order
from lpft_nb.training.measuring import encode_splits

MASKED = Template("{text} is {mask} to a", ("great", "small", "dull"))
CAUSAL = Template("{text} is a {mask}", ("great", "small", "dull"))
TEXTS = ["the cat sat", "a great dog ran over the small small matrix", "find", "dull film"]
PLAIN = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
MODELS = {
    "bert": {},
    "roberta": {},
    "distilbert": {},
    "albert": {},
    "mpnet": {},
    "electra": {},
    "gpt2": {},
    "llama": {"tie_word_embeddings": True},
}


def language_model(name="bert", dtype=torch.float64, **changes):
    "A tiny random language model in which no weight is zero."
    config = build_backbone_config(name, **{**MODELS[name], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = language_model_class(config)[0]._from_config(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def template_of(model):
    return MASKED if language_model_class(model.config)[1] else CAUSAL


def prompted(model, **options):
    options = {"tokenizer": build_tokenizer(), "max_length": 32, **options}
    return PromptedClassifier.from_language_model(
        model, options.pop("template", template_of(model)), **options
    )


def scores_of(model, texts):
    "The language model's own scores of the label words, each text alone, written out by hand."
    tokenizer, masked = build_tokenizer(), language_model_class(model.config)[1]
    ids = tokenizer.convert_tokens_to_ids(list(MASKED.words))
    rows = []
    for text in texts:
        if masked:
            read = tokenizer(f"{text} is <mask> to a", return_tensors="pt")["input_ids"]
            place = int((read[0] == tokenizer.mask_token_id).nonzero())
        else:
            read = tokenizer(f"{text} is a", return_tensors="pt")["input_ids"][:, :-1]  # no </s>
            place = read.shape[1] - 1
        with torch.no_grad():
            rows.append(
                model(input_ids=read, attention_mask=torch.ones_like(read)).logits[0, place, ids]
            )
    return torch.stack(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_kernel_are_the_language_models(name, tied):
    model = language_model(name)
    before = copy.deepcopy(model.state_dict())
    ours = prompted(model, tied=tied)
    torch.testing.assert_close(
        logits_of(ours, TEXTS, 3), scores_of(model, TEXTS), rtol=0, atol=1e-9
    )
    assert all(torch.equal(table, before[key]) for key, table in model.state_dict().items())
    batch = ours.tokenize(TEXTS)
    torch.testing.assert_close(
        ours(**batch).logits, ours.head(ours.features(**batch)), rtol=0, atol=1e-12
    )
    features = logits_gram(ours, batch)
    whole = kernel_by_autograd(ours, batch)
    kernel = tangent_kernel(ours, batch, quiet=True, by="group")
    assert_exact(kernel, (features, whole - features))
    torch.testing.assert_close(sum(kernel.shares.values()), kernel.ft_effective)


def logits_gram(model, batch):
    "P: the inner products of φ, and 1 for a bias, for each class alone."
    with torch.no_grad():
        phi = model.features(**batch)
    gram = phi @ phi.T + (model.head.bias is not None)
    return gram[:, None, :, None] * torch.eye(3, dtype=gram.dtype)[None, :, None]


def kernel_by_autograd(model, batch):
    "Θ (N, C, N, C) over all parameters, each once, however many uses it has."
    parameters, rows = list(model.parameters()), []
    for n in range(len(batch["input_ids"])):
        for logit in model(**{name: table[n : n + 1] for name, table in batch.items()}).logits[0]:
            found = torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).flatten()
                        for p, g in zip(parameters, found, strict=True)
                    ]
                )
            )
    table = torch.stack(rows)
    return (table @ table.T).view(len(rows) // 3, 3, len(rows) // 3, 3)


def test_both_uses_meet_where_a_text_holds_a_label_word():
    model = language_model()
    kernels = [
        tangent_kernel(each, each.tokenize(TEXTS), quiet=True)
        for each in (prompted(model), prompted(model, tied=True))
    ]
    apart, together = kernels
    torch.testing.assert_close(apart.pretrain_effective, together.pretrain_effective)
    off = (together.total - apart.total).abs().amax(dim=(1, 3))
    holding = torch.tensor([False, True, False, True])  # great, small; dull
    met = holding[:, None] | holding[None]
    assert (off[met] > 1e-6).all() and (off[~met] < 1e-9).all()


def test_a_frozen_table_leaves_the_bias_and_another_side_is_cut_in_blocks():
    ours = prompted(language_model(), tied=True)
    both = tangent_kernel(ours, ours.tokenize(TEXTS), ours.tokenize(TEXTS[:2]), quiet=True)
    whole = tangent_kernel(ours, ours.tokenize(TEXTS), quiet=True)
    torch.testing.assert_close(both.total, whole.total[:, :, :2])
    ours.head.table.requires_grad_(False)
    frozen = tangent_kernel(ours, ours.tokenize(TEXTS), quiet=True)
    assert torch.equal(frozen.gram, torch.ones(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_files_bring_back_the_same_model(name, tied, tmp_path):
    ours = prompted(language_model(name, torch.float32), tied=tied, label_names=["a", "b", "c"])
    ours.save_pretrained(tmp_path / "model")
    again = PromptedClassifier.from_pretrained(tmp_path / "model")
    assert again.template == ours.template and list(again.config.id2label.values()) == [
        "a",
        "b",
        "c",
    ]
    assert isinstance(again.head, TiedHead) == tied and again.config.tied == tied
    batch = ours.tokenize(TEXTS)
    assert all(torch.equal(batch[key], table) for key, table in again.tokenize(TEXTS).items())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, ours(**batch).logits)
    assert again.state_dict().keys() == ours.state_dict().keys()
    if tied:  # the table came back as one parameter with two uses
        with torch.no_grad():
            again.backbone.get_input_embeddings().weight[again.config.word_ids[0]] = 0
        assert not again.head.weight[0].any()
    with pytest.raises(ClassifierError, match=r"PromptedClassifier\.from_pretrained"):
        Classifier.from_pretrained(tmp_path / "model")
    with pytest.raises(TemplateError, match="asked for another"):
        PromptedClassifier.from_pretrained(
            tmp_path / "model", Template("{text} {mask}", ("a", "an"))
        )
    with pytest.raises(ClassifierError, match="tied="):
        PromptedClassifier.from_pretrained(tmp_path / "model", tied=not tied)


def test_a_language_model_is_loaded_by_name_and_one_without_a_head_is_refused(tmp_path):
    model = language_model("roberta", torch.float32)
    model.save_pretrained(tmp_path / "whole")
    model.roberta.save_pretrained(tmp_path / "bare")
    for folder in ("whole", "bare"):
        build_tokenizer().save_pretrained(tmp_path / folder)
    ours = PromptedClassifier.from_pretrained(tmp_path / "whole", MASKED, max_length=32)
    torch.testing.assert_close(logits_of(ours, TEXTS), scores_of(model, TEXTS), rtol=0, atol=1e-5)
    assert ours.config.source["id"] == "whole" and len(ours.config.source["sha256"]) == 64
    with pytest.raises(TemplateError, match="needs a template"):
        PromptedClassifier.from_pretrained(tmp_path / "whole")
    with pytest.raises(ClassifierError, match="no head for words"):
        PromptedClassifier.from_pretrained(tmp_path / "bare", MASKED)


@pytest.fixture
def task(tmp_path, monkeypatch):
    "36 lines of words in three classes."
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))
    kinds = ("good great movie", "very small value", "bad dull noise")
    rows = [
        {"text": f"{kinds[n % 3]} {' '.join(WORDS[n : n + 2 + n % 4])}", "label": n % 3}
        for n in range(36)
    ]
    parts = {"train": rows[:24], "validation": rows[24:30], "test": rows[30:]}
    return load_task(DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}))


@pytest.mark.parametrize("tied", [False, True])
def test_fine_tuning_ends_where_a_written_out_loop_ends(task, tied):
    model = language_model("bert", torch.float32, **PLAIN)
    ours = prompted(model, tied=tied)
    other = copy.deepcopy(ours)
    settings = dict(epochs=1, learning_rate=1e-3, batch_size=8, length_grouping=False)
    run_stages(ours, task, [FineTune(**settings)], seed=3, device="cpu")
    encoded = other.encode(task.train)
    order = epoch_order(
        [len(one["input_ids"]) for one in encoded], 8, seed=3, epoch=0, length_grouping=False
    )
    optimiser = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        chosen = order[8 * step : 8 * step + 8]
        batch = other.pad([encoded[number] for number in chosen])
        labels = torch.tensor([task.train["label"][number] for number in chosen])
        loss = torch.nn.functional.cross_entropy(other(**batch).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimiser.step()
    for (name, found), expected in zip(ours.named_parameters(), other.parameters(), strict=True):
        if not name.endswith(
            "key.bias"
        ):  # their gradient is zero but for rounding, and AdamW keeps its sign
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
    table = ours.backbone.get_input_embeddings().weight
    rows = table[ours.config.word_ids]
    assert torch.equal(ours.head.weight, rows) == tied  # without the tie both have moved apart
    assert not torch.equal(table, model.get_input_embeddings().weight)


def test_the_head_alone_is_probed_and_a_tied_one_only_when_it_is_untied(task, tmp_path):
    ours = prompted(language_model("bert", torch.float32), tied=True)
    before = logits_of(ours, task.test)
    alone = (LinearProbe(penalty=1.0), ScaleHead(2.0), LoRA(r=2), FineTune(trainable=("head.*",)))
    for stage in alone:
        with pytest.raises(ClassifierError, match="untie"):
            run_stages(ours, task, [stage], device="cpu")
    with pytest.raises(ClassifierError, match="untie"):
        ours.with_temperature(2.0)
    assert not any("lora_" in name for name, _ in ours.named_parameters())
    ours.untie()
    torch.testing.assert_close(logits_of(ours, task.test), before)
    backbone = copy.deepcopy(ours.backbone.state_dict())
    stages = [LinearProbe(penalty=1.0), FineTune(epochs=1, learning_rate=1e-4, batch_size=8)]
    result = run_stages(ours, task, stages[:1], seed=0, output=tmp_path / "run", device="cpu")
    assert all(
        torch.equal(table, backbone[name]) for name, table in ours.backbone.state_dict().items()
    )
    accuracy = (
        result.metrics.query("split == 'train' and metric == 'accuracy'").set_index("stage").value
    )
    assert accuracy["LP"] > accuracy["start"]
    assert set(run_stages(ours, task, stages, device="cpu").metrics.stage) == {"start", "LP", "FT"}
    softer = ours.with_temperature(2.0)
    torch.testing.assert_close(2 * logits_of(softer, task.test), logits_of(ours, task.test))


def test_tokens_kept_for_one_template_do_not_serve_another(task):
    model = language_model("bert", torch.float32)
    other = Template("{text} of a {mask}", MASKED.words)
    one, two = prompted(model), prompted(model, template=other)
    for ours in (one, two, one):
        found = encode_splits(ours, {"test": task.test}, 32)["test"]
        assert found.inputs == ours.encode(task.test, 32)
    short = encode_splits(one, {"test": task.test}, 9)["test"]
    lengths = [len(example["input_ids"]) for example in one.encode(task.test)]
    assert (
        short.truncated
        == one.count_truncated(task.test, 9)
        == sum(length > 9 for length in lengths)
        > 0
    )


def test_wrong_inputs_are_refused_by_name():
    model = language_model()
    ours = prompted(model)
    with pytest.raises(ValueError, match="expected one mask token"):
        ours.features(torch.tensor([[0, 7, 9, 2]]), torch.ones(1, 4).long())
    pairs = Template("{one} is {mask} {two}", MASKED.words)
    with pytest.raises(TemplateError, match="expected 2 texts"):
        prompted(model, template=pairs).encode(TEXTS)
    with pytest.raises(TemplateError, match="expected the columns"):
        ours.encode(Dataset.from_dict({"sentence": TEXTS, "label": [0, 1, 2, 0]}))
    with pytest.raises(TemplateError, match="not one piece"):
        prompted(model, template=Template("{text} {mask}", ("great", "unheard")))
    with pytest.raises(TemplateError, match="ends in"):
        prompted(language_model("gpt2"), template=MASKED)
    with pytest.raises(ClassifierError, match="from_language_model"):
        PromptedClassifier.from_sequence_classifier(model)


def test_a_decoder_that_bends_its_scores_is_refused():
    config = Gemma2Config(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        final_logit_softcapping=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ClassifierError, match="cannot be prompted"):
        prompted(model)


def test_examples_of_a_trial_have_one_gap():
    backbone = prompted(language_model()).backbone
    for example in trial_examples(backbone, (7, 1, 30), gap_id=4):
        assert example["input_ids"].count(4) == 1
    assert trial_examples(backbone, (7,)) != trial_examples(backbone, (7,), gap_id=4)


@pytest.fixture(scope="module")
def every_word():
    "A prompted model for each kind, whose vocabulary holds the label words of every task."
    made = []
    for name in ("bert", "gpt2"):
        tokenizer = build_tokenizer()
        words = {word for task in prompted_tasks() for word in masked_template(task).words}
        tokenizer.add_tokens(
            [AddedToken(word, single_word=True, normalized=False) for word in sorted(words)]
        )
        model = language_model(name, torch.float32, vocab_size=256)
        made.append(prompted(model, tokenizer=tokenizer, max_length=64))
    return made


@given(some.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_gap_of_no_template_is_ever_cut(every_word, data):
    masked, causal = every_word
    task = data.draw(some.sampled_from(prompted_tasks()))
    text = some.lists(some.sampled_from(WORDS), min_size=1, max_size=80).map(" ".join)
    for ours, template in ((masked, masked_template(task)), (causal, causal_template(task))):
        ours.config.template, ours.config.words = template.text, list(template.words)
        row = tuple(data.draw(text) for _ in template.columns)
        length = data.draw(some.integers(28, 64))
        example = ours.encode([row if len(row) > 1 else row[0]], max_length=length)[0]
        assert len(example["input_ids"]) <= length
        gap = masked.config.gap_id
        assert example["input_ids"].count(gap) == (ours is masked)
        ids = ours.encode([tuple("a" for _ in row) if len(row) > 1 else "a"])[0]["input_ids"]
        if ours is causal:  # the words before the gap are all there, and nothing behind them
            behind = template.text.split("}")[-2].split("{")[0].split()
            assert example["input_ids"][-len(behind) :] == ids[-len(behind) :]


def test_the_small_decoder_answers_in_words(shared_models):
    template = Template("{text} She was very {mask}", ("happy", "little"))
    ours = PromptedClassifier.from_pretrained(shared_models / "stories260K", template, tied=True)
    texts = ["Lily got a new toy. She played all day.", "Lily lost her toy. She began to cry."]
    logits = logits_of(ours, texts)
    assert logits.shape == (2, 2) and logits.isfinite().all()
    tokenizer = ours.tokenizer
    whole = AutoModelForCausalLM.from_pretrained(shared_models / "stories260K").eval()
    for text, found in zip(texts, logits, strict=True):
        ids = tokenizer(f"{text} She was very", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = whole(input_ids=ids).logits[0, -1, ours.config.word_ids]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
