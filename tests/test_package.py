"""What imports what: no cycles, no room that needs another, nothing heavy before it is needed."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import initlab
from initlab.__main__ import COMMANDS, main

PACKAGE = Path(initlab.__file__).parent
LAYER = {"mnist", "init", "moments", "patches", "prediction", "draws", "show"}
LIGHT = {"torch", "numpy", "tqdm", "initlab", *sys.stdlib_module_names}


def imported(path):
    """Return the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules():
    """Return what each module of the rooms imports of the others, by name."""
    paths = {f"initlab.{name}": PACKAGE / f"{name}.py" for name in LAYER}
    for room in ("diagnose", "training"):
        paths |= {f"initlab.{room}.{path.stem}": path for path in (PACKAGE / room).glob("*.py")}
    return {name: imported(path) & paths.keys() for name, path in paths.items()}


def test_no_cycles():
    graph = modules()
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph) >= len(LAYER)


def test_rooms():
    for name, others in modules().items():
        room = name.split(".")[1]
        assert not (room == "diagnose" and any(".training" in other for other in others)), name
        assert not (room == "training" and any(".diagnose" in other for other in others)), name
        if room in LAYER:
            assert all(other.split(".")[1] in LAYER for other in others), name
    assert not modules()["initlab.show"]


@pytest.mark.parametrize("name", sorted(LAYER - {"show"}))
def test_one_layer_needs_torch_numpy_and_tqdm_alone(name):
    assert {module.split(".")[0] for module in imported(PACKAGE / f"{name}.py")} <= LIGHT


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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_its_own_module_alone(command):
    code = (
        "import sys; from initlab.__main__ import COMMANDS, main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as ended: code = ended.code\n"
        "print('imported', code, *(c for c, (m, _) in COMMANDS.items() if m in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    told = subprocess.check_output(
        [sys.executable, "-c", code, command], text=True, env=environment, encoding="utf8"
    )
    assert told.splitlines()[-1] == f"imported 0 {command}"
