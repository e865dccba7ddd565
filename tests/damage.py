"""What a disk does to a file: a bit that is another, an end that is missing, a file that is empty or gone."""

import random
from collections.abc import Iterator
from pathlib import Path


def damaged(path: Path, bits: int = 40) -> Iterator[str]:
    """Damage a file in one way after another; each is named, and afterwards the file is as it was."""
    data, choose = path.read_bytes(), random.Random(path.name)
    try:
        for place in sorted(choose.sample(range(8 * len(data)), min(bits, 8 * len(data)))):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            yield f"bit {place}"
        for length in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            yield f"cut to {length}"
        path.unlink()
        yield "removed"
    finally:
        path.write_bytes(data)
