"""Everything that acts is in a fingerprint, nothing that does not, and it is the same in every process."""

import importlib
import importlib.util
import json
import pkgutil
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build_tiny_model, build_tokenizer
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CanineTokenizer,
    PreTrainedTokenizerFast,
    ProphetNetTokenizer,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lpft_nb.models.fingerprints import (
    hooks_of,
    TOKENIZER_PATTERNS,
    file_hashes,
    function_fingerprint,
    tokenizer_fingerprint,
)
from lpft_nb.models.checkpoints import EMBEDDED_MODELS, embedded_directory, locate
from lpft_nb.models.loading import describe_model
from lpft_nb.models.lora import add_lora
from lpft_nb.store.record import record_id

# --- tokenizers ---


class LikeFast(PreTrainedTokenizerFast):
    "A class whose code no version names."


def other_end(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )


def no_lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()


def other_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


SETTINGS = {
    "truncation_side": "left",
    "padding_side": "left",
    "split_special_tokens": True,
    "model_input_names": ["input_ids"],
    "add_prefix_space": True,
    "unk_token": "<pad>",
    "eos_token": "<mask>",
}
FAST = {name: lambda t, name=name: setattr(t, name, SETTINGS[name]) for name in SETTINGS} | {
    "new token": lambda t: t.add_tokens(["unheard"]),
    "new special token": lambda t: t.add_special_tokens({"additional_special_tokens": ["<new>"]}),
    "ends": other_end,
    "normalizer": no_lower_case,
    "words": other_words,
}
PYTHON = {name: FAST[name] for name in list(SETTINGS)[:4] + ["new token"]} | {
    "offset": lambda t: setattr(t, "offset", 4),
    "special tokens' pattern": lambda t: setattr(t, "special_tokens_pattern", "eos"),
    "eos": lambda t: setattr(t, "eos_token", "<pad>"),
}


@pytest.mark.parametrize("name", FAST)
def test_each_part_of_a_fast_tokenizer_is_in_its_fingerprint(name):
    check_part(build_tokenizer, FAST[name])


@pytest.mark.parametrize("name", PYTHON)
def test_each_part_of_a_python_tokenizer_is_in_its_fingerprint(name):
    check_part(ByT5Tokenizer, PYTHON[name])


def check_part(make, change):
    "Another fingerprint with the change, the first one again without it; a call changes neither."
    plain, changed = make(), make()
    change(changed)
    before, after = tokenizer_fingerprint(plain), tokenizer_fingerprint(changed)
    assert before != after and None not in (before, after)
    for tokenizer in (plain, changed):
        tokenizer(["the cat", "a dog"], truncation=True, max_length=4, padding="max_length")
    assert [tokenizer_fingerprint(plain), tokenizer_fingerprint(changed)] == [before, after]
    assert tokenizer_fingerprint(make()) == before


def test_another_class_is_another_tokenizer():
    found = {tokenizer_fingerprint(kind()) for kind in (ByT5Tokenizer, CanineTokenizer)}
    assert len(found) == 2 and None not in found


def test_a_vocabulary_file_is_in_the_fingerprint_and_its_place_is_not(tmp_path):
    found = []
    for number, words in enumerate((["a", "b"], ["a", "b"], ["a", "c"])):
        place = tmp_path / f"{number}.tokenizer"
        place.write_text("\n".join(["[UNK]", "[SEP]", "[X_SEP]", "[PAD]", "[MASK]", *words]))
        found.append(tokenizer_fingerprint(ProphetNetTokenizer(str(place))))
    assert found[0] == found[1] != found[2] and None not in found


@pytest.mark.parametrize(
    "tokenizer",
    [
        None,
        LikeFast(tokenizer_object=build_tokenizer().backend_tokenizer),
        pytest.param(ByT5Tokenizer(), id="own function"),
        pytest.param(build_tokenizer(), id="own part"),
    ],
)
def test_what_cannot_be_written_down_has_no_fingerprint(tokenizer, request):
    class Own:
        def pre_tokenize(self, text):
            pass

    if request.node.callspec.id == "own function":
        tokenizer.tokenize = lambda text: text.split()
    if request.node.callspec.id == "own part":
        part = pre_tokenizers.PreTokenizer.custom(Own())
        tokenizer.backend_tokenizer.pre_tokenizer = part
    assert tokenizer_fingerprint(tokenizer) is None


# --- functions ---


def by_hand(model):
    model.backbone.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


class Shifted(torch.nn.Module):
    def forward(self, hidden):
        return hidden + 1


class Doubled(torch.nn.Module):
    def forward(self, hidden):
        return hidden * 2


Doubled.__qualname__ = Doubled.__name__ = "Shifted"  # the same name, another code


def own(kind):
    model = build_tiny_model("bert")
    model.backbone.encoder.layer[0].intermediate.intermediate_act_fn = kind()
    return model


def adapted(alpha):
    model = build_tiny_model("bert")
    add_lora(model, r=2, alpha=alpha)
    return model


def with_attention(name):
    model = build_tiny_model("bert")
    model.backbone.set_attn_implementation(name)
    return model


def swapped():
    model = build_tiny_model("bert")
    by_hand(model)
    return model


def test_each_way_to_compute_has_a_fingerprint_of_its_own():
    make = build_tiny_model
    variants = {
        "plain": make("bert"),
        "activation": make("bert", backbone={"hidden_act": "relu"}),
        "epsilon": make("bert", backbone={"layer_norm_eps": 1e-3}),
        "heads": make("bert", backbone={"num_attention_heads": 4}),
        "decoder": make("bert", backbone={"is_decoder": True}),
        "types": make("bert", backbone={"type_vocab_size": 1}),
        "pooling": make("bert", pooling="mean"),
        "attention": with_attention("eager"),
        "module": swapped(),
        "adapters": adapted(2.0),
        "alpha": adapted(16.0),
        "own class": own(Shifted),
        "own class's code": own(Doubled),
        "architecture": make("electra"),
    }
    found = {name: function_fingerprint(model) for name, model in variants.items()}
    assert len(set(found.values())) == len(variants)
    assert function_fingerprint(make("bert", seed=5)) == found["plain"], "weights are not in it"
    assert function_fingerprint(with_attention("sdpa")) == found["plain"], "and back"


def test_names_and_classes_of_a_head_make_no_other_function():
    plain, renamed = build_tiny_model("bert"), build_tiny_model("bert")
    renamed.backbone.config._name_or_path = "elsewhere"
    renamed.backbone.config.id2label = {0: "a", 1: "b"}
    renamed.backbone.config.transformers_version = "0"
    assert function_fingerprint(renamed) == function_fingerprint(plain)


ELSEWHERE = """
from conftest import build_tiny_model, build_tokenizer
from transformers import ByT5Tokenizer
from lpft_nb.models.fingerprints import function_fingerprint, tokenizer_fingerprint
print(tokenizer_fingerprint(build_tokenizer()), tokenizer_fingerprint(ByT5Tokenizer()))
print(function_fingerprint(build_tiny_model("bert")))
"""


def test_fingerprints_are_the_same_in_another_process():
    here = [tokenizer_fingerprint(build_tokenizer()), tokenizer_fingerprint(ByT5Tokenizer())]
    here.append(function_fingerprint(build_tiny_model("bert")))
    assert subprocess.check_output([sys.executable, "-c", ELSEWHERE], text=True).split() == here


# --- files, and the names of runs ---


@pytest.fixture
def checkpoint(tmp_path):
    "A backbone and its tokenizer, as transformers saves them."
    build_tiny_model("bert", dtype=torch.float32).backbone.save_pretrained(tmp_path / "tiny")
    build_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def name_of(folder):
    "The name of a run of this model."
    model = describe_model(folder, num_labels=2, max_length=32)
    task = {"name": "made-up", "fingerprint": "f" * 16}
    run = {"experiment": "x", "method": "LP", "seed": 0, "parameters": {}}
    return record_id(run | {"task": task, "model": model})


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ACTING = {
    "activation": ("config.json", {"hidden_act": "relu"}),
    "epsilon": ("config.json", {"layer_norm_eps": 1e-3}),
    "attention": ("config.json", {"attn_implementation": "eager"}),
    "normalizer": ("tokenizer.json", {"normalizer": None}),
    "truncation side": ("tokenizer_config.json", {"truncation_side": "left"}),
    "split": ("tokenizer_config.json", {"split_special_tokens": True}),
    "unknown": ("tokenizer_config.json", {"unk_token": "<pad>"}),
}


@pytest.mark.parametrize("name", ACTING)
def test_what_acts_in_a_file_gives_a_run_another_name_and_the_old_one_when_it_goes(
    checkpoint, name
):
    file, changes = ACTING[name]
    before, content = name_of(checkpoint), (checkpoint / file).read_text()
    edited(checkpoint / file, **changes)
    after = name_of(checkpoint)
    (checkpoint / file).write_text(content)
    assert name_of(checkpoint) == before != after


def test_what_does_not_act_in_a_file_keeps_the_name(checkpoint):
    before = name_of(checkpoint)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / file).read_text())
        (checkpoint / file).write_text(json.dumps(dict(reversed(content.items())), indent=7))
    edited(checkpoint / "config.json", transformers_version="0", _name_or_path="elsewhere")
    edited(checkpoint / "tokenizer_config.json", name_or_path="elsewhere")
    for file in ("notes.txt", "README.md", "trainer_state.json"):
        (checkpoint / file).write_text("{}")
    assert name_of(checkpoint) == before


def test_a_tokenizer_that_comes_or_goes_changes_the_name(checkpoint):
    before = name_of(checkpoint)
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer_sha256" not in file_hashes(checkpoint) and name_of(checkpoint) != before


def test_a_file_that_is_no_json_is_compared_by_its_bytes(tmp_path):
    found = []
    for text in ("{", "{", "{{"):
        (tmp_path / "vocab.json").write_text(text)
        found.append(file_hashes(tmp_path)["tokenizer_sha256"])
    assert found[0] == found[1] != found[2]


def test_every_file_that_transformers_reads_a_tokenizer_from_is_known():
    "Third party: the names that its own classes declare."
    names = set()
    for module in pkgutil.walk_packages(transformers.models.__path__, "transformers.models."):
        if ".tokenization_" not in module.name or ".auto" in module.name:
            continue
        try:
            found = vars(importlib.import_module(module.name)).values()
        except (ImportError, NameError):  # it needs a package that is not here
            continue
        kinds = [kind for kind in found if isinstance(kind, type)]
        for kind in kinds:
            if issubclass(kind, PreTrainedTokenizerBase):
                names |= set(kind.vocab_files_names.values())
    assert len(names) > 15
    unknown = [n for n in names if not any(fnmatch(n, pattern) for pattern in TOKENIZER_PATTERNS)]
    assert unknown == []


def test_an_embedded_model_is_named_by_its_revision_unless_its_files_are_others(
    embedded_model, tmp_path, monkeypatch
):
    directory, source = locate(embedded_model)
    assert set(source) == {"id", "revision", "sha256"}
    assert file_hashes(directory).items() <= EMBEDDED_MODELS[embedded_model].items()
    copied = tmp_path / "model"
    copied.mkdir()
    for path in directory.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, copied)
    (copied / "model.safetensors").symlink_to(Path(directory, "model.safetensors"))
    package = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert embedded_directory(embedded_model) == copied and locate(embedded_model)[1] == source
    edited(copied / "tokenizer.json", normalizer=None)
    changed = locate(embedded_model)[1]
    assert set(changed) - set(source) == {"tokenizer_sha256"} and changed.items() > source.items()


def _scaled(model):
    next(one for one in model.backbone.modules() if hasattr(one, "scaling")).scaling = 7.0


def _other_buffer(model):
    buffers = [one for name, one in model.backbone.named_buffers() if "inv_freq" in name]
    buffers[0].mul_(0.5)


def _hooked(model):
    next(model.backbone.children()).register_forward_hook(lambda *_: None)


def _own_forward(model):
    module = next(model.backbone.children())
    module.forward = module.forward


def _without_adapters(model):
    for module in model.backbone.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", _scaled),
        ("llama", _other_buffer),
        ("llama", _hooked),
        ("llama", _own_forward),
        ("bert", _without_adapters),
    ],
)
def test_what_modules_hold_beside_weights_is_in_the_fingerprint(name, change):
    make = lambda: adapted(2.0) if change is _without_adapters else build_tiny_model(name)
    model = make()
    before = function_fingerprint(model)
    assert function_fingerprint(make()) == before
    change(model)
    assert function_fingerprint(model) != before
    assert bool(hooks_of(model.backbone)) == (change in (_hooked, _own_forward))


def test_reading_a_text_and_training_mode_change_no_fingerprint():
    for name in ("bert", "llama", "gpt2", "t5"):
        model = build_tiny_model(name)
        before = function_fingerprint(model)
        model.predict(["a text", "another longer text"])
        model.train()
        assert function_fingerprint(model) == before
