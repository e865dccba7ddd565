"""The cache: same values from the file as from the computation, whatever happens to the file."""

import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpft_nb.store import cache

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LPFT_CACHE", str(folder))
    monkeypatch.delenv("LPFT_CACHE_LIMIT", raising=False)
    cache._warn_once.cache_clear()
    return folder


def never():
    raise AssertionError("computed although it is stored")


def entry(folder):
    (path,) = folder.rglob("*.safetensors")
    return path


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_content_hash_of_one_text_is_sha256_of_its_framed_json():
    assert cache.content_hash("é") == hashlib.sha256(b"json 4:" + '"é"'.encode()).hexdigest()


def test_content_hash_is_the_same_in_another_process():
    code = "import torch; from lpft_nb.store.cache import content_hash as h; print(h({'b': [1, 2.5], 'a': 'x'}, torch.arange(3)))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert printed.stdout.strip() == cache.content_hash({"a": "x", "b": [1, 2.5]}, torch.arange(3))


@settings(deadline=None, max_examples=60)
@given(json_values)
def test_content_hash_survives_a_json_round_trip(value):
    assert cache.content_hash(json.loads(json.dumps(value))) == cache.content_hash(value)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensor_and_numpy_array_hash_alike(dtype, shape):
    tensor = torch.arange(6)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
    array = tensor.numpy()
    assert cache.content_hash(tensor) == cache.content_hash(array)
    if dtype not in (torch.bool, torch.uint8):
        assert cache.content_hash(
            array.astype(array.dtype.newbyteorder(">"))
        ) == cache.content_hash(array)


def test_content_hash_tells_apart_what_differs():
    array = torch.arange(6)
    parts = [
        (array,), (array.float(),), (array.int(),), (array.reshape(2, 3),), (array.flip(0),), (array.tolist(),),
        ({"a": array},), ({"b": array},), ({"a": array, "b": array},), (array, array), ("ab", "c"), ("a", "bc"), ("abc",),
        (b"abc",), (["abc"],), (1,), (1.0,), ("1",), (True,), (None,), (), (-0.0,), (0.0,),
    ]  # fmt: skip
    assert len({cache.content_hash(*part) for part in parts}) == len(parts)
    assert cache.content_hash(torch.tensor([1.0]).bfloat16()) != cache.content_hash(
        torch.tensor([1.0]).half()
    )


@pytest.mark.parametrize(
    "wrong", [{1, 2}, object(), np.array(["text"]), {"a": object()}, [torch.ones(2)]]
)
def test_content_hash_refuses_what_has_no_exact_text(wrong):
    with pytest.raises(TypeError):
        cache.content_hash(wrong)


@pytest.mark.parametrize("wrong", [float("nan"), {"a": [float("inf")]}])
def test_content_hash_refuses_numbers_that_are_not_finite(wrong):
    with pytest.raises(ValueError, match="finite"):
        cache.content_hash(wrong)


# --- sizes ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**45),
    st.sampled_from(["B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]),
    st.sampled_from(["", " "]),
)
def test_parse_size_is_number_times_unit(number, unit, gap):
    power = ["B", "K", "M", "G", "T"].index(unit[0].upper())
    base = 1024 if "i" in unit else 1000
    assert cache.parse_size(f"{number}{gap}{unit}") == number * base**power
    assert cache.parse_size(f"{number}{gap}{unit}".lower()) == number * base**power


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**50))
def test_format_size_round_trips_to_its_precision(size):
    text = cache.format_size(size)
    assert abs(cache.parse_size(text) - size) <= 0.051 * 1024 ** [
        "B",
        "KiB",
        "MiB",
        "GiB",
        "TiB",
    ].index(text.split()[1])
    assert text.endswith("TiB") or float(text.split()[0]) < 1024


def test_sizes_by_hand():
    assert [cache.parse_size(size) for size in ("2GiB", "1.5 kB", " 7 ", 0)] == [
        2147483648,
        1500,
        7,
        0,
    ]
    assert [cache.format_size(size) for size in (0, 1023, 1024, 1536, 2**31, 1024**2 - 1)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "2 GiB", "1 MiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    ["", "2G", "GiB", "-1", "-1 GiB", "1e9", "1,5 GiB", "nan", "2 GiBs", "٣", True, None, -5],
)
def test_parse_size_refuses(wrong):
    with pytest.raises(ValueError, match="expected a size"):
        cache.parse_size(wrong)


def test_format_size_refuses_negative():
    with pytest.raises(ValueError, match="zero or more"):
        cache.format_size(-1)


# --- the stored values ------------------------------------------------------------------------------------------------


def test_hit_equals_miss_bit_by_bit(own_cache):
    shared = torch.randn(4, 6, requires_grad=True)
    result = {
        "view": shared[:2], "turned": shared.T, "whole": shared, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5),
        "bfloat16": torch.randn(3).bfloat16(), "flag": torch.tensor([True, False]), "odd": torch.arange(3, dtype=torch.uint8),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }  # fmt: skip
    first = cache.cached("features", {"a": 1}, lambda: result)
    second = cache.cached("features", {"a": 1}, never)
    assert set(first) == set(second) == set(result)
    for name in result:
        for value in (first[name], second[name]):
            torch.testing.assert_close(value, result[name].detach(), rtol=0, atol=0, equal_nan=True)
            assert not value.requires_grad and value.is_contiguous()
    torch.testing.assert_close(torch.signbit(second["special"]), torch.signbit(result["special"]))


def test_results_are_copies_of_their_own(own_cache):
    source = torch.zeros(3)
    first = cache.cached("features", {}, lambda: {"x": source})
    first["x"] += 1
    assert source.sum() == 0
    second = cache.cached("features", {}, never)
    second["x"] += 5  # writable, and not the file
    assert cache.cached("features", {}, never)["x"].sum() == 0


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {"a": [1]}, {}])
def test_another_key_is_another_entry(other):
    cache.cached("features", {"a": 1}, lambda: {"x": torch.zeros(1)})
    assert cache.cached("features", other, lambda: {"x": torch.ones(1)})["x"] == 1
    assert cache.cached("features", {"a": 1}, never)["x"] == 0


def test_kind_and_versions_are_part_of_the_question(monkeypatch):
    cache.cached("features", {"a": 1}, lambda: {"x": torch.zeros(1)})
    assert cache.cached("tokens", {"a": 1}, lambda: {"x": torch.ones(1)})["x"] == 1
    monkeypatch.setattr(cache, "__version__", "999")
    assert cache.cached("features", {"a": 1}, lambda: {"x": torch.ones(1)})["x"] == 1


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers", "peft"])
def test_what_another_version_has_stored_is_not_read(package, monkeypatch):
    def stored(number):
        return int(cache.cached("features", {"a": 1}, lambda: {"x": torch.tensor(number)})["x"])

    assert stored(1) == 1
    with monkeypatch.context() as older:
        older.setattr(importlib.import_module(package), "__version__", "0.0.1")
        assert stored(2) == 2
        assert stored(3) == 2, "that version reads its own"
    assert stored(4) == 1, "and back"


def test_versions_are_those_that_are_installed_whether_imported_or_not(monkeypatch):
    before = cache.versions()
    for name in cache.COMPUTING:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cache.versions() == before and {"lpft_nb", "torch", "transformers"} <= set(before)


@pytest.mark.parametrize("kind", ["", "Features", "../up", "a b", "a/b", "1a"])
def test_kind_is_a_plain_word(kind):
    with pytest.raises(ValueError, match="lower-case word"):
        cache.cached(kind, {}, dict)


@pytest.mark.parametrize("result", [None, [1], {"x": 1.0}, torch.ones(2)])
def test_only_dictionaries_of_tensors(result, own_cache):
    with pytest.raises(TypeError, match="dictionary of tensors"):
        cache.cached("features", {}, lambda: result)
    assert not list(own_cache.rglob("*.safetensors"))


def test_an_error_of_the_computation_is_not_swallowed():
    def broken():
        raise OSError("the model file is missing")

    with pytest.raises(OSError, match="model file"):
        cache.cached("features", {}, broken)


# --- damage -----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "empty": lambda data: b"",
    "a few bytes": lambda data: data[:5],
    "half": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "one bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "no safetensors": lambda data: b"<html>not found</html>" * 20,
    "huge header": lambda data: b"\xff" * 8 + data[8:],
    "no checksum": lambda data: safetensors.torch.save(
        safetensors.torch.load(data), {"question": "?"}
    ),
    "no metadata": lambda data: safetensors.torch.save(safetensors.torch.load(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage, own_cache, caplog):
    cache.cached("features", {}, lambda: {"x": torch.arange(5.0)})
    path = entry(own_cache)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING, "lpft_nb"):
        again = cache.cached("features", {}, lambda: {"x": torch.arange(5.0)})
    torch.testing.assert_close(again["x"], torch.arange(5.0))
    assert "computed again" in caplog.text
    torch.testing.assert_close(cache.cached("features", {}, never)["x"], torch.arange(5.0))


def test_the_file_of_another_question_is_not_believed(own_cache, caplog):
    cache.cached("features", {"a": 1}, lambda: {"x": torch.zeros(1)})
    first = entry(own_cache)
    cache.cached("features", {"a": 2}, lambda: {"x": torch.ones(1)})
    (second,) = set(own_cache.rglob("*.safetensors")) - {first}
    second.write_bytes(first.read_bytes())
    assert cache.cached("features", {"a": 2}, lambda: {"x": torch.full((1,), 7.0)})["x"] == 7
    assert "another question" in caplog.text


# --- folders and disks ------------------------------------------------------------------------------------------------


def test_full_disk_costs_one_warning(own_cache, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    for number in range(3):
        assert cache.cached("features", {"a": number}, lambda: {"x": torch.ones(1)})["x"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_a_file_where_the_folder_should_be(own_cache, caplog):
    own_cache.write_text("not a folder")
    for number in range(3):
        assert cache.cached("features", {"a": number}, lambda: {"x": torch.ones(1)})["x"] == 1
    assert 1 <= len(caplog.records) <= 2
    for look in (cache.cache_info, cache.clear_cache):
        with pytest.raises(cache.SettingError, match="expected a folder"):
            look()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_for_reading_only(own_cache, caplog):
    cache.cached("features", {}, lambda: {"x": torch.ones(1)})
    (own_cache / "features").chmod(0o555)
    try:
        assert cache.cached("features", {}, never)["x"] == 1
        assert cache.cached("features", {"a": 1}, lambda: {"x": torch.zeros(1)})["x"] == 0
        assert "nothing can be stored" in caplog.text
    finally:
        (own_cache / "features").chmod(0o755)


def test_an_entry_that_cannot_be_touched_is_still_read(monkeypatch):
    cache.cached("features", {}, lambda: {"x": torch.ones(1)})
    monkeypatch.setattr(
        cache.os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied"))
    )
    assert cache.cached("features", {}, never)["x"] == 1


def test_directory_and_limit_from_the_environment(monkeypatch):
    monkeypatch.setenv("LPFT_CACHE", "~/somewhere")
    assert cache.cache_directory() == cache.Path.home() / "somewhere"
    monkeypatch.setenv("LPFT_CACHE", "")
    assert cache.cache_directory() == cache.Path(cache.platformdirs.user_cache_dir("lpft-nb"))
    assert cache.cache_limit() == 2 * 1024**3
    monkeypatch.setenv("LPFT_CACHE_LIMIT", "much")
    with pytest.raises(ValueError, match="much"):
        cache.cached("features", {}, never)  # before the work, not after it


# --- the limit --------------------------------------------------------------------------------------------------------


def fill(number, size=1000):
    return cache.cached(
        "features", {"number": number}, lambda: {"x": torch.zeros(size, dtype=torch.uint8)}
    )


def numbers_stored(count):
    "Which of the numbers have an entry; looking does not count as a use."
    question = {"kind": "features", "versions": cache.versions()}
    names = {
        number: cache.content_hash(cache.canonical_json(question | {"key": {"number": number}}))
        for number in range(count)
    }
    stored = {path.stem for path in cache.cache_directory().rglob("*.safetensors")}
    return [number for number, name in names.items() if name in stored]


def age(own_cache, seconds):
    for path in own_cache.rglob("*.safetensors"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_least_recently_used_goes_first(own_cache, monkeypatch):
    for number in range(3):
        fill(number)
        age(own_cache, 100)
    size = cache.cache_info()["bytes"]
    fill(0)  # read again: number 1 is now the oldest
    monkeypatch.setenv("LPFT_CACHE_LIMIT", str(size))
    fill(3)
    assert numbers_stored(4) == [0, 2, 3]
    assert cache.cache_info()["bytes"] <= size


@pytest.mark.parametrize("limit", ["0", "500"])
def test_an_entry_above_the_limit_is_not_stored_and_removes_nothing(limit, own_cache, monkeypatch):
    fill(0, size=10)
    monkeypatch.setenv("LPFT_CACHE_LIMIT", limit)
    assert len(fill(1, size=1000)["x"]) == 1000
    assert numbers_stored(2) == [0]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.integers(500, 6000))
def test_the_limit_always_holds(tmp_path_factory, sizes, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPFT_CACHE", str(tmp_path_factory.mktemp("limit")))
        patch.setenv("LPFT_CACHE_LIMIT", str(limit))
        for number, size in enumerate(sizes):
            assert len(fill(number, size)["x"]) == size
            assert cache.cache_info()["bytes"] <= limit


def test_info_and_clear_count_own_files_only(own_cache):
    fill(0)
    cache.cached("tokens", {}, lambda: {"x": torch.zeros(1)})
    foreign = [
        own_cache / "notes.txt",
        own_cache / "features" / "model.safetensors",
        own_cache / "deep" / "er" / ("a" * 64 + ".safetensors"),
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    leftover = own_cache / "features" / ".x.tmp"
    leftover.write_bytes(b"half")
    information = cache.cache_info()
    assert information["entries"] == 2 and {
        kind: row["entries"] for kind, row in information["kinds"].items()
    } == {"features": 1, "tokens": 1}
    assert information["bytes"] == sum(row["bytes"] for row in information["kinds"].values())
    assert cache.clear_cache() == {"entries": 2, "bytes": information["bytes"]}
    assert cache.cache_info()["entries"] == 0
    assert all(path.read_bytes() == b"mine" for path in foreign) and not leftover.exists()


def test_old_leftovers_of_killed_writers_are_removed(own_cache):
    fill(0)
    old, young = own_cache / "features" / ".old.tmp", own_cache / "features" / ".young.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    fill(1)
    assert not old.exists() and young.exists()


# --- several at once --------------------------------------------------------------------------------------------------

WORKER = """
import sys, torch
from lpft_nb.store.cache import cached
for round in range(40):
    for number in range(6):
        got = cached("features", {"number": number}, lambda: {"x": torch.full((500,), float(number))})
        assert got["x"].shape == (500,) and bool((got["x"] == number).all())
"""


def test_processes_that_compute_read_and_evict_at_once(own_cache):
    environment = os.environ | {
        "LPFT_CACHE": str(own_cache),
        "LPFT_CACHE_LIMIT": "7kB",
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], errors
    assert not any("computed again" in error for error in errors)
    assert not list(own_cache.rglob("*.tmp"))


def test_an_entry_removed_between_listing_and_looking(own_cache, monkeypatch):
    fill(0)
    path = entry(own_cache)
    monkeypatch.setattr(cache, "cache_directory", lambda: Vanishing(own_cache, path))
    assert cache._entries() == []


class Vanishing:
    "A folder whose only entry disappears after it was listed."

    def __init__(self, folder, path):
        self.folder, self.path = folder, path

    def glob(self, pattern):
        found = list(self.folder.glob(pattern))
        self.path.unlink(missing_ok=True)
        return found


def test_threads_share_the_cache(own_cache):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(fill(0)["x"].sum().item())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0] * 8


def test_killed_while_writing_leaves_no_entry(own_cache):
    code = """
import os, signal, torch
from lpft_nb.store import cache
cache.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache.cached("features", {}, lambda: {"x": torch.ones(3)})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert cache.cache_info()["entries"] == 0
    assert torch.equal(
        cache.cached("features", {}, lambda: {"x": torch.ones(3)})["x"], torch.ones(3)
    )
