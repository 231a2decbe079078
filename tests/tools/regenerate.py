"""Execute the notebooks anew, in clean kernels, and store their outputs and pictures.

    python tests/tools/regenerate.py            all of them
    python tests/tools/regenerate.py 02 04      those whose names begin so

A figure cell tagged `imgs/NAME.png` also becomes that file.
"""

import base64
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"

# What JupyterLab writes into a notebook that it opens: then it leaves the file as it is
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": IPythonKernel.language_info,
}


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def pictures(notebook: NotebookNode) -> dict[str, bytes]:
    """Return the figures that also stand under imgs/, by their path, as PNG bytes."""
    found = ((tag, c) for c in notebook.cells for tag in tags(c) if tag.startswith("imgs/"))
    return {tag: base64.b64decode(cell.outputs[0].data["image/png"]) for tag, cell in found}


@contextmanager
def kernel(**env: str) -> Iterator[Callable[[NotebookNode], None]]:
    """Start a kernel; yield what executes notebooks in it, each as if it were the first.

    A warning is an error, as no page is to show one.
    """
    empty = nbformat.v4.new_notebook()
    client = NotebookClient(empty, record_timing=False, coalesce_streams=True)

    def execute(notebook: NotebookNode) -> None:
        client.kc.execute("get_ipython().reset()", store_history=False)
        client.nb = notebook
        for i, cell in enumerate(notebook.cells):
            client.execute_cell(cell, i)
            if any(output.get("name") == "stderr" for output in cell.get("outputs", [])):
                raise RuntimeError(f"{cell.outputs}\n{cell.source}")
            if "nbval-skip" in tags(cell):
                cell.outputs = []  # a slider needs a kernel: a stored page cannot show it

    env = os.environ | {"TQDM_DISABLE": "1"} | env  # progress bars are not part of an output
    with client.setup_kernel(cwd=str(NOTEBOOKS), env=env):
        yield execute


def main(prefixes: list[str]) -> None:
    """Regenerate the notebooks whose names begin with one of `prefixes`; without any, all."""
    for prefix in prefixes or [""]:
        paths = sorted(NOTEBOOKS.glob(f"{prefix}*.ipynb"))
        if not paths:
            raise SystemExit(f"no notebook's name begins with {prefix}")
        for path in paths:
            print(path.name, flush=True)
            notebook = nbformat.read(path, as_version=4)
            with kernel() as execute:
                execute(notebook)
            notebook.metadata = METADATA
            nbformat.write(notebook, path)
            for name, png in pictures(notebook).items():
                (ROOT / name).write_bytes(png)


if __name__ == "__main__":
    main(sys.argv[1:])
