"""One training run: its network, its optimizer, and the row that it leaves in the record."""

import copy
import math
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from initlab import mnist
from initlab.init import gain, initialize_
from initlab.training.fit import accuracy, fit
from initlab.training.nets import Decoder, Reader, Residual, conv_stack, dense_stack
from initlab.training.record import BATCH, COLUMNS, EPOCH, LOOKS, RUN, Run

LOOK_PICTURES, LOOK_EVERY = 2000, 25  # to find the first step at the goal


@torch.random.fork_rng(devices=[])
def build(run: Run) -> nn.Module:
    """Return the network of a run, initialised, in training mode."""
    torch.manual_seed(run.seed)
    model = _as_torch_draws_it(run)
    if run.net in ("lstm", "gpt"):
        if run.scheme != "default":
            model.draw_as_gpt2_(scaled=run.scheme == "gpt2_scaled")
        return model
    generator = Generator().manual_seed(run.seed)
    if run.scheme == "lsuv":
        from lsuv import lsuv_with_singlebatch  # not needed otherwise

        lsuv_with_singlebatch(model, _data(run.data).x_train[:500], verbose=False)
    elif run.scheme == "default":
        initialize_(model, "default", bias=run.bias, generator=generator)
    elif run.scheme.startswith("kaiming"):
        a = 1.0 if run.gain else run.a
        initialize_(model, run.scheme, a, run.mode, run.bias, generator)
    else:
        initialize_(model, run.scheme, bias=run.bias, generator=generator, gain=gain(run.a))
    for layer in model.modules():
        if run.gain and isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data *= run.gain
        if run.zeroed and isinstance(layer, Residual):
            nn.init.zeros_(layer[-1].weight)
            nn.init.zeros_(layer[-1].bias)
    if run.drawn != "all":
        other = build(replace(run, scheme="default", bias="default", drawn="all", last=1.0))
        for layer, twin in zip(model.modules(), other.modules(), strict=True):
            if isinstance(layer, nn.Linear if run.drawn == "convolutions" else nn.Conv2d):
                layer.load_state_dict(twin.state_dict())
    for parameter in model[-1].parameters():
        parameter.data *= run.last
    # The faster order of the numbers in memory, by a sixth
    return model.train().to(memory_format=torch.channels_last)


def _as_torch_draws_it(run: Run) -> nn.Module:
    if run.net == "lstm":
        return Reader(run.depth, run.width, run.forget)
    if run.net == "gpt":
        return Decoder(run.depth, run.width)
    if run.net == "linear":
        return dense_stack(run.depth, run.width, run.slope)
    return conv_stack(
        run.depth,
        run.width,
        slope=run.slope,
        act=nn.GELU if run.act == "gelu" else None,
        norm=run.norm,
        residual=run.net == "residual",
        separable=run.net == "separable",
        downsample=2,
        classes=10,
        pooled=2,
    )


@cache
def _data(name: str) -> mnist.Splits:
    return sequences() if name == "sort" else getattr(mnist, f"load_{name}")()


def sequences() -> mnist.Splits:
    """Return 70,000 sequences of 16 digits to sort, split as MNIST is.

    The inputs are `(n, 32)` int64: digits drawn evenly and independently, the token 10, and the
    sorted digits but for the last. The labels are the sorted digits, `(n, 16)`.
    """
    drawn = torch.randint(10, (70_000, 16), generator=Generator().manual_seed(0))
    y = drawn.sort(1).values
    x = torch.cat([drawn, torch.full_like(y[:, :1], 10), y[:, :-1]], 1)
    train, valid, test = zip(*(v.split([50_000, 10_000, 10_000]) for v in (x, y)), strict=True)
    return mnist.Splits(*train, *valid, 0.0, 1.0, *test)


def _optimizer(run: Run, model: nn.Module) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return the optimizer of a run, and the schedule that is to follow each of its steps."""
    make = {
        "sgd": partial(torch.optim.SGD, momentum=0.9),
        "adam": partial(torch.optim.Adam, eps=run.eps),
        "adamw": partial(torch.optim.AdamW, eps=run.eps, weight_decay=run.weight_decay),
    }[run.optimizer]
    optimizer = make(model.parameters(), lr=run.rate, fused=True)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), run.clip)

    if run.clip < math.inf:
        optimizer.register_step_pre_hook(clip)

    def factor(done: int) -> float:
        if done < run.warmup:
            return (done + 1) / run.warmup
        turn = (done - run.warmup) / max(run.steps - run.warmup, 1)
        return (1 + math.cos(math.pi * turn)) / 2 if run.cosine else 1.0

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(run: Run) -> dict[str, Any]:
    """Train one network as `run` says, on one thread, and return its row of the record.

    It has the fields of `Run`, and what data/training/README.md explains: a look at the start, and
    at steps 1, 2, 4 ..., the first step at the goal, and the accuracies at the end. None is said of
    what did not come.

    Example:
        >>> record = train(Run(depth=2, steps=2))
        >>> record["diverged"], record["step_90"], round(record["loss_1"], 1)
        (False, None, 2.3)
    """
    data, threads = _data(run.data), torch.get_num_threads()
    x, y = data.x_valid[:LOOK_PICTURES], data.y_valid[:LOOK_PICTURES]
    torch.set_num_threads(1)
    try:
        model = build(run)
        record = asdict(run) | dict.fromkeys(COLUMNS[len(RUN) :])
        record["signal"], record["grad_rms"] = look(model, x[:500], y[:500])
        optimizer, schedule = _optimizer(run, model)

        def ended() -> bool:
            return run.steps > 3 * EPOCH and record["step_90"] is not None

        def after(step: int) -> bool:
            schedule.step()
            if step in LOOKS:
                record[f"valid_{step}"] = accuracy(model, x, y, 250)
            if record["step_90"] is None and step % LOOK_EVERY == 0:
                record["step_90"] = step if accuracy(model, x, y, 250) >= run.goal else None
            return ended()

        losses = fit(
            model,
            data.x_train,
            data.y_train,
            optimizer=optimizer,
            steps=run.steps,
            batch_size=BATCH,
            # Not the generator of the weights: all inits see the same order
            generator=Generator().manual_seed(run.seed),
            after=after,
        )
        finite = [loss for loss in losses if math.isfinite(loss)]
        record["diverged"] = len(finite) < run.steps and not ended()
        record |= {f"loss_{k}": losses[k - 1] for k in LOOKS if k <= len(finite)}
        record["valid_accuracy"] = accuracy(model, data.x_valid, data.y_valid, 250)
        record["test_accuracy"] = accuracy(model, data.x_test, data.y_test, 250)
    finally:
        torch.set_num_threads(threads)
    return record


def look(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return what a look at the start shows, in training mode; `model` is left as it is.

    The signal of the logits: their standard deviation across inputs, as in `trace`. And the rms of
    the gradient of the cross-entropy with respect to the first layer's weight.
    """
    probe = copy.deepcopy(model)
    logits = probe(x)
    nn.functional.cross_entropy(logits, y).backward()
    gradient = next(probe.parameters()).grad
    signal = logits.detach().double().var(0).mean().sqrt()
    return signal.item(), gradient.double().square().mean().sqrt().item()
