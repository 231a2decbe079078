"""How often `trace(...).problems()` is wrong: sound nets, and nets with a planted fault.

`python tests/tools/calibrate.py` counts on 200 sound draws and on each fault with 5 seeds; with
`power` it records which factor on one layer, and which n Var(w) in all layers, is found in half and
in 95 % of 20 draws of plain stacks, and goes on where it stopped. The tests run a few of both.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from initlab import Trace, conv_stack, initialize_, trace

POWER = Path(__file__).parents[2] / "data" / "survey" / "power.csv"
COLUMNS = "depth,width,where,up_50,up_95,down_50,down_95"
Case = tuple[str, nn.Module, Tensor]


def random_direction(output: Tensor) -> Tensor:
    """Return a loss whose gradient has the same size at the output of any model."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return (output * direction.to(output)).sum()


def dense(depth: int, width: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, width), act())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def kaiming(net: nn.Module, a: float = 0.0, scheme: str = "kaiming_normal") -> nn.Module:
    return initialize_(net, scheme, a=a, bias="zeros")


def stacks(seed: int) -> Case:
    """A plain Kaiming stack: dense or convolutional, 3 to 50 layers, 32 to 256 features."""
    depth, width = [3, 8, 15, 30, 50][seed % 5], [32, 64, 128, 256][seed // 5 % 4]
    scheme = ["kaiming_normal", "kaiming_uniform"][seed % 2]
    if seed % 3:
        return (
            f"dense {depth} x {width}",
            kaiming(dense(depth, width), scheme=scheme),
            torch.randn(32, width),
        )
    net = kaiming(conv_stack(depth, min(width, 64)), scheme=scheme)
    return f"conv {depth} x {min(width, 64)}", net, torch.randn(8, 1, 14, 14)


def pooled(seed: int) -> Case:
    """A shallow Kaiming stack of convolutions, an average over all positions, and a classifier."""
    depth, width = 1 + seed % 6, [8, 16, 32, 64][seed // 5 % 4]
    net = kaiming(conv_stack(depth, width, classes=10))
    return f"pooled {depth} x {width}", net, torch.randn(8, 1, 14, 14)


def pictures(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 64, 64)


def sound(draws: int) -> Iterator[Case]:
    """Yield sound nets: of 10 draws 4 plain stacks, 2 each pooled, resnet18 and convnext_tiny."""
    for seed in range(draws):
        torch.manual_seed(seed)
        match seed % 10:
            case 0 | 1:
                yield "resnet18", torchvision.models.resnet18(), pictures()
            case 2 | 3:
                yield "convnext_tiny", torchvision.models.convnext_tiny(), pictures()
            case 4 | 5:
                yield pooled(seed)
            case _:
                yield stacks(seed)


def judge(net: nn.Module, x: Tensor) -> Trace:
    return trace(net, x, loss=random_direction)


@torch.no_grad()
def _scale(net: nn.Module, name: str, factor: float) -> nn.Module:
    net.get_submodule(name).weight.mul_(factor)
    return net


@torch.no_grad()
def _set(net: nn.Module, parameter: str, value: float) -> nn.Module:
    net.get_parameter(parameter).fill_(value)
    return net


@torch.no_grad()
def _twice(net: nn.Sequential) -> nn.Module:
    for layer in net[::2]:
        layer.weight.mul_(2)
    return net


def resnet() -> nn.Module:
    return torchvision.models.resnet18()


x_dense = (32, 64)
# fault: net, shape of the inputs, the layers that may be named, kinds
FAULTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    **{
        f"weights x {f:g}, {depth} layers": (
            lambda f=f, depth=depth: _scale(kaiming(dense(depth, 64)), "6", f),
            x_dense,
            "6",
            "scale",
        )
        for f in (0.01, 100)
        for depth in (8, 30)
    },
    **{
        f"weights x {f:g}, convolutions": (
            lambda f=f: _scale(kaiming(conv_stack(20, 32)), "18", f),
            (8, 1, 14, 14),
            "18",
            "scale",
        )
        for f in (0.01, 100)
    },
    **{
        f"weights x {f:g}, resnet18 in eval mode": (
            lambda f=f: _scale(resnet().eval(), "layer2.0.conv1", f),
            (8, 3, 64, 64),
            "layer2.0.conv1",
            "scale",
        )
        for f in (0.01, 100)
    },
    **{
        f"weights x {f:g}, squeezenet": (
            lambda f=f: _scale(torchvision.models.squeezenet1_1(), "features.6.squeeze", f),
            (8, 3, 64, 64),
            "features.6.squeeze",
            "scale",
        )
        for f in (0.01, 100)
    },
    "biases of -10": (
        lambda: _set(kaiming(dense(8, 64)), "6.bias", -10),
        x_dense,
        "6",
        "dead",
    ),
    "biases of -10, convolutions": (
        lambda: _set(kaiming(conv_stack(8, 32)), "6.bias", -10),
        (8, 1, 14, 14),
        "6",
        "dead",
    ),
    "biases of -10 in resnet18's BatchNorm": (
        lambda: _set(resnet(), "layer2.0.bn1.bias", -10),
        (8, 3, 64, 64),
        "layer2.0.bn1",
        "dead",
    ),
    "a zeroed layer": (
        lambda: _set(kaiming(dense(8, 64)), "6.weight", 0),
        x_dense,
        "6",
        "constant",
    ),
    "a zeroed layer with its default biases": (
        lambda: _set(dense(8, 64), "6.weight", 0),
        x_dense,
        "6",
        "constant",
    ),
    "a zeroed convolution before BatchNorm": (
        lambda: _set(resnet(), "layer2.0.conv1.weight", 0),
        (8, 3, 64, 64),
        "layer2.0.conv1",
        "constant",
    ),
    "default init, 30 dense layers": (lambda: dense(30, 64), x_dense, "0", "shrinks"),
    "default init, 30 convolutions": (lambda: conv_stack(30, 32), (8, 1, 14, 14), "0", "shrinks"),
    "default init, 8 dense layers": (lambda: dense(8, 64), x_dense, "0", "shrinks"),
    "mobilenet_v2 in eval mode (fan_out)": (
        lambda: torchvision.models.mobilenet_v2().eval(),
        (8, 3, 64, 64),
        "features.0.0 features.1.conv.0.0 features.2.conv.1.0",
        "shrinks",
    ),
    "sigmoids": (
        lambda: kaiming(dense(20, 64, nn.Sigmoid)),
        x_dense,
        "0",
        "shrinks",
    ),
    "a gain twice too large": (lambda: _twice(kaiming(dense(20, 64))), x_dense, "0 2", "grows"),
    "a nan": (
        lambda: _set(kaiming(dense(8, 64)), "6.weight", math.nan),
        x_dense,
        "6",
        "not finite",
    ),
}


def found(fault: str, seed: int) -> tuple[bool, list]:
    """Plant a fault; return whether the first problem is of its kind and names its layer."""
    build, shape, layers, kind = FAULTS[fault]
    torch.manual_seed(seed)
    problems = judge(build(), torch.randn(shape)).problems()
    first = problems[0] if problems else None
    return first is not None and first.layer in layers.split() and first.kind == kind, problems


def main() -> None:
    flagged: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, net, x in sound(200):
        problems = judge(net, x).problems()
        count[name] += 1
        flagged[name] += bool(problems)
        for problem in problems:
            print(f"sound {name}: {problem}", flush=True)
    print(f"sound: {flagged.total()} of {count.total()} flagged", dict(count))
    for fault in FAULTS:
        right = [found(fault, seed) for seed in range(5)]
        print(f"{fault}: {sum(ok for ok, _ in right)} of 5")
        for ok, problems in right:
            if not ok:
                print("   ", [(p.layer, p.kind, p.reason) for p in problems])


@torch.no_grad()
def strayed(depth: int, width: int, factor: float, where: str) -> bool:
    """Return whether a plain Kaiming stack is named whose weights are multiplied."""
    net = kaiming(dense(depth, width))
    layers = net[:-1:2]
    for layer in layers if where == "all" else layers[depth // 2 : depth // 2 + 1]:
        layer.weight.mul_(factor)
    with torch.enable_grad():
        return bool(judge(net, torch.randn(32, width)).problems())


def power(path: Path, draws: int = 20) -> None:
    """Record the smallest factors, of a grid, that are found in half and in 95 % of draws."""
    done = path.read_text().splitlines() if path.exists() else [COLUMNS]
    path.write_text("\n".join(done) + "\n")
    for depth, width, where in product((4, 10, 20, 50), (16, 64, 256), ("one", "all")):
        line = f"{depth},{width},{where}"
        if any(known.startswith(f"{line},") for known in done):
            continue
        for sign in (1, -1):
            shares = {}
            for step in range(1, 13):
                factor = (1.5 if where == "one" else 1.1) ** (sign * step)
                torch.manual_seed(step)
                found = sum(strayed(depth, width, factor, where) for _ in range(draws)) / draws
                shares[factor if where == "one" else 2 * factor**2] = found
                if found == 1:
                    break
            for share in (0.5, 0.95):
                line += f",{next((f for f, s in shares.items() if s >= share), math.nan):.2g}"
        with path.open("a") as file:
            print(line, file=file)


if __name__ == "__main__":
    power(POWER) if sys.argv[1:] == ["power"] else main()
