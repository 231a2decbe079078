"""Execute the notebooks anew, in clean kernels, and store their outputs and pictures.

    python tests/regenerate.py            all of them
    python tests/regenerate.py 02 04      those whose names begin so

A figure cell tagged `imgs/NAME.png` also becomes that file.
"""

import ast
import base64
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def parameters(source: str) -> dict[str, ast.expr]:
    """Return what `source` assigns, by name: also of `a, b = 1, 2`, each its own."""
    found = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            (target,), value = statement.targets, statement.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple):
                pairs = zip(target.elts, value.elts, strict=True)
            found |= {name.id: expression for name, expression in pairs}
    return found


def changed(path: Path, values: dict[str, str]) -> nbformat.NotebookNode:
    """Read a notebook with other values, source texts by name, in its cell of parameters.

    The cells tagged `stored`, whose claims are about the stored values, are left out. (In Jupyter
    they are run: their other tag lets all cells be run even if they fail.)
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "stored" not in tags(cell)]
    (cell,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    for name, value in values.items():
        found = parameters(cell.source)
        if name not in found:
            raise ValueError(f"{path.name} has no parameter {name}, but {', '.join(found)}")
        old, lines = found[name], cell.source.encode().splitlines(keepends=True)
        before = [*lines[: old.lineno - 1], lines[old.lineno - 1][: old.col_offset]]
        after = [lines[old.end_lineno - 1][old.end_col_offset :], *lines[old.end_lineno :]]
        cell.source = b"".join([*before, value.encode(), *after]).decode()
    return notebook


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Execute `notebook` in a clean kernel that starts in the folder of the notebooks."""
    os.environ["TQDM_DISABLE"] = "1"  # progress bars are not part of an output
    client = NotebookClient(
        notebook,
        timeout=600,
        force_raise_errors=True,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    return client.execute()


def pictures(notebook: nbformat.NotebookNode) -> dict[str, bytes]:
    """Return the figures that also stand under imgs/, by file name, as PNG bytes."""
    found = {}
    for cell in notebook.cells:
        for tag in tags(cell):
            if tag.startswith("imgs/"):
                (png,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.data)
                found[tag.removeprefix("imgs/")] = base64.b64decode(png)
    return found


def main(prefixes: list[str]) -> None:
    """Regenerate the notebooks whose names begin with one of `prefixes`; without any, all."""
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in paths):
            raise SystemExit(f"no notebook's name begins with {prefix}")
    for path in paths:
        if prefixes and not path.name.startswith(tuple(prefixes)):
            continue
        print(path.name, flush=True)
        notebook = run(nbformat.read(path, as_version=4))
        for cell in notebook.cells:
            if "nbval-skip" in tags(cell):
                cell.outputs = []  # a slider needs a kernel: a stored page cannot show it
        # What varies from machine to machine and tells a reader nothing
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, path)
        for name, png in pictures(notebook).items():
            (ROOT / "imgs" / name).write_bytes(png)


if __name__ == "__main__":
    main(sys.argv[1:])
