"""One pass through a model, watched: what multiplies data by a weight, and how large all gets.

Tensors are of three kinds, told by their storage: weights (parameters, and what is computed from
parameters and constants alone), data (what comes from the inputs), and constants (all else). Data
knows the rows that feed it, so rows form a graph along the data's own paths.
"""

import copy
import dataclasses
import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from initlab.diagnose.rows import LayerTrace, Weight
from initlab.init import gain

# Operations of aten that sum products with a weight, or pick its rows. Those of mkldnn and of
# quantised or grouped products have such a name in theirs.
LOOKUPS = {"embedding", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "linear", "_trilinear"}
PRODUCTS |= {"deform_conv2d", "_addmm_activation", "_grouped_mm", "_scaled_mm"} | LOOKUPS
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
RECURRENT |= {f"{name}_cell" for name in RECURRENT}
NORMS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")  # parts of names
# Those that put out 0 for all inputs far below 0, and pass no gradient there.
DYING = {"relu", "hardtanh", "hardswish", "hardsigmoid", "threshold", "gelu", "silu", "mish"}
ACTIVATIONS = DYING | {"leaky_relu", "_prelu_kernel", "rrelu_with_noise", "elu", "celu", "glu"}
ACTIVATIONS |= {"sigmoid", "tanh", "softplus", "log_sigmoid_forward", "softshrink", "hardshrink"}
# 1 / rms of f(z), z standard normal: what n Var(w) = gain^2 keeps at 1 before the activation.
SMOOTH = "gelu", "silu", "mish", "elu", "tanh", "hardswish"
GAINS = {name: gain(getattr(nn.functional, name)) for name in SMOOTH}
GAINS |= dict.fromkeys(("relu", "leaky_relu", "hardtanh"), gain(0.0))  # hardtanh as ReLU6 runs it
ROOTS = {"sqrt", "rsqrt", "std", "std_mean", "linalg_vector_norm", "norm"}  # norms divide by one
SMALL = 0.3  # a factor on purpose, as of LayerScale or SkipInit; those of norms begin at 1
SOFTMAX = {"_softmax", "_safe_softmax"}
CROSS_ENTROPY = {"nll_loss_forward", "nll_loss2d_forward"}
COPIES = {"clone", "_to_copy", "_unsafe_view"}
BLOCK = 1 << 16  # numbers that are made float64 at a time: they stay in the cache
# One trace at a time: two of one model would see each other's hooks, buffers and gradients.
ALONE = threading.RLock()


@dataclass(frozen=True, slots=True)
class Data:
    """What is known of a storage that holds data."""

    origins: frozenset[int] = frozenset()  # indices of the rows that feed it
    whole: int | None = None  # the row whose output it is, as it stands
    form: str = ""  # "root", as norms divide by; "shares", as a softmax makes; "product", of data
    scalar: float = 1.0  # the number that it was multiplied by last


Names = tuple[str, ...]  # of the parameters that a weight was made from


class Flow(TorchDispatchMode):
    """Follows the data through all operations, and drafts a row for each that counts."""

    def __init__(self, model: nn.Module, x: Any, trains: set[nn.Parameter]) -> None:
        super().__init__()
        self.paths = {m: _clean(name) for name, m in model.named_modules()}
        self.parameters = {_clean(name): p for name, p in model.named_parameters()}
        self.trained = {name for name, p in self.parameters.items() if p in trains}
        self.kinds: dict[int, Data | Names | None] = {_key(t): Data() for t in tensors(x)}
        self.places = defaultdict(list)  # of the parameters in each storage
        for name, p in self.parameters.items():
            start = p.storage_offset()
            self.places[_key(p)].append((start, start + p.numel(), name))
        # Of an object that hides its tensors, all that is not the model's is data.
        self.foreign = None if self.kinds else {_key(t) for t in model.buffers()}
        first = next((t for t in tensors(x) if t.is_floating_point()), next(tensors(x), None))
        self.n = len(first) if first is not None and first.dim() else 1
        self.running: list[nn.Module] = []
        self.rows: list[dict[str, Any]] = []
        self.weights: dict[tuple[Names, tuple[int, ...]], Weight] = {}
        self.as_data: int | None = None  # a weight that is given to a layer as its input
        self.paused = self.closed = False  # measuring; rows are complete
        self.guess: tuple[float, int] | None = None  # cross-entropy, and the number of classes

    def of(self, t: Tensor) -> Data | Names | None:
        """Return what is known of a tensor; None for constants."""
        key = _key(t)
        if key == self.as_data:
            return Data()
        if key in self.kinds:
            return self.kinds[key]
        if places := self.places.get(key):
            at = t.storage_offset()
            return tuple(n for a, b, n in places if a <= at < b) or tuple(n for *_, n in places)
        return Data() if self.foreign is not None and key not in self.foreign else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*args, **kwargs or {}) if self.paused else self.see(func, args, kwargs or {})

    def see(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run one operation, and note what its output is made of."""
        schema = getattr(func, "_schema", None)
        mutates = bool(schema and schema.is_mutable)
        op = (schema.name if schema else func.__name__).rpartition("::")[2]
        op = op.removesuffix("_") if mutates else op
        # What is lifted is a new constant, whose storage may have been another's before
        given = [(t, self.of(t)) for t in tensors((args, kwargs)) if op != "lift_fresh"]
        data = [(t, kind) for t, kind in given if isinstance(kind, Data)]
        names = (n for _, kind in given if isinstance(kind, tuple) for n in kind)
        new: Data | Names | None = tuple(dict.fromkeys(names)) or None
        row = None
        if data:
            new, own = _joined(op, args, data), frozenset((len(self.rows),))
            if not self.closed and (row := self.draft(func, op, args, kwargs, given, data)):
                row["parents"] = new.origins
                new = Data(own, None if op in RECURRENT else len(self.rows))
        self.paused = op in RECURRENT  # of which all parts are one row
        out = func(*args, **kwargs)
        self.paused = False
        before = () if mutates else {_key(t) for t, _ in given}  # views stay what they were
        for t in _written(schema, args, kwargs) if mutates else tensors(out):
            if _key(t) not in before:  # of integers only that they are data is known
                whole = t.is_floating_point() or not isinstance(new, Data)
                self.kinds[_key(t)] = new if whole else Data()
        y = first_float(out)
        if row is not None and y is not None:
            self.complete(row, y)
        elif self.closed and op in CROSS_ENTROPY and args[3] == 1:  # a mean
            self.guess = y.item(), args[0].shape[min(1, args[0].dim() - 1)]
        return out

    def draft(
        self, func: Any, op: str, args: tuple, kwargs: dict, given: list, data: list
    ) -> dict[str, Any] | None:
        """Begin a row, with what is measured before the operation runs."""
        inputs = [t for t, _ in data if t.is_floating_point() and t.numel()]
        x = inputs[0] if inputs else None
        first, kind = data[0]
        if (op in PRODUCTS or "conv" in op) and (found := self.weight(op, args, given)):
            weight, names = found
            row = {"role": "layer", "weights": (self.facts(op, args, weight, names),)}
            row |= {"names": names, "gated": kind.form == "product", "scalar": kind.scalar}
            if op in LOOKUPS:
                row["role"], x = "mixer", None
        elif op in RECURRENT:
            large = {n for _, names in given if isinstance(names, tuple) for n in names}
            names = tuple(n for n, p in self.parameters.items() if n in large and p.dim() > 1)
            facts = (self.facts("linear", (), self.parameters[n], (n,)) for n in names)
            row = {"role": "mixer", "names": names, "weights": tuple(facts)}
        elif x is None:
            return None
        elif any(part in op for part in NORMS) and "backward" not in op:
            row = {"role": "norm"}
            named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
            if named.get("training", "no_training" not in op) is False:
                mean, var = named.get("running_mean"), named.get("running_var")
                idle = mean is not None and not mean.any() and bool((var == 1).all())
                row = {"role": "affine", "idle": idle}
        elif op in ACTIVATIONS:
            row, x = {"role": "activation"}, None
        elif op == "mul" and (names := _small(given)):
            row = {"role": "affine", "names": names}
        elif op in ("mul", "div") and {kind.form == "root" for _, kind in data} == {True, False}:
            row, x = {"role": "norm"}, next(t for t, kind in data if kind.form != "root")
        else:
            return None
        size: dict[str, Any] = {}
        if kind.whole is not None and first.numel() == math.prod(self.rows[kind.whole]["shape"]):
            size = self.rows[kind.whole]
        elif x is not None:
            size = measured(x, self.n)
        row |= {f"in_{name}": size[name] for name in ("rms", "signal") if size}
        if self.as_data is not None and _key(first) == self.as_data:
            row |= {"learned": True, "in_signal": math.nan}
        return row | {"op": op, "clipped": op == "hardtanh" and args[1:2] != (0,)}

    def weight(self, op: str, args: tuple, given: list) -> tuple[Tensor, Names] | None:
        """Return the tensor that data is multiplied by, if parameters of 2 dimensions made it."""
        for t, names in given:
            if isinstance(names, tuple) and t.dim() > 1:
                large = any(self.parameters[n].dim() > 1 for n in names)
                if large and (op not in LOOKUPS or t is args[0]):
                    return t, names
        return None

    def facts(self, op: str, args: tuple, t: Tensor, names: Names) -> Weight:
        """Return what is known of a weight; measured once, by at most about 260,000 entries."""
        if (key := (names, tuple(t.shape))) in self.weights:
            return self.weights[key]
        units, share = t.detach(), 1
        if "conv" in op and len(args) > 6 and args[6] is True:  # transposed
            units, share = units.transpose(0, 1), math.prod(args[3]) * args[8]
        elif op in PRODUCTS - LOOKUPS - {"linear", "_trilinear"}:  # (..., units, entries)
            right = [a for a in args if isinstance(a, Tensor)][-1] is t
            units = units.transpose(-1, -2) if right else units
        units = units if "mm" in op and units.dim() > 2 else units.flatten(1)
        fan_in = 1 if op in LOOKUPS else max(1, units.shape[-1] // share)
        sample = units.reshape(-1)[:: (units.numel() >> 18) | 1].double()
        # The first row of an embedding may be that of the padding.
        last, others = units[..., -1:, :], units[..., 1 if fan_in == 1 else 0 : -1, :]
        equal = others.shape[-2] > 0 and torch.equal(others[..., :1, :], last)
        equal = equal and bool((others == last).all())
        mean, std = sample.mean().item(), sample.std(correction=0).item()
        trains = not self.trained.isdisjoint(names)
        made = Weight(names, units.numel(), fan_in, mean, std, equal, trains)
        return self.weights.setdefault(key, made)

    def complete(self, row: dict[str, Any], y: Tensor) -> None:
        """Add a row, with what is measured after the operation."""
        row |= {"module": self.running[-1] if self.running else None, "output": y}
        row |= {"shape": tuple(y.shape), **measured(y, self.n)}
        if row.get("learned"):  # it does not depend on the inputs
            row["signal"] = math.nan
        axis = 1 if "conv" in row["op"] or "batch_norm" in row["op"] or "group" in row["op"] else -1
        sources = [self.rows[i] for i in row["parents"]]
        if row["role"] in ("activation", "norm") and sources:
            axis, size = sources[-1]["axis"], sources[-1]["features"]
            if y.dim() <= abs(axis) or y.shape[axis] != size:
                flat = math.prod(y.shape[1:]) == size
                axis = 0 if flat else -1 if y.shape[-1] == size else axis
        axis = min(axis, y.dim() - 1)
        row |= {"axis": axis, "features": math.prod(y.shape[1:]) if axis == 0 else y.shape[axis]}
        if row["role"] == "activation" and row["op"] in DYING and not row["clipped"]:
            others = [0] if axis == 0 else [d for d in range(y.dim()) if d != axis % y.dim()]
            v = y.detach()
            high = v.amax(others) if others else v
            row["dead"] = 0.0
            if bool((high == 0).any()):
                low = v.amin(others) if others else v
                row["above"] = int((low > 0).sum())
                row["dead"] = ((high == 0) & (low == 0)).double().mean().item()
        self.rows.append(row)

    def settle(self, start: int, call: str, out: Any) -> None:
        """Hook the gradients of rows whose function has returned, with the shape it returned."""
        for row in self.rows[start:]:
            if (y := row.pop("output", None)) is None:
                continue
            same = (t for t in tensors(out) if t.numel() == y.numel() and _key(t) == _key(y))
            if (outer := next(same, None)) is not None:
                y = outer
                if len(self.rows) == start + 1:
                    row |= {"shape": tuple(outer.shape), "call": call}
            if y.requires_grad:
                # Such a hook still sees the gradient of this value when y is overwritten in place.
                y.register_hook(lambda g, row=row: row.update(grad_rms=rms(g)))


class Watch(TorchFunctionMode):
    """Sees the calls of functions, around the operations that they consist of."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        flow, name, kwargs = self.flow, getattr(func, "__name__", ""), kwargs or {}
        start = len(flow.rows)
        # Tokens that are learned are data to a layer.
        if name in ("linear", "conv1d", "conv2d", "conv3d") and isinstance(flow.of(args[0]), tuple):
            flow.as_data = _key(args[0])
        try:
            recurs = name in RECURRENT
            out = flow.see(func, args, kwargs) if recurs else func(*args, **kwargs)
            flow.paused = True
            if recurs and len(flow.rows) > start and torch.is_grad_enabled():
                flow.rows[-1]["memory"] = _memory(func, args, kwargs)
            flow.settle(start, name, out)
        finally:
            flow.paused, flow.as_data = False, None
        return out


def watched(
    model: nn.Module, x: Any, target: Any, loss: Callable[..., Tensor] | None
) -> tuple[list[LayerTrace], dict[str, Any]]:
    """Run the model once; return its rows, and what else the verdict needs to know."""
    while isinstance(inner := _wrapped(model), nn.Module):
        model = inner
    _refuse(model, x)
    parameters = [p for p in model.parameters() if p.is_floating_point() or p.is_complex()]
    starts: list[Tensor] = []

    def fresh(t: Tensor) -> Tensor:
        t = t.detach().clone()
        if loss is None or parameters or not t.is_floating_point():
            return t
        starts.append(t.requires_grad_())
        return t.clone()  # which the model may change in place

    with ALONE, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        devices = {t.device for t in (*tensors(x), *model.parameters()) if t.is_cuda}
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.set_grad_enabled(loss is not None))
        copies = copy.deepcopy(x, {id(t): fresh(t) for t in tensors(x)})
        trained = {p for p in parameters if p.requires_grad}
        _keep(stack, model, loss is not None)
        flow = Flow(model, copies, trained)
        args, kwargs = ((), dict(copies)) if isinstance(copies, Mapping) else (copies, {})
        args = args if isinstance(args, tuple | list) else (args,)
        torch.clear_autocast_cache()  # its copies of the weights would be strangers
        stack.callback(torch.clear_autocast_cache)
        _listen(stack, flow)
        with flow, Watch(flow):
            output = model(*args, **kwargs)
            flow.closed = True
            if not flow.rows:
                raise ValueError("no layer or activation ran: nothing to trace")
            value = None
            if loss is not None:
                value = loss(output) if target is None else loss(output, target)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
                    raise ValueError(f"the loss must be a scalar tensor, got {got}")
            ends = [flow.of(t) for t in tensors(output if value is None else value)]
        made = [t for t in tensors(output) if t.is_floating_point() and t.numel()]
        made = [t for t in made if isinstance(flow.of(t), Data)]
        info: dict[str, Any] = {
            "n": flow.n,
            "ends": frozenset().union(*(k.origins for k in ends if isinstance(k, Data))),
            "sizes": {n: p.numel() for n, p in flow.parameters.items() if p.dim() > 1},
            "trained": _trained(model),
            "graded": loss is not None,
            "guess": flow.guess,
            "outputs": [measured(t, flow.n) for t in made],
        }
        grads: dict[str, float] = {}
        if value is not None:
            if not value.requires_grad:
                raise ValueError("the loss does not depend on any layer or parameter")
            grads = _gradients(value, flow, starts)
    return _named(flow, grads), info


def _wrapped(model: nn.Module) -> Any:
    """Return what torch.compile, or DataParallel and its kin, wrap."""
    module = getattr(model, "module", None) if hasattr(model, "device_ids") else None
    return getattr(model, "_orig_mod", module)


def _refuse(model: nn.Module, x: Any) -> None:
    for name, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            what = f"{name or 'the model'} is a {type(m).__name__}"
            raise ValueError(f"{what}, which hides its operations; trace what it was made from")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has layers without a shape (lazy); run it once")
    if any(t.is_meta for t in (*tensors(x), *model.parameters(), *model.buffers())):
        raise ValueError("model or x is on the meta device, which holds no numbers")
    if empty := [tuple(t.shape) for t in tensors(x) if not t.numel()]:
        raise ValueError(f"x is empty, of shape {empty[0]}")


def _keep(stack: ExitStack, model: nn.Module, backward: bool) -> None:
    """Let copies take the buffers' places; meanwhile frozen parameters pass gradients on."""
    copies = {b: b.detach().clone() for b in model.buffers()}
    for m in model.modules():
        # Not by setattr, which a compiled module hands on to what it wraps
        stack.callback(m.__dict__.update, _buffers=m._buffers)
        m.__dict__["_buffers"] = {n: copies.get(b, b) for n, b in m._buffers.items()}
    for p in model.parameters() if backward else ():
        if not p.requires_grad and p.is_leaf and (p.is_floating_point() or p.is_complex()):
            stack.callback(p.requires_grad_, False)
            p.requires_grad_()


def _listen(stack: ExitStack, flow: Flow) -> None:
    """Let the flow know which module runs, also where one raises and the model catches that."""

    def before(module: nn.Module, _args: Any) -> None:
        flow.running.append(module)

    def after(*_: Any) -> None:
        flow.running.pop()

    for m in flow.paths:
        if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(m.register_forward_pre_hook(before, prepend=True))
        stack.enter_context(m.register_forward_hook(after, always_call=True))


def _gradients(value: Tensor, flow: Flow, starts: list[Tensor]) -> dict[str, float]:
    """Return the rms of the gradient of each parameter that trains; rows hook their own."""
    named = {n: p for n, p in flow.parameters.items() if p.requires_grad}
    if not _reenters(value):
        # Not value.backward(): that adds to the .grad of parameters, and runs what hooks on it.
        grads = torch.autograd.grad(value, [*named.values(), *starts], allow_unused=True)
    else:  # as reentrant checkpointing asks for
        before = [(p, p.grad) for p in named.values()]
        try:
            for p in named.values():
                p.grad = None
            value.backward()
            grads = tuple(p.grad for p in named.values())
        finally:
            for p, grad in before:
                p.grad = grad
    return {n: rms(g) for n, g in zip(named, grads, strict=False) if g is not None}


def _reenters(value: Tensor) -> bool:
    seen, todo = set(), [value.grad_fn]
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        todo += [n for n, _ in node.next_functions]
    return False


def _named(flow: Flow, grads: dict[str, float]) -> list[LayerTrace]:
    """Return the rows that were drafted, with their names, and what their weights ask for."""
    calls: Counter[str] = Counter()
    fields = {f.name for f in dataclasses.fields(LayerTrace)}
    after = defaultdict(list)
    for row in flow.rows:
        for i in row["parents"]:
            after[i].append(row)
    rows = []
    for i, row in enumerate(flow.rows):
        name, row["kind"] = _name(flow, row)
        calls[name] += 1
        row["name"] = name + (f"#{calls[name]}" if calls[name] > 1 else "")
        row["parents"] = tuple(sorted(row["parents"]))
        weights = []
        for w in row.get("weights", ()):
            largest = max((grads[n] for n in w.names if n in grads), default=None)
            weights.append(dataclasses.replace(w, grad_rms=largest))
        row["weights"] = tuple(weights)
        if weights:
            names, row["weight_std"] = weights[0].names[:1], weights[0].std
            if row["role"] == "layer":
                op = after[i][0]["op"] if len(after[i]) == 1 else ""
                row["asked_std"] = GAINS.get(op, 1.0) / math.sqrt(weights[0].fan_in)
        else:
            own = row["module"]._parameters.get("weight") if row["module"] is not None else None
            names = tuple(n for n, p in flow.parameters.items() if p is own)
        if not flow.trained.isdisjoint(names):
            row["weight_grad_rms"] = grads.get(names[0])
        rows.append(LayerTrace(**{k: v for k, v in row.items() if k in fields}))
    return rows


def _name(flow: Flow, row: dict[str, Any]) -> tuple[str, str]:
    """Return name and kind of a row: those of its module, or of a parameter or function in it."""
    module, names = row["module"], row.get("names", ())
    call = row.get("call", row["op"]).strip("_").replace("_", "")
    if module is None:
        return call, call
    path, kind = flow.paths[module], type(module).__name__
    prefix = f"{path}." if path else ""
    own = dict(module.named_parameters(recurse=False))
    if not names:
        weighed = any(p.dim() > 1 for p in own.values())
        leaf = not any(True for _ in module.children())
        normed = row["role"] in ("norm", "affine") and own
        return (path or kind, kind) if not weighed and (leaf or normed) else (prefix + call, call)
    if len(names) > 1:
        inside = all(n.startswith(prefix) for n in names)
        return (path or kind, kind) if inside else (names[0].rpartition(".")[0], call)
    tied = next((n for n, p in own.items() if p is flow.parameters[names[0]]), None)
    full = names[0] if tied is None else prefix + tied
    full = re.sub(r"parametrizations\.(\w+)\.original\d?", r"\1", full)
    short = full.removesuffix(".weight") if full != "weight" else ""
    return (path or kind, kind) if short == path else (short or kind, call)


def _clean(name: str) -> str:
    """Return a qualified name as it is without torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _trained(model: nn.Module) -> bool:
    """Return whether a norm's weight is not constant, as each is before training."""
    norms = (m for m in model.modules() if "Norm" in type(m).__name__)
    weights = (w for m in norms for w in m._parameters.values() if w is not None)
    return any(w.dim() == 1 and len(w) > 1 and bool((w != w[0]).any()) for w in weights)


def measured(y: Tensor, n: int) -> dict[str, float]:
    """Return mean, std, rms and signal of y, with sums in float64, block by block."""
    v = _by_input(y.detach(), n)
    n, size = v.shape
    means, squares = _sums(v)
    shared = n * torch.dot(means, means)
    within = squares - shared
    if n > 1 and not within > 1e-6 * squares:  # else rounding counts: again, from the first input
        shifts, apart = _sums(v, v[0])
        within = apart - n * torch.dot(shifts, shifts)
    mean = means.mean()
    means -= mean
    between = n * torch.dot(means, means)
    count = v.numel()
    variances = (within + between) / (count - 1 or math.nan), within / (count - size or math.nan)
    std, signal = (math.sqrt(max(0.0, s)) if s == s else math.nan for s in map(float, variances))
    rms = (squares / count).sqrt().item()
    return {"mean": mean.item(), "std": std, "rms": rms, "signal": signal}


def _blocks(v: Tensor, origin: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the columns of v (n, size), less its origin, as (n, columns) in float64."""
    on = torch.device("cpu") if v.device.type == "mps" else v.device  # mps has no float64
    width = max(1, BLOCK * (64 if on.type != "cpu" else 1) // len(v))
    space = torch.empty(len(v) * min(width, v.shape[1]), dtype=torch.float64, device=on)
    for start in range(0, v.shape[1], width):
        part = v[:, start : start + width]
        block = space[: part.numel()].view(part.shape).copy_(part)
        if origin is not None:
            block -= origin[start : start + width].to(block)
        yield slice(start, start + width), block


def _sums(v: Tensor, origin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return, of v (n, size) less its origin, the means over n, and the sum of all squares."""
    n, means, total = len(v), None, 0.0
    for columns, block in _blocks(v, origin):
        if means is None:
            means, share = block.new_empty(v.shape[1]), block.new_full((n,), 1 / n)
        torch.mv(block.t(), share, out=means[columns])
        total = total + torch.dot(block.view(-1), block.view(-1))
    return means, total


def rms(g: Tensor) -> float:
    """Return the root mean square of a tensor, dense or sparse."""
    v = _by_input((g.coalesce().values() if g.is_sparse else g).detach(), 1)
    total = sum(torch.dot(block[0], block[0]).item() for _, block in _blocks(v))
    return math.sqrt(total / max(g.numel(), 1))


def _by_input(y: Tensor, n: int) -> Tensor:
    """Return y as (n, all else): n is the first dimension, or a factor of it, or the second."""
    y = torch.view_as_real(y) if y.is_complex() else torch.atleast_1d(y)
    if y.shape[0] % n and y.dim() > 1 and y.shape[1] == n:
        y = y.transpose(0, 1)
    elif y.shape[0] % n:
        n = y.shape[0]
    # In the order of memory, which needs no copy
    y = y.permute(0, *sorted(range(1, y.dim()), key=lambda d: -y.stride(d)))
    return y.reshape(n, -1)


def _memory(func: Callable, args: tuple, kwargs: dict) -> float | None:
    """Return the rms of a gradient from the last step at the first step, over that at the last.

    None for cells, for packed sequences and for a single step.
    """
    x, batch_first = args[0], args[-1]
    if not isinstance(batch_first, bool) or x.dim() != 3:
        return None
    steps = 1 if batch_first else 0
    x = x.detach().requires_grad_()
    last = func(x, *args[1:], **kwargs)[0].select(steps, -1)
    last = last[:, : last.shape[1] // (2 if args[-2] else 1)]  # forward in time
    weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(0)).to(last)
    (grad,) = torch.autograd.grad((last * weights).sum(), x)
    now = rms(grad.select(steps, -1))
    return rms(grad.select(steps, 0)) / now if x.shape[steps] > 1 and now else None


def _joined(op: str, args: tuple, data: list[tuple[Tensor, Data]]) -> Data:
    """Return what the output of an operation is that makes no row."""
    if "scaled_dot_product" in op:  # the values are averaged, queries and keys only choose
        data = [(t, kind) for t, kind in data if t is args[2]] or data
    if len({kind.form for _, kind in data}) > 1:
        data = [(t, kind) for t, kind in data if kind.form != "shares"]
    forms = {kind.form for _, kind in data}
    origins = frozenset().union(*(kind.origins for _, kind in data))
    form, scalar = forms.pop() if len(forms) == 1 else "", 1.0
    if op in ROOTS or (op == "pow" and args[1] in (0.5, -0.5)):
        form = "root"
    elif op in SOFTMAX:
        form = "shares"
    elif op == "mul" and any(kind.origins != origins for _, kind in data):
        form = "product"
    if len(data) == 1 and op in COPIES:
        scalar = data[0][1].scalar
    elif len(data) == 1 and op in ("mul", "div") and isinstance(args[1], int | float):
        scalar = data[0][1].scalar * (args[1] if op == "mul" else 1 / (args[1] or 1.0))
    return Data(origins, None, form, scalar)


def _small(given: list[tuple[Tensor, Any]]) -> Names:
    """Return the parameters of a small factor for each channel, as LayerScale has."""
    found = (names for t, names in given if isinstance(names, tuple) and rms(t) < SMALL)
    return next(found, ())


def _written(schema: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Yield the tensors that an operation overwrites."""
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(args[i] if i < len(args) else kwargs.get(argument.name))


def _key(t: Tensor) -> int:
    try:
        return t.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse
        return id(t)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, item.name) for item in dataclasses.fields(value)])


def first_float(value: Any) -> Tensor | None:
    """Return the first tensor of real or complex numbers that is not empty."""
    floats = (t for t in tensors(value) if t.is_floating_point() or t.is_complex())
    return next((t for t in floats if t.numel()), None)
