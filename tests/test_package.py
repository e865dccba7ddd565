"""`import lpft_nb`: light, and transformers knows our classes in whatever order things are imported."""

import importlib
import importlib.util
import subprocess
import sys
import threading

import pytest
from repository import ROOT

import lpft_nb


def run(program: str, *arguments: str) -> str:
    """What a fresh process prints; it must end well and write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a classifier of random weights."""
    from conftest import build_backbone_config, build_tokenizer

    from lpft_nb.classifier import Classifier
    from lpft_nb.models.configuration import ClassifierConfig

    folder = tmp_path_factory.mktemp("saved")
    config = ClassifierConfig(backbone=build_backbone_config("bert"), num_labels=3, max_tokens=64)
    model = Classifier(config)
    model.tokenizer = build_tokenizer()
    model.save_pretrained(folder)
    return folder


LIGHT = """
import sys
before = set(sys.modules)
import lpft_nb
packages = {name.split(".")[0] for name in set(sys.modules) - before}
assert packages - set(sys.stdlib_module_names) == {"lpft_nb"}, packages
assert {name for name in sys.modules if name.startswith("lpft_nb")} == {"lpft_nb"}
assert lpft_nb.__version__
"""


def test_the_package_imports_the_standard_library_alone():
    run(LIGHT)


def test_the_command_line_explains_itself_without_a_deep_learning_library():
    run(
        """
import sys
from lpft_nb.command_line import make_parser
make_parser().format_help()
assert not {"torch", "transformers", "numpy", "pandas"} & set(sys.modules)
"""
    )


def test_the_package_imports_where_transformers_is_not_installed():
    hide = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""
    run(hide + LIGHT)


ORDERS = {
    "package first": "import lpft_nb, transformers",
    "transformers first": "import transformers, lpft_nb",
    "models first": "from transformers import AutoModelForSequenceClassification; import lpft_nb",
    "our configuration first": "import lpft_nb.models.configuration, transformers",
    "twice": "import importlib, lpft_nb, transformers; importlib.reload(lpft_nb)",
}
USE = """
import sys, transformers
assert not {"lpft_nb.classifier", "datasets", "peft", "matplotlib", "nbdev"} & set(sys.modules)
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__module__ == "lpft_nb.models.configuration", type(config)
assert "lpft_nb.classifier" not in sys.modules
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert type(model).__module__ == "lpft_nb.classifier" and model.tokenizer is not None
again = transformers.AutoModelForSequenceClassification.from_config(config)
assert type(again) is type(model)
auto = sys.modules["transformers.models.auto.modeling_auto"]
assert type(auto.__loader__).__name__ == "SourceFileLoader" and auto.__spec__.loader is auto.__loader__
print(model.predict(["the cat"]).labels)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_model_in_every_order(saved, order):
    assert run(f"{ORDERS[order]}\n{USE}", saved).startswith("[")


def test_a_configuration_is_read_without_model_code_and_a_model_can_be_built_first(saved):
    run(
        """
import sys, lpft_nb
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(config).__name__ == "ClassifierConfig"
assert not {"transformers.modeling_utils", "lpft_nb.classifier"} & set(sys.modules)
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_config(config)
assert type(model).__module__ == "lpft_nb.classifier"
""",
        saved,
    )


THREADS = """
import importlib, sys, threading, transformers
sys.setswitchinterval(1e-5)
names = ["lpft_nb", "lpft_nb.models.configuration", "transformers.models.auto.configuration_auto",
         "transformers.models.auto.modeling_auto", "lpft_nb", "transformers.models.auto.modeling_auto"]
start, errors = threading.Barrier(len(names)), []
def load(name):
    start.wait()
    try:
        importlib.import_module(name)
    except BaseException as error:
        errors.append((name, error))
threads = [threading.Thread(target=load, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join(120)
assert not errors and not any(thread.is_alive() for thread in threads), errors
"""


def test_threads_that_import_everything_at_once_end_well(saved):
    assert run(f"{THREADS}\n{USE}", saved).startswith("[")


# ---------------------------------------------------------------- the watcher by itself


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A module of our own to be imported; what a test puts into Python's lists is taken out again."""
    (tmp_path / "lpft_watched.py").write_text("value = 3\n")
    (tmp_path / "lpft_broken.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    sys.modules.pop("lpft_watched", None)


def test_an_action_follows_the_complete_module(watched):
    seen = []
    lpft_nb._watch({"lpft_watched": lambda: seen.append(sys.modules["lpft_watched"].value)})
    spec = importlib.util.find_spec("lpft_watched")
    assert seen == [] and spec.loader.get_source("lpft_watched") == "value = 3\n"
    module = importlib.import_module("lpft_watched")
    assert seen == [3] and module.__loader__ is module.__spec__.loader
    assert type(module.__loader__).__name__ == "SourceFileLoader"
    importlib.import_module("lpft_watched")
    assert seen == [3]
    lpft_nb._watch({"lpft_watched": lambda: seen.append("at once")})
    assert seen == [3, "at once"]


def test_watchers_of_one_module_do_not_call_each_other_in_a_circle(watched):
    seen = []
    lpft_nb._watch({"lpft_watched": lambda: seen.append("inner")})
    lpft_nb._watch({"lpft_watched": lambda: seen.append("outer")})
    importlib.import_module("lpft_watched")
    assert seen == ["inner", "outer"]


def test_a_module_whose_own_loading_leads_here_is_not_acted_upon(watched):
    program = "import lpft_nb; lpft_nb._watch({__name__: lambda: seen.append(value)}); value = 4"
    (watched / "lpft_circle.py").write_text(f"from lpft_watched import seen\n{program}\n")
    (watched / "lpft_watched.py").write_text("seen = []\n")
    circle = importlib.import_module("lpft_circle")
    assert circle.seen == [] and circle.value == 4
    del sys.modules["lpft_circle"]


def test_what_another_thread_is_loading_is_waited_for(watched):
    program = "import threading; on = threading.Event(); on.wait(60); value = 5"
    (watched / "lpft_watched.py").write_text(program)
    loading = threading.Thread(target=importlib.import_module, args=("lpft_watched",))
    loading.start()
    while "lpft_watched" not in sys.modules or not hasattr(sys.modules["lpft_watched"], "on"):
        pass
    seen = []
    action = {"lpft_watched": lambda: seen.append(sys.modules["lpft_watched"].value)}
    waiting = threading.Thread(target=lpft_nb._watch, args=(action,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and seen == []
    sys.modules["lpft_watched"].on.set()
    loading.join(60)
    waiting.join(60)
    assert seen == [5]


def test_an_action_may_import_the_module_that_it_waited_for(watched):
    seen = []
    lpft_nb._watch(
        {"lpft_watched": lambda: seen.append(importlib.import_module("lpft_watched").value)}
    )
    importlib.import_module("lpft_watched")
    assert seen == [3]


def test_a_module_that_fails_or_is_missing_stays_so(watched):
    seen = []
    lpft_nb._watch(dict.fromkeys(("lpft_broken", "lpft_nowhere"), lambda: seen.append("acted")))
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("lpft_broken")
    with pytest.raises(ModuleNotFoundError, match="lpft_nowhere"):
        importlib.import_module("lpft_nowhere")
    assert seen == [] and "lpft_broken" not in sys.modules


def test_an_error_of_an_action_is_not_swallowed(watched):
    def fail():
        raise LookupError("the action failed")

    lpft_nb._watch({"lpft_watched": fail})
    with pytest.raises(LookupError, match="the action failed"):
        importlib.import_module("lpft_watched")
    assert "lpft_watched" not in sys.modules
