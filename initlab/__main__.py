"""`python -m initlab sweep` and `python -m initlab trace`."""

import argparse
import sys

from initlab import sweep
from initlab.diagnose import cli

parser = argparse.ArgumentParser(prog="python -m initlab")
commands = parser.add_subparsers(required=True)
sweep.add_command(commands)
cli.add_command(commands)

if __name__ == "__main__":
    args = parser.parse_args()
    sys.exit(args.func(args))
