"""Build the book, with the newest local run in it.

    .venv/bin/python scripts/book.py                          # _build/html/index.html
    .venv/bin/python scripts/book.py --output DIR --clean --no-run   # what the tests build
    .venv/bin/python scripts/book.py --jobs 1                 # one chapter after the other

`jupyter-book build .` builds the same book without a local run, one chapter after the other: that command has no
`--jobs`, the function behind it has. It is called in a process of its own, with one thread for each kernel: kernels
that share two cores and use two threads each wait for one another, ten times as long as the work takes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RUN_PAGE = "nbs/_runs/your_run"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
KERNEL_NOTE = "[IPKernelApp] WARNING | Kernel is running over TCP without encryption"  # each start says so; kernels listen on 127.0.0.1

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def failed(notebook: dict) -> bool:
    """Whether a cell of an executed notebook ended in an error."""
    return any(
        output["output_type"] == "error"
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
    )


def newest_run(folder: Path) -> Path | None:
    """The executed notebook that was written last and came through; None when there is none."""
    for path in sorted(
        folder.glob("**/*.ipynb"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        if not failed(json.loads(path.read_text(encoding="utf-8"))):
            return path
    return None


def run_page(notebook: dict, source: str) -> dict:
    """The page of a run: the executed notebook, with its origin named under the title and no papermill metadata."""
    note = {
        "cell_type": "markdown",
        "id": "your-run-note",
        "metadata": {},
        "source": f"```{{note}}\nThis page is the notebook `{source}` as your machine executed it.\n```",
    }
    cells = [
        {
            **cell,
            "metadata": {
                key: value for key, value in cell["metadata"].items() if key != "papermill"
            },
        }
        for cell in notebook["cells"]
    ]
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "papermill"}
    return {**notebook, "metadata": metadata, "cells": [cells[0], note, *cells[1:]]}


def with_run(toc: dict) -> dict:
    """The table of contents with the page of the local run at its end."""
    return {
        **toc,
        "parts": [
            *toc["parts"],
            {"caption": "On your machine", "chapters": [{"file": RUN_PAGE, "title": "Your run"}]},
        ],
    }


def prepare(project: Path, build: Path, include_run: bool) -> Path:
    """Write the page of the newest run, when wanted and there is one; return the table of contents to build with."""
    page = project / f"{RUN_PAGE}.ipynb"
    shutil.rmtree(page.parent, ignore_errors=True)
    run = newest_run(project / "runs") if include_run else None
    if run is None:
        return project / "_toc.yml"
    page.parent.mkdir(parents=True)
    notebook = json.loads(run.read_text(encoding="utf-8"))
    page.write_text(
        json.dumps(run_page(notebook, run.relative_to(project).as_posix())), encoding="utf-8"
    )
    toc = build / "toc.yml"
    toc.parent.mkdir(parents=True, exist_ok=True)
    toc.write_text(
        yaml.safe_dump(
            with_run(yaml.safe_load((project / "_toc.yml").read_text(encoding="utf-8")))
        ),
        encoding="utf-8",
    )
    return toc


def run_logged(command: list[str], folder: Path, log: Path) -> int:
    """Run a command, show its lines as they come, keep them without colours in `log`; return its exit status."""
    environment = {**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        for line in process.stdout:
            line = COLOUR.sub("", line)
            if KERNEL_NOTE not in line:
                print(line, end="", flush=True)
                kept.write(line)
    return process.returncode


def render(project: str, html: str, toc: str, jobs: str) -> int:
    """What `jupyter-book build -n -W --keep-going` does, with `jobs` processes; returns the exit status."""
    from jupyter_book.sphinx import build_sphinx

    status = build_sphinx(
        project,
        html,
        noconfig=True,
        path_config=str(Path(project) / "_config.yml"),
        confoverrides={
            "external_toc_path": toc,
            "latex_individualpages": False,
            "nitpicky": True,
        },
        warningiserror=True,
        keep_going=True,
        jobs=int(jobs),
    )
    return status if isinstance(status, int) else 1


def seconds_table(seconds: dict) -> str:
    """The seconds of every chapter, longest first, and their sum."""
    rows = sorted(seconds.items(), key=lambda item: -item[1]["wall"])
    total = {kind: sum(row[kind] for row in seconds.values()) for kind in ("wall", "cpu")}
    lines = [
        f"{row['wall']:8.1f} {row['cpu']:8.1f}  {page}"
        for page, row in (*rows, (f"{len(rows)} chapters together", total))
    ]
    return "\n".join(["seconds      CPU  chapter", *lines, ""])


def build_book(project: Path, output: Path, include_run: bool = True, jobs: int = 2) -> int:
    """Build into output/_build/html, warnings are errors; beside it book.log, seconds.json, and the exit status in `status`."""
    build = output / "_build"
    build.mkdir(parents=True, exist_ok=True)
    (build / "status").unlink(missing_ok=True)
    toc = prepare(project, build, include_run)
    call = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import book; sys.exit(book.render(*sys.argv[1:]))"
    command = [sys.executable, "-c", call, *map(str, (project, build / "html", toc, jobs))]
    started = time.perf_counter()
    status = run_logged(command, project, build / "book.log")
    (build / "status").write_text(f"{status}\n", encoding="utf-8")
    if (build / "seconds.json").is_file():
        report = seconds_table(json.loads((build / "seconds.json").read_text(encoding="utf-8")))
        report += f"built in {time.perf_counter() - started:.0f} s by {jobs} processes\n"
        print(report, end="")
        with (build / "book.log").open("a", encoding="utf-8") as log:
            log.write(report)
    return status


def empty(build: Path) -> None:
    """Remove an earlier build; the seconds of its chapters stay, they tell which to begin with."""
    seconds = build / "seconds.json"
    known = seconds.read_bytes() if seconds.is_file() else b"{}"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    seconds.write_bytes(known)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT,
        help="folder that receives _build/ (default: the project)",
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="remove an earlier build first, executed notebooks included",
    )
    parser.add_argument("--no-run", action="store_true", help="leave the newest local run out")
    parser.add_argument("--jobs", type=int, default=2, help="chapters executed side by side")
    options = parser.parse_args()
    output = options.output.resolve()
    if options.clean:
        empty(output / "_build")
    return build_book(ROOT, output, include_run=not options.no_run, jobs=options.jobs)


if __name__ == "__main__":
    sys.exit(main())
