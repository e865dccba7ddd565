"""Surroundings: versions, commit and hardware, without anybody's name; git is asked once."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from lpft_nb.store import surroundings


def test_environment_names_no_host_user_or_folder():
    text = json.dumps(surroundings.environment(), allow_nan=False)
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert len(private) < 4 or private not in text
    assert surroundings.environment()["versions"][
        "torch"
    ] == torch.__version__ or torch.__version__.startswith(
        surroundings.environment()["versions"]["torch"]
    )
    assert surroundings.environment()["hardware"]["logical_cores"] == os.cpu_count()


def test_without_git_there_is_no_commit(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    assert surroundings._commit_of(Path(surroundings.__file__).parent) is None
    assert capfd.readouterr() == ("", "")


def test_commit_of_the_checkout_and_its_changes(tmp_path):
    package = tmp_path / "lpft_nb"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert surroundings._commit_of(package) is None  # no checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "empty"], check=True)
    assert surroundings._commit_of(package) is None  # a checkout, but the package is not part of it
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "all"], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert surroundings._commit_of(package) == head
    (package / "__init__.py").write_text("changed = 1")
    assert surroundings._commit_of(package) == head + "-dirty"


def test_git_is_asked_once_a_process(monkeypatch):
    asked = []
    monkeypatch.setattr(surroundings.subprocess, "run", lambda *given, **named: asked.append(given))
    surroundings._git_commit.cache_clear()
    try:
        monkeypatch.setattr(surroundings, "_commit_of", lambda folder: asked.append(folder) or "c0")
        found = [surroundings.environment()["git_commit"] for _ in range(5)]
    finally:
        surroundings._git_commit.cache_clear()
    assert found == ["c0"] * 5 and len(asked) == 1


def test_an_environment_is_the_callers_own():
    first = surroundings.environment()
    first["versions"].clear()
    assert surroundings.environment()["versions"]
