"""Sphinx extension of this book: hide nbdev's directives, load nothing from another host."""

import json
import os
import re

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


def setup(app):
    """Connect both steps and set what the kernels inherit; pages may be read and written in parallel."""
    os.environ["PYTHONWARNINGS"] = ",".join(
        filter(None, [os.environ.get("PYTHONWARNINGS"), NO_WIDGETS])
    )
    app.connect("source-read", prepare_source)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
