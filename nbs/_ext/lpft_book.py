"""Sphinx extension of this book: hide nbdev's directives, load nothing from another host, execute chapters side by side."""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import warm_python

# Kernels inherit this. tqdm asks for ipywidgets at import; pages show no bars, and widgets would load scripts from elsewhere.
NO_WIDGETS = "ignore:IProgress not found"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(\w+)?")
WORKSHOP = "nbs/13_how_this_book_is_made"  # this page and those nested under it are for maintainers
WORKSHOP_NOTE = """```{admonition} From the workshop
:class: note workshop
This page is for those who maintain the package. A reader of the book may skip it.
```"""
OPENING = re.compile(r"\A\s*# .+\n(?:\s*\n)*(?:>.*(?:\n|\Z))*")  # title and subtitle


def shown_cell(cell: dict) -> dict | None:
    """A cell as the book shows it: nbdev's `#|` lines go; `hide` runs unseen; nothing left, no cell."""
    if cell["cell_type"] != "code":
        return cell
    lines = "".join(cell["source"]).splitlines(keepends=True)
    marks = {match.group(1) for match in map(DIRECTIVE.match, lines) if match}
    code = "".join(line for line in lines if not DIRECTIVE.match(line)).strip("\n")
    if marks and not code:
        return None
    metadata = cell["metadata"]
    if "hide" in marks:
        metadata = {**metadata, "tags": [*metadata.get("tags", []), "remove-cell"]}
    return {**cell, "source": code, "metadata": metadata}


def without_directives(notebook: dict) -> dict:
    """The notebook without nbdev's directives; every cell with code in it is still executed."""
    cells = [shown_cell(cell) for cell in notebook["cells"]]
    return {**notebook, "cells": [cell for cell in cells if cell is not None]}


def nested_pages(site_map, docname: str) -> set[str]:
    """A page of the table of contents and all pages nested under it."""
    page = site_map.get(docname)
    below = page.child_files() if page else []
    return {docname}.union(*(nested_pages(site_map, child) for child in below))


def with_workshop_note(text: str) -> str:
    """The text of a page with the note under its title and subtitle."""
    opening = OPENING.match(text)
    if opening is None:
        raise ValueError(f"a page must open with a line '# title', not with {text[:60]!r}")
    return f"{opening.group().rstrip()}\n\n{WORKSHOP_NOTE}\n\n{text[opening.end() :].lstrip()}"


def prepare_source(app, docname, source):
    """On `source-read`: notebooks lose nbdev's directives, pages of the workshop say what they are."""
    is_workshop = docname in nested_pages(app.config.external_site_map, WORKSHOP)
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        source[0] = with_workshop_note(source[0]) if is_workshop else source[0]
        return
    notebook = without_directives(json.loads(source[0]))
    if is_workshop:
        first = notebook["cells"][0]
        first["source"] = with_workshop_note("".join(first["source"]))
    source[0] = json.dumps(notebook)


def is_thebe(script) -> bool:
    """Whether a script of the page belongs to thebe, which this book does not offer."""
    body = getattr(script, "attributes", {}).get("body") or ""
    return (
        "thebe" in str(getattr(script, "filename", script) or "").lower() or "THEBE_JS_URL" in body
    )


def drop_thebe(app, pagename, templatename, context, doctree):
    """On `html-page-context`: without thebe's scripts no page names a content delivery network."""
    context["script_files"] = [
        script for script in context.get("script_files", []) if not is_thebe(script)
    ]


EMPTY_HEADER = re.compile(r"<th\b([^>]*)>(?:\s|&nbsp;|&#160;|</?p>)*</th>")
HIDDEN_NAME = re.compile(r'(<summary\b[^>]*?) aria-label="Toggle hidden content"')


def mend_accessibility(app, pagename, templatename, context, doctree):
    """On `html-page-context`: a fold is named by the words it shows, a table's empty corner is no header."""
    if "body" in context:
        body = HIDDEN_NAME.sub(r"\1", context["body"])
        context["body"] = EMPTY_HEADER.sub(r"<td\1></td>", body)


# --- several processes: Sphinx forks readers, and each reader executes its chapters in a kernel

# These three do not say that they may be read in parallel (they may), and one silent extension makes Sphinx serial.
SILENT = ("sphinx-mathjax-offline", "sphinx_multitoc_numbering", "sphinx_jupyterbook_latex")


def seconds_file(app) -> Path:
    """Where the seconds of each chapter stand: {page: {"wall": seconds, "cpu": seconds}}."""
    return Path(app.outdir).parent / "seconds.json"


def read_seconds(path: Path) -> dict:
    """The seconds that an earlier build left, none where there was no build."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def longest_first(pages: list[str], processes: int, seconds: dict) -> list[list[str]]:
    """One page a chunk, in the order that makes Sphinx begin with the longest; unknown pages count as long.

    Sphinx starts the first `processes` chunks as they come and takes the others from the end of its list.
    """
    known = {page: value["wall"] for page, value in seconds.items()}
    ordered = sorted(pages, key=lambda page: -known.get(page, float("inf")))
    return [[page] for page in (*ordered[:processes], *reversed(ordered[processes:]))]


def allow_processes(app):
    """On `builder-inited`: lift what keeps Sphinx serial, and give it one page at a time instead of a few fixed chunks."""
    from jupyter_cache import get_cache
    from jupyter_cache.cache.db import NbCacheRecord
    from sphinx import builders

    for name in SILENT:
        if name in app.extensions:
            app.extensions[name].parallel_read_safe = True
    # Two readers that create the tables of one database at the same time fail: create them here.
    get_cache(app.env.mystnb_config.execution_cache_path).db
    # Looking for the oldest entries it asks twice, and removes what another reader has added in between.
    NbCacheRecord.records_to_delete = staticmethod(lambda keep, db: [])
    known = read_seconds(seconds_file(app))
    builders.make_chunks = lambda pages, processes: longest_first(pages, processes, known)


def start_kernels(app):
    """On `builder-inited`: let `python3` mean a kernel that has imported what chapters import, where processes can be forked."""
    if not hasattr(os, "fork"):
        return
    app.lpft_kernels = Path(tempfile.mkdtemp(prefix="lpft-kernels-"))
    app.lpft_server, python = warm_python.offer(app.lpft_kernels, warm_python.COMMON)
    place = app.lpft_kernels / "kernels" / "python3"
    place.mkdir(parents=True)
    description = json.dumps(warm_python.kernel(app.lpft_server, python))
    (place / "kernel.json").write_text(description, encoding="utf-8")
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(app.lpft_kernels), before]))


def end_kernels(app, exception):
    """On `build-finished`: the process that forks kernels ends with its standard input."""
    if hasattr(app, "lpft_server"):
        app.lpft_server.communicate()
        shutil.rmtree(app.lpft_kernels)


def cpu_file(app) -> Path:
    """Where the kernel of the page that is being read leaves its CPU seconds."""
    return Path(app.outdir).parent / f"cpu-{os.getpid()}"


def start_clock(app, docname, source):
    """On `source-read`: name the file for this page's kernel."""
    cpu_file(app).unlink(missing_ok=True)
    os.environ[warm_python.CPU_FILE] = str(cpu_file(app))


def stop_clock(app, doctree):
    """On `doctree-read`: keep the CPU seconds of this page's kernel; one that did not end by itself has left none."""
    path = cpu_file(app)
    app.env.metadata[app.env.docname]["cpu"] = float(path.read_text()) if path.is_file() else 0.0
    path.unlink(missing_ok=True)


def write_seconds(app, exception):
    """On `build-finished`: write the seconds of each executed chapter; a page from the cache keeps those it has."""
    from myst_nb.sphinx_ import NbMetadataCollector

    path = seconds_file(app)
    seconds = read_seconds(path)
    for page in app.env.found_docs:
        wall = (NbMetadataCollector.get_exec_data(app.env, page) or {}).get("runtime")
        cpu = app.env.metadata[page].get("cpu", 0.0)
        if wall is not None and (cpu or page not in seconds):
            seconds[page] = {"wall": round(wall, 1), "cpu": round(cpu, 1)}
    kept = {page: seconds[page] for page in sorted(seconds) if page in app.env.found_docs}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def setup(app):
    """Connect the steps and set what the kernels inherit; pages may be read and written in parallel."""
    os.environ["PYTHONWARNINGS"] = ",".join(
        filter(None, [os.environ.get("PYTHONWARNINGS"), NO_WIDGETS])
    )
    app.connect("source-read", prepare_source)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", mend_accessibility, priority=900)
    app.connect("builder-inited", allow_processes, priority=900)
    app.connect("builder-inited", start_kernels)
    app.connect("build-finished", end_kernels)
    app.connect("source-read", start_clock)
    app.connect("doctree-read", stop_clock)
    app.connect("build-finished", write_seconds)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
