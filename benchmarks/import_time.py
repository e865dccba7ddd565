"""How long `import lpft_nb` takes beyond `import transformers`: medians over fresh processes, one after the other.

.venv/bin/python benchmarks/import_time.py [repeats]
"""

import json
import statistics
import subprocess
import sys

BASE = "import transformers; from transformers import PreTrainedModel"
CASES = {
    "transformers alone": "",
    "lpft_nb": "import lpft_nb",
    "lpft_nb.stages, .tasks, .records": "import lpft_nb.stages, lpft_nb.tasks, lpft_nb.records",
}
PROGRAM = """
import time
{base}
start = time.perf_counter()
{case}
print(time.perf_counter() - start)
"""


def seconds(case: str) -> float:
    """Seconds of the imports of one case in a fresh process, transformers being there already."""
    program = PROGRAM.format(base=BASE, case=case)
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
                name: round(statistics.median(seconds(case) for _ in range(repeats)), 3)
                for name, case in CASES.items()
            },
            indent=1,
        )
    )
