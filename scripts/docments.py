"""How many public arguments say in a comment what they are: a debt that only shrinks.

.venv/bin/python scripts/docments.py            # the arguments without a comment, module by module
.venv/bin/python scripts/docments.py --write    # lowers the figures in tests/project/docments.json, raises none
"""

import ast
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEBT = ROOT / "tests" / "project" / "docments.json"


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """The functions and methods whose own name and whose class's name do not begin with `_`."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def arguments_of(function: ast.FunctionDef) -> list[ast.arg]:
    """The arguments of a function in their order, without `self` and `cls`."""
    given = function.args
    several = [given.vararg, given.kwarg]
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, several)]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def commented_lines(text: str) -> dict[int, bool]:
    """The lines that hold a comment, and whether it stands alone."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return {token.start[0]: not token.line[: token.start[1]].strip() for token in comments}


def undocumented(text: str) -> tuple[list[str], int]:
    """The public arguments of a module without a comment behind or above them, and how many there are in all."""
    comments, missing, number = commented_lines(text), [], 0
    for function in public_functions(ast.parse(text).body):
        for argument in arguments_of(function):
            number += 1
            behind = {argument.lineno, argument.end_lineno} & set(comments)
            if not behind and not comments.get(argument.lineno - 1, False):
                missing.append(f"{function.name}({argument.arg})")
    return missing, number


def survey() -> dict[str, tuple[list[str], int]]:
    """`undocumented` for every module of the package, by its dotted name."""
    paths = [path for path in (ROOT / "lpft_nb").rglob("*.py") if path.name != "_modidx.py"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name: undocumented(names[name].read_text(encoding="utf-8")) for name in sorted(names)}


def lowered(debt: dict[str, int], found: dict[str, tuple[list[str], int]]) -> dict[str, int]:
    """The debt where arguments have got their comment since: no figure rises, a module without debt goes."""
    now = {name: min(owed, len(found.get(name, ([], 0))[0])) for name, owed in debt.items()}
    return {name: owed for name, owed in sorted(now.items()) if owed}


def main() -> None:
    """Print the survey, or write what has been paid off."""
    found = survey()
    if "--write" in sys.argv[1:]:
        debt = lowered(json.loads(DEBT.read_text(encoding="utf-8")), found)
        DEBT.write_text(json.dumps(debt, indent=2) + "\n", encoding="utf-8")
    for name, (missing, number) in found.items():
        if missing:
            print(f"{number - len(missing):4d} of {number:3d}  {name}: {', '.join(missing)}")
    owed = sum(len(missing) for missing, _ in found.values())
    total = sum(number for _, number in found.values())
    print(f"{total - owed:4d} of {total:3d}  together")


if __name__ == "__main__":
    main()
