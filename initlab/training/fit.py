"""A short loop to train a classifier, and its accuracy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    after: Callable[[int], bool | None] | None = None,
) -> list[float]:
    """Train the model, in training mode, and return the cross-entropy before each step.

    `x` is `(n, ...)`, `y` `(n, ...)` int64, the model's output logits `(batch_size, classes, ...)`.
    An epoch is a new order of the inputs, drawn from `generator` and cut into whole batches. All
    are drawn first, so that generators seeded alike give the same batches and end alike. A loss
    that is not finite ends the training, as does `after(step)`, called after each step from 1 on,
    if it returns True; the losses not computed are `nan`. Raises a ValueError if `x` and `y` differ
    in length or hold less than a batch.

    Example:
        >>> model, x = nn.Linear(1, 2), torch.linspace(-1, 1, 20)[:, None]
        >>> y, _ = (x[:, 0] > 0).long(), nn.init.zeros_(model.weight)
        >>> sgd, g = torch.optim.SGD(model.parameters(), lr=1.0), torch.Generator().manual_seed(0)
        >>> losses = fit(model, x, y, optimizer=sgd, steps=50, batch_size=9, generator=g)
        >>> len(losses), losses[-1] < losses[0], accuracy(model, x, y) > 0.8
        (50, True, True)
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} inputs but {len(y)} labels")
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"a batch of {batch_size} from {len(x)} inputs")
    whole = len(x) // batch_size
    orders = [torch.randperm(len(x), generator=generator) for _ in range(0, steps, whole)]
    batches = [b for order in orders for b in order[: whole * batch_size].split(batch_size)][:steps]
    losses = [float("nan")] * steps
    with _mode(model, training=True):
        for step, batch in enumerate(batches):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            losses[step] = loss.item()
            if not loss.isfinite():
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if after is not None and after(step + 1):
                break
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Return the fraction of labels whose logit is the largest.

    `x` is `(n, ...)`, `y` `(n, ...)`, logits are `(n, classes, ...)`. The model runs in evaluation
    mode and is put back in its own. Logits that hold a `nan` are a wrong answer. Raises a
    ValueError if `x` and `y` differ in length or are empty.

    Example:
        >>> accuracy(nn.Identity(), torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        0.5
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} inputs but {len(y)} labels")
    right = 0
    with _mode(model, training=False):
        for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            logits = model(inputs)
            # argmax alone would take a nan for the largest, and find class 0 at chance.
            right += int(((logits.argmax(1) == labels) & ~logits.isnan().any(1)).sum())
    return right / y.numel()


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    # Module by module: a model in training mode may hold a BatchNorm put in evaluation mode.
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
