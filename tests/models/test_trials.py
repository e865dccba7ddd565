"""What a classifier must pass when it is made: pooling as stated, the three trials, ids within the table, customary arguments, order of classes."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import build_backbone_config, build_tokenizer
from torch.testing import assert_close
from transformers import BertModel

from lpft_nb.classifier import Classifier, describe_model
from lpft_nb.models.backbones import build_backbone, learned_positions
from lpft_nb.models.checkpoints import ClassifierError
from lpft_nb.models.encoding import fit_tokenizer
from lpft_nb.models.head import check_class_order, label_map
from lpft_nb.models.loading import fresh_config, stated_pooling, take_customary
from lpft_nb.models.trials import _tried, observed_limit, trial_examples, try_backbone
from lpft_nb.stages import LinearProbe, run_stages
from lpft_nb.tasks import load_task


def spread(backbone):
    "Weights that differ from their symmetric start, so that a wrong position or mask shows."
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in backbone.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone.eval()


def checkpoint(folder, config, tokenizer=True):
    "A folder with a tiny random backbone."
    spread(build_backbone(config)).save_pretrained(folder)
    if tokenizer:
        build_tokenizer().save_pretrained(folder)
    return folder


def classifier_of(backbone):
    "A classifier in memory, not yet tried."
    return Classifier(fresh_config(backbone, label_map(2, None)), backbone).eval()


def state(folder, pooling):
    "Write what sentence-transformers would: the steps, and a configuration of the pooling."
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    steps = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(steps))


STATED = [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 16}, "mean"),
    ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
    ({"pooling_mode": "mean"}, "mean"),
    ({"pooling_mode": ["lasttoken"]}, "last"),
]


@pytest.mark.parametrize(("stated", "expected"), STATED)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_checkpoints_own_pooling_is_the_default(tmp_path, stated, expected, architecture):
    checkpoint(tmp_path, build_backbone_config(architecture))
    state(tmp_path, stated)
    model = Classifier.from_pretrained(tmp_path, num_labels=2)
    assert model.config.pooling == expected == describe_model(tmp_path, num_labels=2)["pooling"]
    asked = Classifier.from_pretrained(tmp_path, num_labels=2, pooling="cls")
    assert asked.config.pooling == "cls"  # who asks decides
    model.save_pretrained(tmp_path / "saved")
    assert Classifier.from_pretrained(tmp_path / "saved").config.pooling == expected


@pytest.mark.parametrize(
    "stated",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode_mean_tokens": False},
        {"pooling_mode": "weightedmean"},
    ],
)
def test_a_stated_pooling_that_there_is_none_of_is_refused_by_name(tmp_path, stated):
    checkpoint(tmp_path, build_backbone_config("bert"))
    state(tmp_path, stated)
    for ask in (Classifier.from_pretrained, describe_model):
        with pytest.raises(ClassifierError, match="states the pooling"):
            ask(tmp_path, num_labels=2)
        ask(tmp_path, num_labels=2, pooling="mean")
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ClassifierError, match="cannot be read"):
        stated_pooling(tmp_path)


def test_the_embedded_model_states_the_mean(embedded_model):
    assert describe_model(embedded_model, num_labels=2)["pooling"] == "mean"


# --- the trials


class LeakyBert(BertModel):
    "Each token gets a little of what stands last in the row."

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        last = output.last_hidden_state[:, -1:]
        output.last_hidden_state = output.last_hidden_state + 0.1 * last
        return output


class ChanceBert(BertModel):
    "Another number at every call."

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        output.last_hidden_state = output.last_hidden_state + torch.rand(1)
        return output


class ShyBert(BertModel):
    "Reads no text of fewer than six tokens."

    def forward(self, input_ids, attention_mask=None, **options):
        if input_ids.shape[1] < 6:
            raise RuntimeError("kernel size can't be greater than input size")
        return super().forward(input_ids, attention_mask, **options)


class ShortBert(BertModel):
    "Gives one vector for every two tokens."

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        output.last_hidden_state = output.last_hidden_state[:, ::2]
        return output


class BlankBert(BertModel):
    "Ends in NaN on long texts."

    def forward(self, input_ids, attention_mask=None, **options):
        output = super().forward(input_ids, attention_mask, **options)
        if input_ids.shape[1] > 30:
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LeakyBert, "beside a longer text"),
        (ChanceBert, "twice and gives two features"),
        (ShyBert, "cannot read a text as short as 3 tokens .*kernel size"),
        (ShortBert, "no vector for each of"),
        (BlankBert, "NaN or infinity for a text of 64 tokens"),
    ],
)
def test_what_does_not_behave_as_phi_is_refused_by_name(kind, message):
    backbone = spread(kind(build_backbone_config("bert"), add_pooling_layer=False))
    model = classifier_of(backbone)
    with pytest.raises(ClassifierError, match=f"{kind.__name__}.*{message}"):
        try_backbone(model, shortest=3)


def test_positions_that_the_backbone_counts_otherwise_are_left_to_it():
    "It starts to count at two; handed-in positions from zero would be others."

    class Shifted(BertModel):
        def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
            if position_ids is None:
                position_ids = torch.arange(2, input_ids.shape[1] + 2)[None]
            return super().forward(input_ids, attention_mask, position_ids=position_ids, **options)

    model = classifier_of(spread(Shifted(build_backbone_config("bert"), add_pooling_layer=False)))
    assert model.inputs.positions
    assert not try_backbone(model, shortest=3).positions
    assert model.inputs.position_limit == 62
    (example,) = trial_examples(model.backbone, (7,))
    with torch.no_grad():
        own = model.backbone(torch.tensor([example["input_ids"]])).last_hidden_state[:, 0]
        assert_close(
            model.features(torch.tensor([example["input_ids"]]), torch.ones(1, 7).long()), own
        )


def test_a_good_backbone_passes_and_is_left_as_it_was(architecture):
    backbone = spread(build_backbone(build_backbone_config(architecture)))
    model = classifier_of(backbone).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    limit = try_backbone(model, shortest=1).position_limit
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert limit == learned_positions(backbone)[1]


def test_the_limit_is_seen_whatever_the_table_is_called():
    rows = torch.arange(2, 10)[None]
    table, words = torch.zeros(26, 4), torch.zeros(100, 4)
    tokens = torch.tensor([[3, 9, 2, 7, 7, 1, 8, 5]])
    assert observed_limit([(tokens, words), (rows, table)], 8) == 24
    assert observed_limit([(tokens, words), (rows - 2, table), (rows, words)], 8) == 26
    assert observed_limit([(tokens, words)], 8) is None
    assert observed_limit([(torch.zeros(1, 8, dtype=torch.long), table)], 8) is None


# Named tables, hidden tables, rotations, recurrences: none of them may need a word of ours.
OTHERS = {
    "OPTConfig": dict(word_embed_proj_dim=16, ffn_dim=32),
    "BioGptConfig": {},
    "OpenAIGPTConfig": dict(n_embd=16, n_layer=1, n_head=2, n_positions=24),
    "XLMConfig": dict(emb_dim=16, n_layers=1, n_heads=2),
    "XLNetConfig": dict(d_model=16, n_layer=1, n_head=2, d_inner=32),
    "BloomConfig": dict(n_layer=1, n_head=2),
    "FalconConfig": {},
    "RwkvConfig": dict(num_hidden_layers=2),
    "MambaConfig": dict(state_size=4),
    "RoFormerConfig": {},
    "SqueezeBertConfig": dict(embedding_size=16, q_groups=1, k_groups=1, v_groups=1),
    "MraConfig": {},
    "LongformerConfig": dict(attention_window=8),
    "BigBirdConfig": {},
    "XGLMConfig": dict(d_model=16, num_layers=1, attention_heads=2, ffn_dim=32),
    "Data2VecTextConfig": {},
    "CamembertConfig": {},
    "EsmConfig": {},
    "Gemma2Config": dict(num_key_value_heads=1, head_dim=8),
    "MistralConfig": dict(num_key_value_heads=1),
    "Phi3Config": dict(num_key_value_heads=2),
    "StableLmConfig": dict(num_key_value_heads=2),
    "NomicBertConfig": {},
    "EuroBertConfig": dict(num_key_value_heads=2),
}
SMALL = dict(
    vocab_size=100,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=24,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)
REFUSED = {
    "FNetConfig": ("takes no attention mask", {}),
    "ConvBertConfig": ("beside a longer text", dict(embedding_size=16)),
    "MobileBertConfig": ("beside a longer text", dict(embedding_size=16, intra_bottleneck_size=16)),
    "BartConfig": ("no text backbone", dict(d_model=16, encoder_layers=1, decoder_layers=1)),
}


def tiny_config(name, changes):
    small = SMALL if name != "XLNetConfig" else dict(vocab_size=100)  # it has no limit to set
    return getattr(transformers, name)(**{**small, **changes})


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_load_and_are_described_alike(name, tmp_path):
    checkpoint(tmp_path, tiny_config(name, OTHERS[name]))
    model = Classifier.from_pretrained(tmp_path, num_labels=2)
    said = describe_model(tmp_path, num_labels=2)
    assert (said["max_length"], said["pooling"]) == (model.max_length, model.config.pooling)
    assert said["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    limit = model.inputs.position_limit
    assert model.max_length == min(128, limit or 128)
    alone = model.predict(["the cat sat"]).probabilities
    long = " ".join(["the cat sat on a small matrix of noise"] * 30)
    assert_close(model.predict([long, "the cat sat"]).probabilities[1:], alone, rtol=0, atol=1e-5)
    if limit is not None:
        with pytest.raises(ValueError, match=f"{limit} positions"):
            Classifier.from_pretrained(tmp_path, num_labels=2, max_length=limit + 1)


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_serve_are_refused_when_loaded(name, tmp_path):
    message, changes = REFUSED[name]
    config = tiny_config(name, changes)
    spread(transformers.AutoModel.from_config(config)).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ClassifierError, match=message):
        Classifier.from_pretrained(tmp_path, num_labels=2)


# --- ids


def test_padding_outside_the_table_is_replaced_and_other_tokens_are_refused(tmp_path):
    rows = len(build_tokenizer())
    config = build_backbone_config("bert", vocab_size=rows)
    checkpoint(tmp_path, config, tokenizer=False)
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<extra>"})
    tokenizer.save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path, num_labels=2)
    assert model.tokenizer.pad_token_id < rows
    alone = model.predict(["find"]).probabilities
    together = model.predict(["find", "the cat sat under a tree"]).probabilities
    assert_close(together[:1], alone, rtol=0, atol=1e-6)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path)
    for ask in (Classifier.from_pretrained, describe_model):
        with pytest.raises(ClassifierError, match="no row.*zebra.*resize_token_embeddings"):
            ask(tmp_path, num_labels=2)


def test_a_tokenizer_without_table_or_a_table_without_tokenizer():
    assert fit_tokenizer(None, 5) is None
    tokenizer = build_tokenizer()
    assert fit_tokenizer(tokenizer, None) is tokenizer


def test_a_tokenizer_without_a_rust_backend_serves(tmp_path):
    config = transformers.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    checkpoint(tmp_path, config, tokenizer=False)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path, num_labels=2)
    together = model.predict(["a", "a longer text"]).probabilities
    assert_close(together[:1], model.predict(["a"]).probabilities, rtol=0, atol=1e-6)


def test_a_text_that_spells_a_token_outside_the_table_is_refused_by_name(tmp_path):
    checkpoint(tmp_path, build_backbone_config("bert", vocab_size=len(build_tokenizer())), False)
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<extra>"})
    tokenizer.save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path, num_labels=2)
    with pytest.raises(ValueError, match="input_ids holds .* special token"):
        model.predict(["find <extra>"])


# --- customary arguments


@pytest.mark.parametrize("length", [-5, 0, True, "128", 1.5])
def test_a_length_that_is_none_is_refused_before_anything_is_loaded(length):
    with pytest.raises(ValueError, match="max_length must be a positive number"):
        Classifier.from_pretrained("nowhere", num_labels=2, max_length=length)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_batch_size_that_is_none_is_refused(tiny_checkpoint, size):
    with pytest.raises(ValueError, match="batch_size must be a positive whole number"):
        Classifier.from_pretrained(tiny_checkpoint, num_labels=2).predict(["a"], batch_size=size)


def test_customary_arguments_are_translated(tiny_checkpoint):
    model = Classifier.from_pretrained(
        tiny_checkpoint,
        num_labels=2,
        attn_implementation="eager",
        torch_dtype=torch.bfloat16,
        id2label={"1": "yes", "0": "no"},
        label2id={"no": 0, "yes": 1},
        use_safetensors=True,
        use_fast=True,
        low_cpu_mem_usage=True,
    )
    assert model.dtype == torch.bfloat16 and model.config.id2label == {0: "no", 1: "yes"}
    assert model.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(device_map="cpu"), r"model\.to"),
        (dict(use_safetensors=False), "only safetensors"),
        (dict(output_loading_info=True), "missing weights"),
        (dict(problem_type="regression"), "chooses one class"),
        (dict(label2id={"a": 0, "b": 1}), "label_names"),
        (dict(attn_implementation="eager", attention="sdpa"), "give one of them"),
        (dict(num_lables=2), "unknown argument num_lables: did you mean 'num_labels'"),
        (dict(use_fast=False), r"model\.tokenizer"),
        (dict(tokenizer="mine"), r"model\.tokenizer"),
        (dict(output_hidden_states=True), r"model\.features"),
        (dict(ignore_mismatched_sizes=True), "another shape"),
        (dict(from_tf=True), "only safetensors"),
        (dict(max_memory={0: "1GB"}), r"model\.to"),
        (dict(offload_folder="here"), r"model\.to"),
        (dict(key_mapping={"a": "b"}), "key_mapping"),
        (dict(config="here"), "config must be a configuration"),
        (dict(id2label=["a", "b"]), "got \\['a', 'b'\\]"),
        (dict(id2label={1: "a", 2: "b"}), "classes 0, 1"),
        (dict(id2label={0: "a", 1: "a"}), "classes 0, 1"),
        (dict(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0}), "contradict each other"),
        (dict(label_names="no"), "label_names must be a list"),
        (dict(label_names={0: "a", 1: "b"}), "label_names must be a list"),
        (dict(seed=-1), "seed must be"),
        (dict(seed=1.5), "seed must be"),
        (dict(seed=True), "seed must be"),
        (dict(head_bias="no"), "head_bias must be"),
        (dict(head_dropout=float("nan")), "head_dropout must be"),
        (dict(head_dropout="0.1"), "head_dropout must be"),
    ],
)
def test_customary_arguments_without_a_meaning_are_refused(tiny_checkpoint, given, message):
    with pytest.raises(ClassifierError, match=message):
        Classifier.from_pretrained(tiny_checkpoint, num_labels=2, **given)


def test_what_is_not_customary_stays():
    options = {"revision": "main", "device_map": None}
    ours = {"attention": "eager", "dtype": None, "label_names": ["a", "b"]}
    assert take_customary(options, ours) == ours and options == {"revision": "main"}


# --- the order of the classes


def test_the_same_classes_in_another_order_are_refused(tiny_checkpoint, toy_task, tmp_path):
    task = load_task(str(toy_task))
    turned = list(reversed(task.label_names))
    model = Classifier.from_pretrained(tiny_checkpoint, label_names=turned)
    with pytest.raises(ClassifierError, match="another order"):
        run_stages(model, task, [LinearProbe()], device="cpu")
    model.save_pretrained(tmp_path)
    with pytest.raises(ClassifierError, match="another order"):
        Classifier.from_pretrained(tmp_path, label_names=list(task.label_names))
    Classifier.from_pretrained(tmp_path, label_names=[f"new {name}" for name in turned])


def test_other_names_say_nothing_about_the_order():
    check_class_order(["LABEL_0", "LABEL_1"], ["no", "yes"])
    check_class_order(["No", "Yes"], ["no", "yes"])
    for own in (["yes", "no"], ["YES", "No"], [" yes", "no "], ["maybe", "no"], ["yes", "x", "y"]):
        with pytest.raises(ClassifierError, match="another order"):
            check_class_order(own, ["no", "yes"])


def test_the_trial_reads_no_special_token():
    backbone = build_backbone(build_backbone_config("bert", pad_token_id=5))
    (example,) = trial_examples(backbone, (200,))
    assert 5 not in example["input_ids"] and len(set(example["input_ids"])) > 20
    assert trial_examples(backbone, (200,)) == [example]
    assert replace(classifier_of(backbone).inputs, positions=False).positions is False


def test_a_head_that_somebody_trained_is_not_dropped_in_silence(tmp_path, caplog):
    config = build_backbone_config("bert", id2label={0: "no", 1: "yes"})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    Classifier.from_pretrained(tmp_path, num_labels=2)
    assert "trained for no, yes" in caplog.text and "from_sequence_classifier" in caplog.text


# --- lengths, rounding, other devices


def dynamic_llama(dtype=torch.float32):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = build_backbone_config("llama", max_position_embeddings=40, rope_parameters=rope)
    return classifier_of(spread(build_backbone(config)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rotation_that_depends_on_the_longest_text_is_refused_beyond_its_length(dtype):
    model = dynamic_llama(dtype)
    assert try_backbone(model, longest=64).position_limit == 40  # as its configuration says
    model = dynamic_llama(dtype)
    with pytest.raises(ClassifierError, match="beside a longer text"):
        _tried(model, model.inputs, shortest=1, longest=64)


def test_a_length_beyond_the_tried_one_is_tried_when_it_is_asked_for(tmp_path):
    model = dynamic_llama()
    model.tokenizer, model.config.max_tokens = build_tokenizer(), 16
    model.save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path)
    assert model.inputs.tried == 16 and repr(model.inputs).count("tried") == 0
    model.encode(["the cat"], max_length=32)
    assert model.inputs.tried == 32
    for ask in (model.encode, model.tokenize, model.count_truncated):
        with pytest.raises(ValueError, match="more than the 40 positions"):
            ask(["the cat"], max_length=64)
    with pytest.raises(ValueError, match="more than the 40 positions"):
        Classifier.from_pretrained(tmp_path, max_length=64)


def test_weights_of_16_bits_keep_their_type_and_numbers():
    model = classifier_of(spread(build_backbone(build_backbone_config("bert"))).bfloat16())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try_backbone(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPTJConfig", dict(n_positions=48, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)),
        ("CodeGenConfig", dict(n_positions=48, n_embd=16, n_layer=1, n_head=4, rotary_dim=4)),
        ("CTRLConfig", dict(n_positions=48, n_embd=16, n_layer=1, n_head=2, dff=32)),
        ("MptConfig", dict(max_seq_len=48, d_model=16, n_layers=1, n_heads=2)),
    ],
)
def test_a_limit_that_no_lookup_shows_is_the_stated_one(name, changes, tmp_path):
    config = getattr(transformers, name)(vocab_size=100, bos_token_id=0, eos_token_id=2, **changes)
    checkpoint(tmp_path, config)
    model = Classifier.from_pretrained(tmp_path, num_labels=2)
    assert model.max_length == 48
    model.predict([" ".join(["cat"] * 200), "dog"])
    with pytest.raises(ValueError, match="48 positions"):
        Classifier.from_pretrained(tmp_path, num_labels=2, max_length=64)
