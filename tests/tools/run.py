"""Run all checks: style, unit tests, examples, and the notebooks as of two machines.

python tests/tools/run.py
"""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = [
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    ["pytest", "-q", "-n", "2", "--dist", "loadfile"],
]


def main() -> int:
    """Run the checks in turn, up to the first that fails, and return its exit code."""
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # a worker each of two cores
    for check in CHECKS:
        print("$ python -m", *check, flush=True)
        code = subprocess.run([sys.executable, "-m", *check], cwd=root, env=env).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
