"""The rendered book that several test files look at: built once, from an empty cache."""

import fcntl
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def nested_pages(chapters: list[dict]) -> list[str]:
    """The pages of a list of chapters in reading order, each followed by the pages nested under it."""
    return [
        page
        for chapter in chapters
        for page in (chapter["file"], *nested_pages(chapter.get("sections", [])))
    ]


def toc_parts() -> dict[str, list[str]]:
    """The pages of each part of the book, by its caption in _toc.yml."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return {part["caption"]: nested_pages(part["chapters"]) for part in toc["parts"]}


def toc_pages() -> list[str]:
    """The pages of the book, as _toc.yml names them, home page first."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"], *(page for pages in toc_parts().values() for page in pages)]


@dataclass(frozen=True)
class Book:
    """A build of the book: `folder` holds html/, book.log, status and the executed notebooks."""

    folder: Path

    @property
    def html(self) -> Path:
        """The folder of the rendered pages."""
        return self.folder / "html"

    @property
    def status(self) -> int:
        """The exit status of the build, in which warnings are errors."""
        return int((self.folder / "status").read_text())

    @property
    def log(self) -> str:
        """What the build printed."""
        return (self.folder / "book.log").read_text(encoding="utf-8")

    def failure(self, page: str) -> str | None:
        """The failing cell of a page and its traceback, None when all its cells came through."""
        report = self.html / "reports" / f"{page}.err.log"
        return COLOUR.sub("", report.read_text(encoding="utf-8")) if report.is_file() else None

    @cached_property
    def seconds(self) -> dict[str, dict[str, float]]:
        """The seconds of each executed page: on the wall, and of CPU."""
        return json.loads((self.folder / "seconds.json").read_text(encoding="utf-8"))

    @cached_property
    def executed(self) -> dict:
        """Each page that was executed to its end, with its outputs."""
        from jupyter_cache import get_cache

        cache = get_cache(str(self.folder / ".jupyter_cache"))
        records = cache.list_cache_records()
        return {
            f"nbs/{Path(record.uri).stem}": cache.get_cache_bundle(record.pk).nb
            for record in records
        }


def build_once(output: Path) -> None:
    """Build the book for this test run; where two workers ask at once, the second waits for the first's."""
    run, stamp = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())), output / "built_for"
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.is_file() or stamp.read_text() != run:
            command = [sys.executable, "scripts/book.py", "--output", str(output)]
            subprocess.run([*command, "--clean", "--no-run"], cwd=ROOT, capture_output=True)
            stamp.write_text(run)


@lru_cache
def built_book() -> Book:
    """The build in the folder that LPFT_BOOK names (`make test` makes it), else a new one in _build/test."""
    pytest.importorskip("jupyter_book", reason="the extra `book` is not installed")
    named = os.environ.get("LPFT_BOOK")
    output = ROOT / (named or "_build/test")
    if not named:
        build_once(output)
    book = Book(output / "_build")
    assert (book.folder / "status").is_file(), f"no book was built in {output}; try: make book"
    return book
