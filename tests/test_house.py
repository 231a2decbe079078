"""The rooms of initlab: who imports whom, what and when, and that none needs what only Unix has."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import initlab
from initlab.__main__ import main

PACKAGE = Path(initlab.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# What a module of one layer imports
LIGHT = {"initlab", "numpy", "torch", "tqdm"} | sys.stdlib_module_names
WHERE_ROOMS_MEET = {"initlab", "initlab.__main__"}
ONE_LAYER = {name for name, path in MODULES.items() if path.parent == PACKAGE} - WHERE_ROOMS_MEET
SHOWN_WITH = {"initlab.show": {"IPython", "PIL", "matplotlib", "pandas"}}


def imported(name):
    """Return what a module imports, anywhere: names of modules, and of what may be one."""
    found = set()
    for statement in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf8"))):
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


@pytest.mark.parametrize("name", sorted(ONE_LAYER))
def test_one_layer_is_light_and_knows_no_room(name):
    assert used(name) <= (set() if name in SHOWN_WITH else ONE_LAYER)
    packages = {what.partition(".")[0] for what in imported(name)}
    assert packages <= LIGHT | SHOWN_WITH.get(name, set())


def test_public_names():
    assert {"predict", "draw", "trace", "fit", "load_fashion"} <= set(initlab.__all__)
    assert set(initlab.__all__) <= set(dir(initlab))
    for name in initlab.__all__:
        assert callable(getattr(initlab, name)), name
        # Else an import of the module would put it in place of what has its name
        assert not (PACKAGE / f"{name}.py").exists()
        assert not (PACKAGE / name).exists()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        initlab.nothing  # noqa: B018


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"initlab {initlab.__version__}\n"


# Of Python's own modules those that Windows has not, or only some Unix
MISSING = "crypt curses fcntl grp nis ossaudiodev pty pwd readline resource spwd syslog termios tty"
# A process is half the time of what it tells: so one tells it all
FRESH = """
import importlib, sys
sys.modules |= dict.fromkeys(sys.argv[2].split())

import initlab
assert "torch" not in sys.modules
x = initlab.load_mnist().x_valid[:50]
heavy = {"torchvision", "pandas", "matplotlib", "joblib", "IPython"}
assert not heavy & sys.modules.keys()

# A command imports its own module alone; that the second does, too, is seen from their imports
from initlab.__main__ import COMMANDS, main
for command, loaded in (("trace", ["trace"]), ("sweep", ["sweep", "trace"])):
    try:
        main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
    assert [c for c, (module, _) in COMMANDS.items() if module in sys.modules] == loaded

for name in sys.argv[3:]:
    importlib.import_module(name)
import torch
from initlab import conv_stack, draw, predict, trace
from initlab.training.sweep import Run, sweep
conv = torch.nn.Conv2d(1, 4, 5)
assert predict(x, conv, "default").at().rms > 0 and draw(x, conv, "default", n=2).at().rms > 0
assert len(trace(conv_stack(3, 4), x)) > 0
assert len(sweep([Run(depth=2, width=4, steps=1)], sys.argv[1])) == 1
"""


def test_a_fresh_process_imports_what_it_needs_and_nothing_that_only_unix_has(tmp_path):
    script, path = tmp_path / "fresh.py", tmp_path / "runs.csv"
    script.write_text(FRESH, encoding="utf8")
    command = [sys.executable, script, path, MISSING, *MODULES]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: initlab") == 2
