"""Imports cost seconds: processes are forked from one that has made them."""

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

# nbformat's import of a format that no notebook needs, of a kind of URL, takes 3 seconds
sys.modules.setdefault("rfc3987_syntax", None)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "ipykernel.kernelapp",
        "ipywidgets",
        "scipy.stats",
        "torchvision",
        "initlab.page",
        "initlab.training.sweep",
    ]
)


class Kernel(FORKS.Process):
    """A notebook's kernel, with the methods of `subprocess.Popen` that its manager calls."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], cwd: str, env: dict[str, str], **_):
        super().__init__()
        self.arguments, self.cwd, self.env = command[command.index("-f") :], cwd, env

    @classmethod
    def launch(cls, command: list[str], **settings) -> "Kernel":
        kernel = cls(command, **settings)
        kernel.start()
        while os.getpgid(kernel.pid) != kernel.pid:  # signals go to its group
            time.sleep(0.001)
        return kernel

    def run(self):
        import matplotlib
        from ipykernel.kernelapp import IPKernelApp

        os.setsid()
        os.environ.clear()
        os.environ.update(self.env)
        os.chdir(self.cwd)
        # As a kernel sets it before the import, so that what is left open is put out as well
        matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
        IPKernelApp.launch_instance(self.arguments)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_cells(sources: Iterable[str], folder: Path) -> list[str]:
    """Run cells as a kernel does, in a process of its own, and return what they put out.

    Raises:
        AssertionError: A cell failed; with its source and the traceback.
    """
    receive, send = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_run_cells, args=(list(sources), folder, send))
    process.start()
    send.close()
    put_out, failed = receive.recv()
    process.join()
    assert failed is None, failed
    return put_out


def _run_cells(sources, folder, send):
    os.chdir(folder)
    shell, put_out, failed = InteractiveShell.instance(), [], None
    for source in sources:
        with capture_output() as captured:
            result = shell.run_cell(source)
        put_out.append(re.sub(r"Out\[\d+\]: ?\n?", "", captured.stdout).strip())
        if not result.success:
            failed = f"{source}\n\n{captured.stdout}"  # which ends with the traceback
            break
    send.send((put_out, failed))
