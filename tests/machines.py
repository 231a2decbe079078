"""A pytest plugin: compares the figures, which nbval leaves out, and shares work out evenly."""

import base64
import functools
import io
import os

import numpy as np
from forks import Kernel
from jupyter_client.provisioning import local_provisioner
from nbval.plugin import IPyNbCell
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

os.environ["TQDM_DISABLE"] = "1"  # progress bars are not part of an output
local_provisioner.launch_kernel = Kernel.launch  # 16 kernels, 7 s of imports each

# Root mean square difference of all pixel values, of 255. The same code on another processor or
# number of threads moves a line by a small fraction of a pixel, a changed number moves it whole.
FIGURE_TOLERANCE = 1.0


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        item.compare_outputs = functools.partial(_compare, item, item.compare_outputs)


class Scheduler(LoadScopeScheduling):
    """Each file is one worker's, as with `--dist loadscope`, but of what takes long each test."""

    def _split_scope(self, nodeid):
        return nodeid if "test_holds_for_" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Scheduler(config, log)


def _compare(cell, compare_text, new, stored):
    return compare_text(new, stored) and _compare_figures(cell, _pngs(new), _pngs(stored))


def _pngs(outputs):
    return [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]


def figure_difference(new, stored):
    """Return the RMS difference of two base64 PNGs, of 255; inf if their sizes differ."""
    files = (io.BytesIO(base64.b64decode(png)) for png in (new, stored))
    a, b = (np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files)
    return float(np.sqrt(np.mean((a - b) ** 2))) if a.shape == b.shape else float("inf")


def _compare_figures(cell, new, stored):
    for number, pair in enumerate(zip(new, stored, strict=True), 1):
        difference = figure_difference(*pair)
        if difference > FIGURE_TOLERANCE:
            cell.comparison_traceback.append(
                f"figure {number} of the cell differs from the stored one: RMS {difference:.2f} "
                f"of 255, allowed {FIGURE_TOLERANCE}"
            )
            return False
    return True
