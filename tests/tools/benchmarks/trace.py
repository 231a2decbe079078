"""What `trace` with a loss costs beside a plain forward and backward pass: time and memory.

`python tests/tools/benchmarks/trace.py [NAME ...]` runs both in turn, on one thread, and prints the
medians of the ratios. Memory is the growth of the peak of a process of its own (on Linux).
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from initlab import conv_stack, trace

NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet50": lambda: (torchvision.models.resnet50(), torch.randn(4, 3, 224, 224)),
    "vgg11_bn": lambda: (torchvision.models.vgg11_bn(), torch.randn(4, 3, 224, 224)),
    "vit_b_16": lambda: (torchvision.models.vit_b_16(), torch.randn(2, 3, 224, 224)),
    "30 convolutions": lambda: (conv_stack(30, 32), torch.randn(32, 1, 28, 28)),
}


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def plain(net: nn.Module, x: Tensor) -> None:
    net.zero_grad()
    loss(net(x)).backward()


def traced(net: nn.Module, x: Tensor) -> None:
    net.zero_grad()
    trace(net, x, loss=loss)


def seconds(run: Callable[[nn.Module, Tensor], None], net: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    run(net, x)
    return time.perf_counter() - start


def grown(name: str, run: Callable[[nn.Module, Tensor], None]) -> int:
    """Return by how many KiB the peak memory grows in one run; to be called in a new process."""
    torch.set_num_threads(1)
    net, x = NETS[name]()
    trace(nn.Linear(2, 2), torch.randn(2, 2), loss=loss)  # what is imported once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    run(net, x)
    return peak() - before


def peak() -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1])


def main(names: list[str], repeats: int = 5) -> None:
    torch.set_num_threads(1)
    print("| network | time, traced / plain | memory, traced / plain |\n|---|---|---|")
    for name in names or list(NETS):
        torch.manual_seed(0)
        net, x = NETS[name]()
        plain(net, x)
        traced(net, x)
        ratios = [seconds(traced, net, x) / seconds(plain, net, x) for _ in range(repeats)]
        peaks = []
        for run in (traced, plain):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(grown, (name, run)))
        time_, memory = statistics.median(ratios), peaks[0] / peaks[1]
        print(f"| {name} | {time_:.2f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
