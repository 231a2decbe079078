"""What a trace says of the networks of others, sound and with a fault planted, beside its peers.

    python -m pip install -r data/survey/requirements.txt
    python tests/tools/survey.py sound|faults|peers [--only PART ...] [--anew]
    python tests/tools/survey.py summary

Each run of `sound`, `faults` and `peers` is a row of a CSV in data/survey/, added when it is done:
what is there already is skipped, so that a survey can be stopped and gone on with. `--anew` makes
these rows again. `summary` counts what the README there quotes.
"""

import argparse
import contextlib
import csv
import io
import logging
import math
import os
import random
import re
import subprocess
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # no weights are fetched: all are drawn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import initlab
from initlab.diagnose.cli import random_direction
from initlab.diagnose.watch import first_float, tensors

HERE = Path(__file__).parents[2] / "data" / "survey"
SEEDS = 0, 1, 2
FAULTY = 60  # networks that get a fault, and how many each, one at a time
DRAWS = 2
TRIES = 6  # weights that are tried for a fault to count, before another fault is
MOVES = 10  # the factor by which a fault that counts moves what the next weight is given
PEERS = 20  # sound networks, and as many faults, that the peers are shown
FAULTS = "times 100", "times 0.01", "zero", "equal rows", "nan", "bias -10"


# Networks


class Network(NamedTuple):
    """A line of networks.csv: how to build a network, and what to feed it."""

    network: str
    library: str
    factory: str
    arguments: str
    inputs: str

    def build(self, seed: int) -> tuple[nn.Module, Any]:
        """Return the network in train mode, and its inputs."""
        g = torch.Generator().manual_seed(seed)
        module, _, name = self.factory.partition(":")
        known = {library: import_module(library) for library in (self.library, "torch")} | {
            "make": getattr(import_module(module), name),
            "noise": lambda *shape: torch.randn(shape, generator=g),
            "tokens": lambda vocabulary, *shape: torch.randint(vocabulary, shape, generator=g),
            "edges": lambda nodes, n: torch.randint(nodes, (2, n), generator=g),
        }
        torch.manual_seed(seed)
        return eval(f"make({self.arguments})", known).train(), eval(self.inputs, known)


def call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


# Sound networks


def verdict(model: nn.Module, x: Any, seed: int) -> dict[str, Any]:
    """Trace, and return what is written down: the time, the rows, what is wrong, or the error."""
    torch.manual_seed(seed)
    start = time.process_time()
    try:
        rows = initlab.trace(model, x, loss=random_direction)
        problems = rows.problems()
        print(*problems, sep="\n", flush=True)
    except Exception as error:  # whatever it is, it goes on record
        return {"error": f"{own_error(model, x)}{type(error).__name__}: {error}"[:300]}
    return {
        "seconds": f"{time.process_time() - start:.2f}",
        "rows": len(rows),
        "seen": rows.seen().partition(" ")[0],
        "problems": "; ".join(map(told, problems)),
    }


def told(problem: initlab.Problem) -> str:
    idle = " (idle BatchNorm)" if problem.idle else ""
    return f"{problem.layer}: {problem.kind}{idle}"


def own_error(model: nn.Module, x: Any) -> str:
    """Return "no run: " if the network by itself cannot run, or not back."""
    try:
        random_direction(call(model, x)).backward()
    except RuntimeError:
        return "no run: "
    return ""


def sound(net: Network, mode: str, seed: int) -> Iterator[dict[str, Any]]:
    model, x = net.build(seed)
    shape = "x".join(map(str, next(tensors(x)).shape))
    yield {"shape": shape, **verdict(model.train(mode == "train"), x, seed)}


# Faults


class Use(NamedTuple):
    """One multiplication of data by weights."""

    names: frozenset[str]  # of the parameters of 2 dimensions or more
    given: float  # rms of the data
    parents: frozenset[int]  # the uses whose results reach this one with no other in between
    ancestors: frozenset[int]


class Origin(NamedTuple):
    """Where a tensor comes from: a weight has names, data what fed it."""

    by: "Uses"
    names: frozenset[str] = frozenset()
    fed: frozenset[int] | None = None
    direct: frozenset[int] = frozenset()  # the use whose result it is, as it was put out


class Uses(TorchDispatchMode):
    """Sees which weights multiply data, what rms they are given, and which feeds which.

    It shares nothing with what is tested. What is computed from parameters and constants alone is a
    weight; from what the network is given, data. A tensor carries its origin as an attribute.
    """

    MULTIPLY = re.compile(r"(^|_)(addb?|baddb?|b)?m[mv]$|linear|matmul|conv|embedding|rnn|lstm|gru")
    VIEWS = "view", "_unsafe_view", "reshape", "t", "transpose", "permute"
    RELUS = "relu", "threshold", "clamp_min", "hardtanh"

    def __init__(self, model: nn.Module, x: Any) -> None:
        super().__init__()
        self.known = {id(p): Origin(self, frozenset({n})) for n, p in model.named_parameters()}
        self.small = {id(p) for p in model.parameters() if p.dim() < 2}
        for tensor in tensors(x):
            tensor.origin = Origin(self, fed=frozenset())
        self.uses: list[Use] = []
        self.ends: set[int] = set()  # uses whose result is added to a stream that they are not on
        self.rectified: set[int] = set()  # uses whose result goes to a ReLU

    def origin(self, tensor: Tensor) -> Origin | None:
        known = self.known.get(id(tensor), getattr(tensor, "origin", None))
        return known if known and known.by is self and id(tensor) not in self.small else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Read before the call: it may overwrite what it is given.
        given = [a for a in tree_leaves((args, kwargs or {})) if isinstance(a, Tensor)]
        data = [(a, o) for a in given if (o := self.origin(a)) and o.fed is not None]
        names = frozenset().union(*(o.names for a in given if (o := self.origin(a))))
        kind = func._schema.name.removeprefix("aten::").rstrip("_")
        multiplies = bool(data and names and self.MULTIPLY.search(kind))
        rms = _rms(data[0][0]) if multiplies else 0.0
        out = func(*args, **kwargs or {})
        fed = frozenset().union(*(o.fed for _, o in data))
        direct = data[0][1].direct if data and kind in self.VIEWS else frozenset()
        if multiplies:
            self.uses.append(Use(names, rms, fed, fed | self.ancestors(fed)))
            fed = direct = frozenset({len(self.uses) - 1})
        elif len(data) == 2 and kind in ("add", "sub"):
            one, other = (o.fed for _, o in data)
            self.ends |= one - other - self.ancestors(other)
            self.ends |= other - one - self.ancestors(one)
        elif data and kind in self.RELUS:
            self.rectified |= data[0][1].direct
        new = Origin(self, fed=fed, direct=direct) if data else Origin(self, names)
        for made in tree_leaves(out) if data or names else ():
            if isinstance(made, Tensor) and id(made) not in self.known:
                made.origin = new
        return out

    def ancestors(self, uses: frozenset[int]) -> frozenset[int]:
        return frozenset().union(*(self.uses[i].ancestors for i in uses))

    def of(self, weight: str) -> set[int]:
        return {i for i, use in enumerate(self.uses) if weight in use.names}

    def next(self, weight: str) -> Use | None:
        """Return the first use of another weight that is fed by this one."""
        own = self.of(weight)
        return next((u for u in self.uses if u.parents & own and weight not in u.names), None)


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.is_floating_point() else math.nan


def observe(model: nn.Module, x: Any, seed: int) -> tuple[Uses, float]:
    """Run the network once, and return its uses of weights and the rms of its output."""
    torch.manual_seed(seed)
    with torch.no_grad(), Uses(model, x) as uses:
        output = first_float(call(model, x))
    return uses, _rms(output)


def plant(model: nn.Module, name: str, fault: str, rng: random.Random) -> bool:
    """Put a fault into a parameter; return whether that changed it."""
    weight, owner = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    was = weight.detach().clone()
    with torch.no_grad():
        if fault == "bias -10":
            if not isinstance(bias := getattr(owner, "bias", None), Tensor):
                return False
            bias.fill_(-10)
        elif fault == "equal rows":
            rows = 1 if getattr(owner, "transposed", False) else 0
            if hasattr(owner, "nf"):  # transformers' Conv1D holds (inputs, units)
                rows = 1
            elif name.rpartition(".")[2] not in ("weight", "in_proj_weight", "weight_ih_l0"):
                return False  # which of its dimensions are units is not known
            weight.copy_(weight.narrow(rows, 0, 1).clone().expand_as(weight))
        elif fault == "nan":
            weight.view(-1)[rng.randrange(weight.numel())] = math.nan
        else:
            weight.mul_({"times 100": 100, "times 0.01": 0.01, "zero": 0}[fault])
    # A head that is 0 stays what it is, and so do the equal rows of a single unit.
    return fault == "bias -10" or not torch.equal(weight, was)


def kind(model: nn.Module, name: str, head: bool) -> str:
    """Return what kind of weight this is, in the words of the README."""
    owner, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if head:
        return "head"
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if getattr(owner, "groups", 1) > 1 and owner.groups == owner.in_channels:
        return "depthwise"
    if model.get_parameter(name).dim() == 3 and "xpert" in type(owner).__name__:
        return "expert"
    if re.search(r"att|qkv|\b(q|k|v|o|query|key|value)(_proj|_lin)?\b|\bto_(q|k|v|out)\b", name):
        return "attention"
    return type(owner).__name__ if last == "weight" else "bare parameter"


def planted(net: Network, draw: int) -> dict[str, Any]:
    """Return the network with a fault that counts, or without one where none of the tried does."""
    rng = random.Random(f"{net.network} {draw}")
    model, x = net.build(draw)
    sound_state = {n: v.clone() for n, v in model.state_dict().items()}
    before, out_before = observe(model, x, draw)
    single = [u.names for u in before.uses if len(u.names) == 1]
    names = sorted({n for s in single for n in s if not re.search(r"pos|relative|token", n)})

    def can_have(name: str, fault: str) -> bool:
        own, after = before.of(name), before.next(name)
        if fault in ("zero", "times 0.01"):
            return after is not None and not own & before.ends
        return fault != "bias -10" or bool(own & before.rectified)

    tried = 0
    for fault in rng.sample(FAULTS, len(FAULTS)):
        kinds = defaultdict(list)  # each is as likely, however many weights are of it
        for name in names:
            if can_have(name, fault):
                kinds[kind(model, name, before.next(name) is None)].append(name)
        for _ in range(TRIES if kinds else 0):
            name = rng.choice(kinds[rng.choice(sorted(kinds))])
            after = before.next(name)
            model.load_state_dict(sound_state)
            if not plant(model, name, fault, rng):
                continue
            tried += 1
            seen, out = observe(model, x, draw)
            old = out_before if after is None else after.given
            fed = None if after is None else seen.next(name)
            new = out if after is None else fed.given if fed else 0.0
            moved = not math.isfinite(new) or new == 0 or not 1 / MOVES < new / old < MOVES
            if moved or fault == "equal rows":  # units that stay alike are a fault at any rms
                found = {
                    "fault": fault,
                    "parameter": name,
                    "weight": kind(model, name, after is None),
                    "next": "; ".join(sorted(after.names)) if after else "output",
                    "before": f"{old:.3g}",
                    "after": f"{new:.3g}",
                    "counts": moved,
                    "tried": tried,
                }
                return {"model": model, "x": x, "sound": sound_state, "row": found}
    return {"row": {"error": f"none of {tried} faults counts"}}


def blamed(model: nn.Module, name: str, layers: list[str]) -> bool:
    """Return whether the first or second of these layers is the one with this parameter."""
    weight = model.get_parameter(name)
    same = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    same = [re.sub(r"parametrizations\.(\w+)\.original\d*", r"\1", n) for n in same]
    names = {n for s in same for n in (s, s.rpartition(".")[0] or type(model).__name__)}
    return any(re.sub(r"#\d+$", "", layer) in names for layer in layers[:2])


def faults(net: Network, seed: int) -> Iterator[dict[str, Any]]:
    case = planted(net, seed)
    if "model" not in case:
        yield case["row"]
        return
    model, x, row = case["model"], case["x"], case["row"]
    said = verdict(model, x, seed)
    model.load_state_dict(case["sound"])
    clean = verdict(model, x, seed).get("problems", "")
    row |= {"sound": clean, **said}
    if "error" not in said:
        problems = said["problems"].split("; ") if said["problems"] else []
        row["found"] = bool(set(problems) - set(clean.split("; ")))
        layers = [p.rpartition(": ")[0] for p in problems]
        row["named"] = row["found"] and blamed(model, row["parameter"], layers)
    yield row


# Peers


class Called(nn.Module):
    """A network as the peers want it: one input, one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Tensor:
        return first_float(call(self.model, x))


def square(y: Tensor, _target: Any = None) -> Tensor:
    """Return the loss for the peers, which expect gradients of the size of training's."""
    return (y - torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).square().mean()


def by_initlab(model: nn.Module, x: Any) -> list[str]:
    return [p.layer for p in initlab.trace(model, x, loss=random_direction).problems()]


def by_torchdiag(model: nn.Module, x: Any) -> list[str]:
    import torchdiag

    called = Called(model)
    square(called(x)).backward()
    said = [n for n, s in torchdiag.check_gradients(called).items() if s["status"] != "OK"]
    dead = torchdiag.check_dead_neurons(called, x)
    said += [n for n, s in dead.items() if s["dead_pct"] > 20]  # where it warns
    sgd = torch.optim.SGD(called.parameters(), lr=1e-3)
    step = torchdiag.verify_step(called, sgd, square, x, None)
    if not step.get("params_updated") or not math.isfinite(step["loss"]):
        said.append("training step")
    return said


def by_torchmortem(model: nn.Module, x: Any) -> list[str]:
    import torchmortem

    called = Called(model)
    adam = torch.optim.Adam(called.parameters(), lr=1e-3)
    with torchmortem.Autopsy(called, optimizer=adam) as autopsy:
        for _ in range(10):
            adam.zero_grad()
            loss = square(called(x))
            loss.backward()
            adam.step()
            autopsy.step(loss=loss.item())
    findings = autopsy.get_report().findings
    return [n for f in findings if f.severity.name != "INFO" for n in f.affected_layers or ["all"]]


def peers(net: Network, seed: int) -> Iterator[dict[str, Any]]:
    """Show the same network, sound and with a fault, to each tool."""
    case = planted(net, seed)
    if "model" not in case:
        return
    model, x, row = case["model"], case["x"], case["row"]
    states = {
        "": case["sound"],
        row["fault"]: {n: v.clone() for n, v in model.state_dict().items()},
    }
    for tool in (by_initlab, by_torchdiag, by_torchmortem):
        known: set[str] = set()
        for fault, state in states.items():
            model.load_state_dict(state)
            model.zero_grad()
            torch.manual_seed(seed)
            start, result = time.process_time(), {}
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    said = [re.sub(r"^model\.", "", name) for name in tool(model, x)]
                new = set(said) - known
                result = {"said": "; ".join(said[:3]), "count": len(said), "found": bool(new)}
                result["named"] = bool(fault and new) and blamed(model, row["parameter"], said)
                known = set(said)
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:300]}
            seconds = f"{time.process_time() - start:.2f}"
            base = {"tool": tool.__name__.removeprefix("by_"), "fault": fault, "seconds": seconds}
            yield base | {"parameter": row["parameter"] if fault else ""} | result


# The record

COLUMNS = {
    "sound": "network library mode seed shape seconds rows seen problems error commit",
    "faults": "network library seed fault parameter weight next before after counts tried "
    "sound problems found named seconds rows seen error commit",
    "peers": "network library seed tool fault parameter said count found named seconds error "
    "commit",
}


def plan(part: str) -> Iterator[tuple[Network, dict[str, Any]]]:
    """Yield what is to be run, and how, that which says most first."""
    nets = [Network(**row) for row in read("networks")]
    if part == "sound":
        for mode, seed in (("train", 0), ("eval", 0), *(("train", s) for s in SEEDS[1:])):
            yield from ((net, {"mode": mode, "seed": seed}) for net in nets)
    else:
        some = random.Random(0).sample(nets, FAULTY)[: PEERS if part == "peers" else None]
        for draw in range(DRAWS if part == "faults" else 1):
            yield from ((net, {"seed": draw}) for net in some)


def survey(part: str, only: list[str], anew: bool) -> None:
    def chosen(network: str) -> bool:
        return not only or any(name in network for name in only)

    columns = COLUMNS[part].split()
    rows = [row for row in read(part) if not (anew and chosen(row["network"]))]
    done = {(row["network"], row.get("mode"), row["seed"]) for row in rows}
    command = ["git", "-C", str(Path(initlab.__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    with open(HERE / f"{part}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        for net, how in plan(part):
            key = (net.network, how.get("mode"), str(how["seed"]))
            if key in done or not chosen(net.network):
                continue
            same = {"network": net.network, "library": net.library, **how, "commit": commit}
            print("#", *key)
            try:
                for row in RUNS[part](net, **how):
                    writer.writerow(same | row)
            except Exception as error:  # not of the trace: the network was not built, or fed
                writer.writerow(same | {"error": f"no run: {type(error).__name__}: {error}"[:300]})
            file.flush()


def read(part: str) -> list[dict[str, str]]:
    path = HERE / f"{part}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def table(head: str, rows: Iterable[Sequence[Any]]) -> None:
    columns = head.split(", ")
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, cells))} |")
    print()


def yes(rows: list[dict[str, str]], *columns: str) -> list[int]:
    return [len(rows), *(sum(row[column] == "True" for row in rows) for column in columns)]


def summary() -> None:
    """Print the tables of the README."""
    right = [r for r in read("judged") if r["verdict"] == "true"]
    true = {(r["network"], mode, r["kind"]) for r in right for mode in r["mode"].split()}
    sound, faults, peers = map(read, RUNS)

    def of_mode(mode: str) -> list[Any]:
        rows = [r for r in sound if r["mode"] == mode]
        told = [
            {(r["network"], mode, p.rpartition(": ")[2]) for p in r["problems"].split("; ")}
            for r in rows
            if r["problems"]
        ]
        left = [{k for k in kinds if "(idle" not in k[2]} for kinds in told]
        idle, false = sum(not kinds for kinds in left), sum(not kinds <= true for kinds in left)
        failed = [r["error"] for r in rows if not r["error"].startswith("no run")]
        nets, share = (
            len({r["network"] for r in rows}),
            f"{false} ({false / max(len(rows), 1):.1%})",
        )
        return [mode, nets, len(rows), sum(map(bool, failed)), len(told), idle, share]

    def of_fault(column: str, value: str) -> list[Any]:
        some = [r for r in faults if r["fault"] and value in ("all", r[column])]
        parts = ([r for r in some if r["counts"] == counts] for counts in ("True", "False"))
        return [value, *(number for part in parts for number in yes(part, "found", "named"))]

    def of_tool(tool: str) -> list[Any]:
        rows = [r for r in peers if r["tool"] == tool]
        whole, faulty = ([r for r in rows if bool(r["fault"]) == f] for f in (False, True))
        seconds = sum(float(r["seconds"]) for r in rows) / max(len(rows), 1)
        crashes = sum(bool(r["error"]) for r in rows)
        found = [*yes(whole, "found"), *yes(faulty, "found", "named")]
        return [tool, *found, crashes, f"{seconds:.1f}"]

    head = "mode, networks, runs, crashes, with a verdict, idle BatchNorm, false or not judged"
    table(head, map(of_mode, ("train", "eval")))
    for column in ("fault", "weight"):
        values = [*sorted({r[column] for r in faults if r["fault"]}), "all"]
        head = f"{column}, counts, found, named, does not count, found, named"
        table(head, (of_fault(column, value) for value in values))
    head = "tool, sound, false alarms, faults, found, named, crashes, seconds a run"
    table(head, map(of_tool, ("initlab", "torchdiag", "torchmortem")))


RUNS: dict[str, Callable[..., Iterator[dict[str, Any]]]]
RUNS = {"sound": sound, "faults": faults, "peers": peers}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Survey the verdict on the networks of others.")
    parser.add_argument("part", choices=[*RUNS, "summary"])
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="of a network's name")
    parser.add_argument("--anew", action="store_true", help="make these rows again")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if args.part == "summary":
        summary()
    else:
        torch.set_num_threads(1)
        survey(args.part, args.only, args.anew)
