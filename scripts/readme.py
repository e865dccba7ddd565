"""Make README.md and its figure from the home page of the book, nbs/index.ipynb, and the records in results/.

    .venv/bin/python scripts/readme.py            # prints it
    .venv/bin/python scripts/readme.py --write    # replaces README.md and nbs/_static/accuracy.svg

The home page is executed. Cell tags decide what of a code cell the README shows: its code, unless
`readme-hide-code`; its printed text and Markdown, where `readme-output`; nothing, where `readme-skip`.
"""

import io
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from pybtex.database import BibliographyData, parse_file

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook. -->"
CITATION = re.compile(r"\{cite:[tp]\}`([^`]+)`")
ADMONITION = re.compile(
    r"^(```|:::)\{(note|tip|important|warning|caution)\}\n(.*?)\n\1$", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
TEXT_BLOCK = re.compile(r"^```text\n.*?^```$", re.DOTALL | re.MULTILINE)
FIGURE = ROOT / "nbs" / "_static" / "accuracy.svg"
FIGURE_TASKS = ("docstring-topic", "docstring-kind", "cb", "rte")


def cited(key: str, bibliography: BibliographyData) -> str:
    """Authors and year of one work, as the book's author-year style prints them in running text."""
    entry = bibliography.entries[key]
    names = [" ".join(person.last_names) for person in entry.persons["author"]]
    authors = {1: names[0], 2: " and ".join(names)}.get(len(names), f"{names[0]} et al.")
    return f"{authors} ({entry.fields['year']})"


def quoted(match: re.Match) -> str:
    """A MyST admonition in GitHub's form."""
    lines = [f"[!{match.group(2).upper()}]", *match.group(3).splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in lines)


FIGURE_BLOCK = re.compile(
    r"^```\{figure\} (\S+)\n:alt: (.+)\n\n(.+?)\n```$", re.MULTILINE | re.DOTALL
)


def pictured(match: re.Match) -> str:
    """A MyST figure as a picture with its caption below."""
    path, alternative, caption = match.groups()
    return f"![{alternative}]({path})\n\n*{caption}*"


def link_from_root(match: re.Match) -> str:
    """A link written in nbs/, as it reads one folder higher."""
    target = match.group(1)
    return f"]({target.removeprefix('../')})" if target.startswith("../") else f"](nbs/{target})"


def markdown_text(source: str, bibliography: BibliographyData) -> str:
    """A prose cell in GitHub's Markdown."""
    source = CITATION.sub(
        lambda match: ", ".join(
            cited(key.strip(), bibliography) for key in match.group(1).split(",")
        ),
        source,
    )
    return LINK.sub(link_from_root, ADMONITION.sub(quoted, FIGURE_BLOCK.sub(pictured, source)))


def code_text(cell: dict) -> str:
    """A code cell and its output, as far as its tags show them."""
    tags = cell.metadata.get("tags", [])
    if "readme-skip" in tags:
        return ""
    parts = [] if "readme-hide-code" in tags else [f"```python\n{cell.source}\n```"]
    if "readme-output" in tags:
        printed = "".join(
            output.text
            for output in cell.outputs
            if output.output_type == "stream" and output.name == "stdout"
        )
        if printed.strip():
            lines = "\n".join(line.rstrip() for line in printed.rstrip().splitlines())
            parts.append(f"```text\n{lines}\n```")
        parts += [
            output.data["text/markdown"]
            for output in cell.outputs
            if "text/markdown" in output.get("data", {})
        ]
    return "\n\n".join(parts)


def convert(notebook: nbformat.NotebookNode, bibliography: BibliographyData) -> str:
    """The README of an executed home page."""
    texts = [
        code_text(cell) if cell.cell_type == "code" else markdown_text(cell.source, bibliography)
        for cell in notebook.cells
    ]
    return "\n\n".join([NOTE, *(text.strip() for text in texts if text.strip())]) + "\n"


def read_home() -> nbformat.NotebookNode:
    """The home page as it stands, without outputs."""
    return nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)


def make_readme(executed: nbformat.NotebookNode) -> str:
    """The README of a home page with its outputs."""
    return convert(executed, parse_file(str(ROOT / "references.bib")))


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The home page with its outputs."""
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "nbs")}},
    )
    return client.execute()


def figure_rows():
    """The test accuracies that the figure shows: one row a run, in the order of tasks and methods."""
    from lpft_nb.plot import METHODS
    from lpft_nb.records import load_results

    rows = load_results(ROOT / "results" / "grids" / "paper_a" / "lp_ft").query(
        "final and status == 'finished' and split == 'test' and metric == 'accuracy'"
    )
    rows = rows[rows["task"].isin(FIGURE_TASKS) & rows["method"].isin(METHODS)]
    rows = rows[rows["model"].str.endswith("all-MiniLM-L6-v2")]
    place = {name: number for number, name in enumerate([*FIGURE_TASKS, *METHODS])}
    return rows.sort_values(
        ["task", "method", "seed"],
        key=lambda column: column.map(place) if column.name != "seed" else column,
    )


def figure_numbers(rows) -> str:
    """What the figure shows, in words; it stands inside the figure, so that a test can tell whether it is current."""
    groups = rows.groupby(["task", "method"], sort=False)["value"]
    return "; ".join(
        f"{task} {method} {' '.join(f'{value:.4f}' for value in values)}"
        for (task, method), values in groups
    )


def make_figure() -> str:
    """The figure of the home page as SVG: test accuracy by task and method, from the published records."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lpft_nb.plot import dots_with_intervals, use_style

    rows, target = figure_rows(), io.StringIO()
    use_style()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(7.5, 3))
        dots_with_intervals(rows, by="task", axes=axes, ylabel="test accuracy")
        figure.savefig(
            target,
            format="svg",
            metadata={"Date": None, "Creator": None, "Description": figure_numbers(rows)},
        )
        plt.close(figure)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def without_measured_numbers(text: str) -> str:
    """The text with each number inside a printed block replaced: those may differ a little between machines."""
    return TEXT_BLOCK.sub(lambda match: re.sub(r" *\d+(\.\d+)?", " 0", match.group()), text)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        FIGURE.write_text(make_figure(), encoding="utf-8")
        (ROOT / "README.md").write_text(make_readme(execute(read_home())), encoding="utf-8")
    else:
        print(make_readme(execute(read_home())), end="")
