"""Nothing that belongs to one machine, no secret, no build output lies in the repository."""

import re
from pathlib import Path

from repository import ROOT, name_of, repository_files

MACHINE = re.compile(
    r"(?<![\w./])(?:/home/(?!somebody|a\b)\w+|/Users/\w+|/root/|/work/|/workspace/|[A-Z]:\\Users)|file:///(?:home|root|work|Users)"
)
SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|xox[bap]-\w{10,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
ADDRESS = re.compile(
    r"https?://(?:[^/\s:@]+:[^/\s@]+@|(?:\d{1,3}\.){3}\d{1,3}|[\w.-]+\.(?:internal|local|lan|corp)\b)"
)


def test_nothing_belongs_to_one_machine_and_no_secret_lies_about():
    found = []
    for path in repository_files():
        if path.suffix in {".parquet", ".safetensors", ".png"} or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        for pattern in (MACHINE, SECRET, ADDRESS):
            found += [
                f"{name_of(path)}: {match.group()}"
                for match in pattern.finditer(text)
                if "127.0.0.1" not in match.group()
            ]
    assert not found


def test_repository_is_small_and_holds_no_build_output():
    for path in repository_files():
        assert path.stat().st_size <= 2_000_000, f"{name_of(path)} is {path.stat().st_size} bytes"
        assert not {"_build", "runs", "_notebooks", ".venv"} & set(
            path.relative_to(ROOT).parts[:-1]
        ), name_of(path)
