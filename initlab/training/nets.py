"""The networks of the experiment: stacks of convolutions or of linear layers."""

import itertools
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "none": lambda channels: [],
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "group": lambda channels: [nn.GroupNorm(1, channels)],
}


class Residual(nn.Sequential):
    """A sequence of layers whose output is added to its input, `x + branch(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return a layer, or some of them as a plain sequence: what is left adds nothing."""
        layers = super().__getitem__(index)
        return nn.Sequential(*layers) if isinstance(index, slice) else layers


def conv_stack(
    depth: int,
    channels: int = 32,
    *,
    slope: float = 0.0,
    norm: Literal["none", "batch", "group"] = "none",
    residual: bool = False,
    downsample: int = 0,
    classes: int | None = None,
    pooled: int = 1,
) -> nn.Sequential:
    """Stack `depth` 3x3 convolutions with padding 1, a (leaky) ReLU after each.

    Maps `(n, 1, h, w)` to `(n, channels, h, w)`. All layers keep PyTorch's default init.

    Args:
        depth: Number of convolutions.
        channels: Filters of each.
        slope: Slope of the activation below 0; 0 gives `nn.ReLU`.
        norm: "batch" puts `nn.BatchNorm2d` after each convolution, "group" `nn.GroupNorm` with one
            group, which normalises each picture over its channels and positions.
        residual: Turns each pair of convolutions after the strided ones, or after the first if
            none is, into a `Residual` of convolution, activation, convolution. Nothing follows
            the sum, as in He et al. 2016, arXiv 1603.05027.
        downsample: How many of the first convolutions have stride 2.
        classes: Ends in average pooling and `nn.Linear`: output `(n, classes)`.
        pooled: Height and width left by that pooling.

    Raises:
        ValueError: If not 1 <= depth and 0 <= downsample <= depth, if the convolutions left for
            residual blocks do not pair, or if `norm` is unknown.

    Example:
        >>> import torch
        >>> model = conv_stack(2, channels=8, downsample=1, classes=10)
        >>> " ".join(type(layer).__name__ for layer in model)
        'Conv2d ReLU Conv2d ReLU AdaptiveAvgPool2d Flatten Linear'
        >>> model(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    if depth < 1 or not 0 <= downsample <= depth:
        raise ValueError(f"need depth >= 1 and 0 <= downsample <= depth, got {depth}, {downsample}")
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; known are {', '.join(NORMS)}")
    stem = max(downsample, 1) if residual else depth
    if (depth - stem) % 2:
        raise ValueError(f"{depth - stem} convolutions after the first {stem} do not pair")

    def conv(index: int) -> list[nn.Module]:
        stride = 2 if index < downsample else 1
        layer = nn.Conv2d(channels if index else 1, channels, 3, stride, padding=1)
        return [layer, *NORMS[norm](channels)]

    layers = [layer for index in range(stem) for layer in (*conv(index), _act(slope))]
    for index in range(stem, depth, 2):
        layers.append(Residual(*conv(index), _act(slope), *conv(index + 1)))
    if classes is not None:
        head = nn.Linear(channels * pooled**2, classes)
        layers += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), head]
    return nn.Sequential(*layers)


def dense_stack(depth: int, width: int, *, slope: float = 0.0) -> nn.Sequential:
    """Stack `depth` hidden linear layers, a (leaky) ReLU after each, for pictures of 28 x 28.

    Maps `(n, 1, 28, 28)` to 10 logits, `(n, 10)`.

    Example:
        >>> import torch
        >>> dense_stack(2, 5)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """
    sizes = [28 * 28, *[width] * depth]
    hidden = [m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), _act(slope))]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _act(slope: float) -> nn.Module:
    return nn.LeakyReLU(slope) if slope else nn.ReLU()
