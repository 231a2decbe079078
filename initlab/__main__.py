"""The command `initlab`, or `python -m initlab`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from initlab import __version__

COMMANDS = {
    "sweep": ("initlab.training.sweep", "run the training experiment, or go on with it"),
    "trace": ("initlab.diagnose.cli", "say what is wrong with the init of a network"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, by default the shell's; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="initlab", description=f"initlab {__version__}")
    parser.add_argument("--version", action="version", version=f"initlab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (module, about) in COMMANDS.items():
        if name in given[:1]:  # its module alone is imported, adds its arguments and sets `func`
            import_module(module).add_command(commands)
        else:
            commands.add_parser(name, help=about)
    args = parser.parse_args(given)
    try:
        status = args.func(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output, as `head` does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # 128 + SIGPIPE, as a shell has it
    return status


if __name__ == "__main__":
    sys.exit(main())
