"""Try `predict` against many draws: `python tests/tools/prove_predict.py` writes the record.

Each case is drawn 20,000 times, and looked at without an activation and after four leaky ReLUs. A
row of the record is one number of one of these. `bad` tells the rows that are not as they should
be: the script exits with 1 if there is one. Names of cases in its arguments try these alone.

The limits of the warning were chosen with these cases at hand, but for the `FRESH` ones, which
were written down, and then drawn once, when the limits stood.
"""

import csv
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initlab import draw, initialize_, load_mnist, predict

RECORD = Path(__file__).resolve().parents[2] / "data" / "predict" / "draws.csv"
DRAWS = 20_000
SLOPES = (1.0, 0.0, 0.25, -1.0, 2.5)


class Case(NamedTuple):
    """Data, layer and init, and how far the sd's may be off, as a share."""

    x: Callable[[], Tensor]
    layer: Callable[[], nn.Module]
    options: dict[str, Any]
    sds: float = 0.05


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pictures(n: int = 25) -> Tensor:
    return load_mnist().x_valid[:n]


def _student(rows: int, df: float) -> Tensor:
    """Return rows whose sizes follow Student's t, of df degrees of freedom."""
    chi = torch.distributions.Chi2(torch.tensor(df))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _noise(rows, 25) / (chi.sample((rows, 1)) / df).sqrt()


def _one_bright(rows: int = 5000) -> Tensor:
    x = _noise(rows, 25)
    x[1234] *= 100
    return x


def _likes(*shape: int) -> Tensor:
    """Return pictures whose neighbours are alike, in channels of different means."""
    x = _noise(*shape)
    return x + 0.8 * x.roll(1, -1) + torch.linspace(-0.5, 1, shape[1]).view(-1, 1, 1)


def _second_layer() -> Tensor:
    """Return what a first layer, drawn by Kaiming's rule, makes of pictures, with a ReLU."""
    first = initialize_(nn.Conv2d(1, 8, 5, stride=2), "kaiming_normal", bias="zeros", generator=4)
    return first(_pictures(20)).relu().detach()


NORMAL, UNIFORM = {"scheme": "kaiming_normal"}, {"scheme": "kaiming_uniform"}
BARE = {"bias": "zeros"}
CONV = partial(nn.Conv2d, 1, 32, 5)
CASES = {
    "MNIST, default": Case(_pictures, CONV, {"scheme": "default"}, 0.02),
    "MNIST, normal": Case(_pictures, CONV, NORMAL, 0.02),
    "MNIST, uniform": Case(_pictures, CONV, UNIFORM, 0.02),
    "MNIST, 100 pictures": Case(lambda: _pictures(100), CONV, UNIFORM, 0.02),
    "MNIST, uniform, no bias": Case(_pictures, CONV, UNIFORM | BARE, 0.02),
    "MNIST, one filter, normal": Case(_pictures, lambda: nn.Conv2d(1, 1, 5), NORMAL, 0.02),
    "MNIST, one filter, default": Case(
        _pictures, lambda: nn.Conv2d(1, 1, 5), {"scheme": "default"}, 0.02
    ),
    "MNIST, four filters, normal": Case(_pictures, lambda: nn.Conv2d(1, 4, 5), NORMAL, 0.02),
    "one picture": Case(lambda: _pictures(1), CONV, UNIFORM, 0.02),
    "four pictures, one filter": Case(lambda: _pictures(4), lambda: nn.Conv2d(1, 1, 5), NORMAL),
    "black pictures, normal": Case(lambda: torch.zeros(2, 1, 9, 9), CONV, NORMAL),
    "dark pictures, normal": Case(lambda: 0.1 * _pictures(20), CONV, NORMAL),
    "dark pictures, default": Case(lambda: 0.1 * _pictures(20), CONV, {"scheme": "default"}),
    "constant picture": Case(lambda: torch.ones(1, 1, 9, 9), CONV, UNIFORM),
    "constant picture, one filter": Case(
        lambda: torch.ones(1, 1, 9, 9), lambda: nn.Conv2d(1, 1, 5), NORMAL
    ),
    "alike rows, one output": Case(
        lambda: 1 + 0.1 * _noise(200, 25), lambda: nn.Linear(25, 1), {"scheme": "default"}
    ),
    "one-hot": Case(lambda: torch.eye(10), lambda: nn.Linear(10, 32), UNIFORM | BARE),
    "one-hot, bias": Case(lambda: torch.eye(10), lambda: nn.Linear(10, 32), UNIFORM),
    "Student 1.5": Case(lambda: _student(5000, 1.5), lambda: nn.Linear(25, 32), NORMAL),
    "Student 1.5, uniform": Case(lambda: _student(5000, 1.5), lambda: nn.Linear(25, 32), UNIFORM),
    "lognormal": Case(lambda: (1.5 * _noise(5000, 25)).exp(), lambda: nn.Linear(25, 32), NORMAL),
    "lognormal rows": Case(
        lambda: _noise(5000, 25) * (1.5 * _noise(5000, 1, seed=1)).exp(),
        lambda: nn.Linear(25, 32),
        NORMAL,
    ),
    "one bright row": Case(_one_bright, lambda: nn.Linear(25, 32), NORMAL),
    "fan_in 1": Case(lambda: _noise(500, 1), lambda: nn.Linear(1, 32), UNIFORM | BARE),
    "fan_in 1, bias": Case(lambda: _noise(500, 1), lambda: nn.Linear(1, 32), UNIFORM),
    "fan_in 2": Case(lambda: _noise(500, 2), lambda: nn.Linear(2, 32), UNIFORM),
    "fan_in 3": Case(lambda: _noise(500, 3), lambda: nn.Linear(3, 32), UNIFORM | BARE),
    "fan_in 5": Case(lambda: _noise(500, 5), lambda: nn.Linear(5, 32), {"scheme": "default"}),
    "fan_in 5, no bias": Case(lambda: _noise(500, 5), lambda: nn.Linear(5, 32), UNIFORM | BARE),
    "noise": Case(lambda: _noise(1000, 25), lambda: nn.Linear(25, 32), UNIFORM | BARE),
    "Linear": Case(
        lambda: _pictures(200).flatten(1),
        lambda: nn.Linear(784, 32),
        {"scheme": "xavier_uniform"},
        0.02,
    ),
    "strided": Case(lambda: _pictures(50), lambda: nn.Conv2d(1, 16, 3, 2, 1), UNIFORM, 0.02),
    "dilated": Case(lambda: _pictures(20), lambda: nn.Conv2d(1, 16, 3, dilation=3), UNIFORM, 0.02),
    "grouped": Case(lambda: _likes(9, 4, 12, 12), lambda: nn.Conv2d(4, 8, 3, groups=2), UNIFORM),
    "depthwise": Case(
        lambda: _likes(9, 6, 12, 12), lambda: nn.Conv2d(6, 6, 3, groups=6), {"scheme": "default"}
    ),
}


# Written when the limits of the warning stood: nothing of `predict` was changed by what they gave
FRESH = {
    "fresh: other pictures, 3x3": Case(
        lambda: load_mnist().x_test[:40], lambda: nn.Conv2d(1, 8, 3), {"scheme": "default"}, 0.02
    ),
    "fresh: a second layer": Case(
        _second_layer, lambda: nn.Conv2d(8, 16, 3, padding=1), {"scheme": "default"}
    ),
    "fresh: few of many words": Case(
        lambda: (_noise(400, 100, seed=5) > 1.6).float(),
        lambda: nn.Linear(100, 4),
        {"scheme": "xavier_normal"} | BARE,
    ),
    "fresh: rows on a plane": Case(
        lambda: _noise(300, 2, seed=6) @ _noise(2, 30, seed=7), lambda: nn.Linear(30, 12), UNIFORM
    ),
    "fresh: two filters of 7x7": Case(
        lambda: _pictures(12), lambda: nn.Conv2d(1, 2, 7, stride=3), UNIFORM, 0.02
    ),
}
CASES |= FRESH


def rows(name: str, draws: int = DRAWS) -> Iterator[dict[str, Any]]:
    """Yield the rows of a case, each with the difference that is allowed; nan: any."""
    case = CASES[name]
    x, layer = case.x(), case.layer()
    told, drawn = (
        predict(x, layer, **case.options),
        draw(x, layer, n=draws, generator=0, **case.options),
    )
    for slope in SLOPES:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            predicted = told.at(slope)
        found, each = drawn.at(slope), drawn.each(slope)
        for number, values in each._asdict().items():
            # The root of a mean square strays by half as much as that, over itself
            root = getattr(found, number)
            values_ = values if number == "mean" else values.square()
            error = values_.std().item() / math.sqrt(draws)
            error = error if number == "mean" or not root else error / (2 * root)
            # A std holds the square of a mean, whose sd is in doubt where it is warned of
            more = 0.005 * root * (bool(warned) and number == "std")
            allowed = 4 * error + more + 1e-7
            yield _row(name, slope, number, predicted, found, error, allowed, warned)
            sd = getattr(found, number + "_sd")
            z = (values - values.mean()) / (sd or 1.0)
            error = sd * math.sqrt(max((z**4).mean().item() - 1, 0) / draws) / 2
            allowed = math.nan if warned else case.sds * sd + error * (case.sds < 0.05) + 1e-7
            yield _row(name, slope, number + "_sd", predicted, found, error, allowed, warned)


def _row(name, slope, number, predicted, found, error, allowed, warned) -> dict[str, Any]:
    values = [getattr(predicted, number), getattr(found, number), error, allowed]
    names = ("predicted", "drawn", "error", "allowed")
    numbers = {n: f"{value:.6g}" for n, value in zip(names, values, strict=True)}
    return {"case": name, "slope": slope, "number": number, **numbers, "warned": bool(warned)}


def bad(record: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows whose prediction is further from the drawn than is allowed."""
    return [
        row
        for row in record
        if abs(float(row["predicted"]) - float(row["drawn"])) > float(row["allowed"])
        or not math.isfinite(float(row["predicted"]))
    ]


def main(names: list[str]) -> int:
    """Write the record, or print the rows of the cases named that are bad; return the exit code."""
    record = []
    for name in names or CASES:
        record += rows(name)
        print(name, "bad:", *bad(record[-30:]), sep="\n    ", flush=True)
    if not names:
        with RECORD.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, record[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(record)
    return bool(bad(record))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
