"""A pytest plugin: nbval runs the notebooks as of two machines, and compares figures too."""

import base64
import functools
import io
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from nbval.plugin import IPyNbFile
from PIL import Image

os.environ["TQDM_DISABLE"] = "1"  # progress bars are not part of an output

# Stored outputs must not depend on the number of threads nor on the vector instructions
MACHINES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads, AVX2": {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # two workers with two threads each on two cores
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}

# Root mean square difference of all pixel values, of 255. The same code on another processor or
# number of threads moves a line by a small fraction of a pixel, a changed number moves it whole.
FIGURE_TOLERANCE = 1.0


def pytest_configure(config):
    for name, env in MACHINES.items():
        config.pluginmanager.register(Machine(name, env))


class Machine:
    """Runs pages in one kernel, emptied between them: a kernel each takes 40 % more time."""

    def __init__(self, name: str, env: dict[str, str]):
        self.name, self.env, self.kernel = name, env, None

    def pytest_collect_file(self, file_path, parent):
        if file_path.suffix == ".ipynb":
            nodeid = f"{file_path.relative_to(parent.config.rootpath).as_posix()} ({self.name})"
            page = Page.from_parent(parent, path=file_path, nodeid=nodeid)
            page.machine = self
            return page

    def empty_kernel(self, folder: Path) -> RunningKernel:
        if self.kernel is None or not self.kernel.is_alive():
            with patch.dict(os.environ, self.env):
                self.kernel = RunningKernel(CURRENT_ENV_KERNEL_NAME, cwd=str(folder))
        self.kernel.await_reply(self.kernel.execute_cell_input("%reset -f"))
        return self.kernel

    def pytest_sessionfinish(self):
        if self.kernel:
            self.kernel.stop()


class Page(IPyNbFile):
    def setup(self):
        self.kernel = self.machine.empty_kernel(self.path.parent)
        self.skip_compare = set(self.skip_compare) - {"image/png"}

    def teardown(self):
        """Leave the kernel to the next page."""

    def collect(self):
        for cell in super().collect():
            cell.compare_outputs = functools.partial(_compare, cell.compare_outputs)
            yield cell


def _compare(compare_strictly, new, stored):
    """Compare as nbval does, which is given the stored figure for one that is near enough."""
    figures = [output["data"] for output in new if "image/png" in output.get("data", {})]
    others = [output["data"] for output in stored if "image/png" in output.get("data", {})]
    for figure, other in zip(figures, others, strict=False):  # nbval sees how many there are
        difference = figure_difference(figure["image/png"], other["image/png"])
        far = f"RMS difference {difference:.2f} of 255, allowed {FIGURE_TOLERANCE}"
        figure["image/png"] = far if difference > FIGURE_TOLERANCE else other["image/png"]
    return compare_strictly(new, stored)


def figure_difference(new: str, stored: str) -> float:
    """Return the RMS difference of two base64 PNGs, of 255; inf if their sizes differ."""
    files = (io.BytesIO(base64.b64decode(png)) for png in (new, stored))
    a, b = (np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files)
    return float(np.sqrt(np.mean((a - b) ** 2))) if a.shape == b.shape else float("inf")
