"""Rows and files that the tests of tasks and of the data room share."""

import json
from pathlib import Path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def write_splits(folder: Path, **splits: list[dict]) -> Path:
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def make_rows(number: int, classes: int = 2, start: int = 0) -> list[dict]:
    return [
        {"text": f"sentence number {start + row}", "label": row % classes} for row in range(number)
    ]
