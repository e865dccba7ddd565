"""Write constraints.txt: the exact version of everything that settings.ini asks for, as installed here.

.venv/bin/python scripts/constraints.py            # prints the file
.venv/bin/python scripts/constraints.py --write    # replaces constraints.txt
"""

import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("offline", "gguf", "book", "sweep", "dev")
BUILD = ("setuptools", "wheel")
LEFT_OUT = ("nvidia-", "cuda-", "triton")  # what torch adds for GPUs: each platform takes its own
OTHER_PYTHONS = {  # what papermill takes on Python 3.12 alone, at the versions that were tried there
    "aiohappyeyeballs": "2.7.1",
    "aiohttp": "3.14.5",
    "aiosignal": "1.4.0",
    "frozenlist": "1.8.0",
    "multidict": "7.2.1",
    "propcache": "0.5.4",
    "yarl": "1.25.1",
}
HEADER = """\
# The exact versions that the tests passed with (Python 3.11). Made by scripts/constraints.py.
# torch stands without a local label: a build for CPU or for CUDA satisfies it alike.
"""


def read_settings(path: Path = ROOT / "settings.ini") -> dict[str, str]:
    """The one section of settings.ini."""
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(path, encoding="utf-8")
    return dict(parser["DEFAULT"])


def declared(settings: dict[str, str]) -> list[Requirement]:
    """Every requirement that settings.ini names, of the core and of each extra."""
    keys = ["requirements", *(f"{extra}_requirements" for extra in EXTRAS)]
    return [Requirement(word) for key in keys for word in settings[key].split()]


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Name and installed version of these requirements and of all that they require in turn."""
    versions, todo, seen = {}, [(requirement, "") for requirement in requirements], set()
    while todo:
        requirement, asked_by = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen or key[0].startswith(LEFT_OUT):
            continue
        seen.add(key)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError as error:
            raise SystemExit(
                f"{requirement} is not installed{asked_by}: install -e .[offline,gguf,book,sweep,dev] first"
            ) from error
        versions[key[0]] = Version(found.version).public
        for text in found.requires or ():
            needed = Requirement(text)
            contexts = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(
                needed.marker.evaluate(context) for context in contexts
            ):
                todo.append((needed, f" (wanted by {requirement.name})"))
    return versions


def constraints_text() -> str:
    """The content of constraints.txt for this environment."""
    versions = OTHER_PYTHONS | closure(
        declared(read_settings()) + [Requirement(name) for name in BUILD]
    )
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        (ROOT / "constraints.txt").write_text(constraints_text(), encoding="utf-8")
    else:
        print(constraints_text(), end="")
