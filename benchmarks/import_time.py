"""How long our imports take, by themselves or beyond `import transformers`: medians over fresh processes.

.venv/bin/python benchmarks/import_time.py [repeats]
"""

import json
import statistics
import subprocess
import sys

BASE = "import transformers; from transformers import PreTrainedModel"
CASES = {
    "lpft_nb": ("", "import lpft_nb"),
    "lpft_nb.command_line": ("", "import lpft_nb.command_line"),
    "lpft_nb, after transformers": (BASE, "import lpft_nb"),
    "lpft_nb.stages, .tasks, .records, after transformers": (
        BASE,
        "import lpft_nb.stages, lpft_nb.tasks, lpft_nb.records",
    ),
}
PROGRAM = """
import time
{base}
start = time.perf_counter()
{case}
print(time.perf_counter() - start)
"""


def seconds(base: str, case: str) -> float:
    """Seconds of the imports of one case in a fresh process in which `base` has run."""
    program = PROGRAM.format(base=base, case=case)
    return float(
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout
    )


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(
        json.dumps(
            {
                name: round(statistics.median(seconds(*case) for _ in range(repeats)), 3)
                for name, case in CASES.items()
            },
            indent=1,
        )
    )
