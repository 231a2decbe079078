"""The rooms of initlab: who imports whom and what, and that none needs what only Unix has."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "initlab"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What a module of one layer imports
LIGHT = {"initlab", "numpy", "torch", "tqdm"} | sys.stdlib_module_names
ONE_LAYER = [name for name, path in MODULES.items() if path.parent == PACKAGE]
WHERE_ROOMS_MEET = {"initlab", "initlab.__main__"}
SHOWN_WITH = {"initlab.show": {"IPython", "PIL", "matplotlib", "pandas"}}


def imported(name, node=None):
    """Return what a module imports, anywhere: names of modules, and of what may be one."""
    found = set()
    for statement in ast.walk(node or ast.parse(MODULES[name].read_text(encoding="utf8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0, f"{name}: a relative import"
            found |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return found


def used(name):
    """Return the modules of initlab that a module imports."""
    found = {what if what in MODULES else what.rpartition(".")[0] for what in imported(name)}
    return (found & MODULES.keys()) - {name}


def reached(name):
    found, left = set(), {name}
    while left:
        found |= left
        left = {other for module in left for other in used(module)} - found
    return found


def test_no_cycle_of_imports():
    graph = {name: used(name) for name in MODULES}
    graph["initlab"] = MODULES.keys() - WHERE_ROOMS_MEET  # which hands out names of all, lazily
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("rooms", [("diagnose", "training"), ("training", "diagnose")])
def test_diagnosis_and_training_know_nothing_of_each_other(rooms):
    room, other = (f"initlab.{name}" for name in rooms)
    for name in MODULES:
        if name.startswith(room):
            assert [module for module in reached(name) if module.startswith(other)] == []


@pytest.mark.parametrize("name", sorted(set(ONE_LAYER) - WHERE_ROOMS_MEET))
def test_one_layer_is_light_and_knows_no_room(name):
    assert used(name) <= set(ONE_LAYER)
    body = ast.parse(MODULES[name].read_text(encoding="utf8")).body
    at_once = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = {what.partition(".")[0] for node in at_once for what in imported(name, node)}
    assert packages <= LIGHT | SHOWN_WITH.get(name, set())


# Of Python's own modules those that Windows has not, or only some Unix
MISSING = "crypt curses fcntl grp nis ossaudiodev pty pwd readline resource spwd syslog termios tty"
EVERY_ROOM = """
import importlib, sys
sys.modules |= dict.fromkeys(sys.argv[2].split())
for name in sys.argv[3:]:
    importlib.import_module(name)
import torch
from initlab import conv_stack, draw, load_mnist, predict, trace
x, conv = load_mnist().x_valid[:50], torch.nn.Conv2d(1, 4, 5)
assert predict(x, conv, "default").at().rms > 0 and draw(x, conv, "default", n=2).at().rms > 0
assert len(trace(conv_stack(3, 4), x)) > 0
training = sys.modules.get("initlab.training.sweep") or sys.modules["initlab.sweep"]
assert len(training.sweep([training.Run(depth=2, width=4, steps=1)], sys.argv[1])) == 1
"""


def test_every_room_works_without_what_only_unix_has(tmp_path):
    command = [sys.executable, "-c", EVERY_ROOM, str(tmp_path / "runs.csv"), MISSING, *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
