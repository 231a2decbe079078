"""Execute the notebooks anew, in clean kernels, and store their outputs and pictures.

    python tests/tools/regenerate.py            all of them
    python tests/tools/regenerate.py 02 04      those whose names begin so

A figure cell tagged `imgs/NAME.png` also becomes that file.
"""

import base64
import os
import sys
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"

# What JupyterLab writes into a notebook that it opens: then it leaves the file as it is
SPEC = get_kernel_dict()
METADATA = {
    "kernelspec": {"name": "python3"} | {key: SPEC[key] for key in ("display_name", "language")},
    "language_info": IPythonKernel.language_info,
}


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def pictures(notebook: nbformat.NotebookNode) -> dict[str, bytes]:
    """Return the figures that also stand under imgs/, by file name, as PNG bytes."""
    return {
        tag.removeprefix("imgs/"): base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        for tag in tags(cell)
        if tag.startswith("imgs/")
        for output in cell.outputs
        if "image/png" in output.data
    }


def regenerate(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        force_raise_errors=True,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    ).execute()
    for cell in notebook.cells:
        if "nbval-skip" in tags(cell):
            cell.outputs = []  # a slider needs a kernel: a stored page cannot show it
    notebook.metadata = METADATA
    nbformat.write(notebook, path)
    for name, png in pictures(notebook).items():
        (ROOT / "imgs" / name).write_bytes(png)


def main(prefixes: list[str]) -> None:
    """Regenerate the notebooks whose names begin with one of `prefixes`; without any, all."""
    os.environ["TQDM_DISABLE"] = "1"  # progress bars are not part of an output
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on shared cores two are many times slower
    for prefix in prefixes or [""]:
        paths = sorted(NOTEBOOKS.glob(f"{prefix}*.ipynb"))
        if not paths:
            raise SystemExit(f"no notebook's name begins with {prefix}")
        for path in paths:
            print(path.name, flush=True)
            regenerate(path)


if __name__ == "__main__":
    main(sys.argv[1:])
