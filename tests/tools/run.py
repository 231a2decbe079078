"""Run all checks: style, unit tests, examples, and the notebooks as of two machines.

python tests/tools/run.py
"""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = ["ruff check", "ruff format --check", "pytest -q -n 2 --dist loadfile"]

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker each of two cores
    for check in CHECKS:
        print("$ python -m", check, flush=True)
        if code := subprocess.run([sys.executable, "-m", *check.split()]).returncode:
            sys.exit(code)
