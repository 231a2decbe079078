"""Run all checks: style, unit tests, examples, notebooks; then the notebooks on another setting.

python tests/run.py
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2"]

OTHER_MACHINE = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",  # two workers with two threads each on two cores
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}

CHECKS = [
    ([sys.executable, "-m", "ruff", "check"], {}),
    ([sys.executable, "-m", "ruff", "format", "--check"], {}),
    (PYTEST, {"OMP_NUM_THREADS": "1"}),
    # The stored outputs must not depend on the number of threads nor on the vector instructions
    ([*PYTEST, "notebooks"], OTHER_MACHINE),
]


def main() -> int:
    """Run the checks in turn, up to the first that fails, and return its exit code."""
    for command, setting in CHECKS:
        print("$", *(f"{key}={value}" for key, value in setting.items()), *command[1:], flush=True)
        code = subprocess.run(command, cwd=ROOT, env=os.environ | setting, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":  # pytest imports this file too, in search of examples
    sys.exit(main())
