"""Execute the notebooks anew, in clean kernels, and store their outputs and pictures.

    python notebooks/regenerate.py            all of them
    python notebooks/regenerate.py 02 04      those whose names begin so

A figure cell tagged `imgs/NAME.png` also becomes that file.
"""

import base64
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def changed(path: Path, replace: dict[str, str]) -> nbformat.NotebookNode:
    """Read a notebook whose source texts, the keys of `replace`, give way to other ones."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in replace.items():
        cells = [cell for cell in notebook.cells if old in cell.source]
        if len(cells) != 1:
            raise ValueError(f"{path.name}: {old!r} stands in {len(cells)} cells, not in one")
        cells[0].source = cells[0].source.replace(old, new)
    return notebook


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Execute `notebook` in a clean kernel that starts in the folder of the notebooks."""
    os.environ["TQDM_DISABLE"] = "1"  # progress bars are not part of an output
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    )
    return client.execute()


def pictures(notebook: nbformat.NotebookNode) -> dict[str, bytes]:
    """Return the figures that also stand under imgs/, by file name, as PNG bytes."""
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("imgs/"):
                (png,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.data)
                found[tag.removeprefix("imgs/")] = base64.b64decode(png)
    return found


def main(prefixes: list[str]) -> None:
    """Regenerate the notebooks whose names begin with one of `prefixes`; without any, all."""
    paths = sorted(HERE.glob("[0-9]*.ipynb"))
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in paths):
            raise SystemExit(f"no notebook's name begins with {prefix}")
    for path in paths:
        if prefixes and not path.name.startswith(tuple(prefixes)):
            continue
        print(path.name, flush=True)
        notebook = run(nbformat.read(path, as_version=4))
        for cell in notebook.cells:
            if "nbval-skip" in cell.metadata.get("tags", []):
                cell.outputs = []  # a slider needs a kernel: a stored page cannot show it
        # What varies from machine to machine and tells a reader nothing
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, path)
        for name, png in pictures(notebook).items():
            (HERE.parent / "imgs" / name).write_bytes(png)


if __name__ == "__main__":
    main(sys.argv[1:])
