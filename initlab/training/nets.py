"""The networks of the experiment: stacks of convolutions or linear layers, an LSTM, a GPT."""

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from initlab.init import check_known


class FrozenStatistics(nn.BatchNorm2d):
    """A BatchNorm that stays in eval mode: from the start, it only scales and shifts."""

    def train(self, mode: bool = True) -> "FrozenStatistics":
        return super().train(False)


NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "none": lambda channels: [],
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "frozen": lambda channels: [FrozenStatistics(channels).eval()],
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
    act: Callable[[], nn.Module] | None = None,
    norm: Literal["none", "batch", "frozen", "group"] = "none",
    residual: bool = False,
    separable: bool = False,
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
        act: Makes an activation, such as `nn.GELU`, in place of these.
        norm: "batch" puts `nn.BatchNorm2d` after each convolution, "frozen" one that stays in eval
            mode, "group" `nn.GroupNorm` with one group, which normalises each picture over its
            channels and positions.
        residual: Turns each pair of convolutions after the strided ones, or after the first if
            none is, into a `Residual` of convolution, activation, convolution. Nothing follows
            the sum, as in He et al. 2016, arXiv 1603.05027.
        separable: Turns each convolution but the first into a depthwise one, norm, activation, and
            one of 1 x 1, as in Howard et al. 2017, arXiv 1704.04861.
        downsample: How many of the first convolutions have stride 2.
        classes: Ends in average pooling and `nn.Linear`: output `(n, classes)`.
        pooled: Height and width left by that pooling.

    Raises:
        ValueError: If not 1 <= depth and 0 <= downsample <= depth, if the convolutions left for
            residual blocks do not pair, or if `norm` is unknown.

    Example:
        >>> model = conv_stack(2, channels=8, downsample=1, classes=10)
        >>> " ".join(type(layer).__name__ for layer in model)
        'Conv2d ReLU Conv2d ReLU AdaptiveAvgPool2d Flatten Linear'
        >>> model(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """
    if depth < 1 or not 0 <= downsample <= depth:
        raise ValueError(f"need depth >= 1 and 0 <= downsample <= depth, got {depth}, {downsample}")
    check_known("norm", norm, tuple(NORMS))
    stem = max(downsample, 1) if residual else depth
    if (depth - stem) % 2:
        raise ValueError(f"{depth - stem} convolutions after the first {stem} do not pair")

    act = act or (lambda: _relu(slope))

    def conv(index: int) -> list[nn.Module]:
        stride, norms = 2 if index < downsample else 1, NORMS[norm]
        if separable and index:
            depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels)
            pointwise = nn.Conv2d(channels, channels, 1)
            return [depthwise, *norms(channels), act(), pointwise, *norms(channels)]
        layer = nn.Conv2d(channels if index else 1, channels, 3, stride, padding=1)
        return [layer, *norms(channels)]

    layers = [layer for index in range(stem) for layer in (*conv(index), act())]
    for index in range(stem, depth, 2):
        layers.append(Residual(*conv(index), act(), *conv(index + 1)))
    if classes is not None:
        head = nn.Linear(channels * pooled**2, classes)
        layers += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten(), head]
    return nn.Sequential(*layers)


def dense_stack(depth: int, width: int, slope: float = 0.0) -> nn.Sequential:
    """Stack `depth` hidden linear layers, a (leaky) ReLU after each: (n, 1, 28, 28) to (n, 10)."""
    sizes = [28 * 28, *[width] * depth]
    hidden = [m for pair in itertools.pairwise(sizes) for m in (nn.Linear(*pair), _relu(slope))]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _relu(slope: float) -> nn.Module:
    return nn.LeakyReLU(slope) if slope else nn.ReLU()


class Reader(nn.Module):
    """An LSTM that reads a picture in `steps` pieces, and names its digit after the last.

    Maps `(n, 1, 28, 28)` to logits `(n, 10)`. In 28 steps it reads rows; in 98, pairs of pixels of
    the picture pooled to 14 x 14.
    """

    def __init__(self, steps: int, width: int, forget: float = 0.0) -> None:
        super().__init__()
        self.steps, self.pool = steps, 1 if steps == 28 else 2
        self.lstm = nn.LSTM(28 * 28 // self.pool**2 // steps, width, batch_first=True)
        self.head = nn.Linear(width, 10)
        if forget:
            for bias, value in ((self.lstm.bias_ih_l0, forget), (self.lstm.bias_hh_l0, 0.0)):
                nn.init.constant_(bias[width : 2 * width], value)  # gates: in, forget, cell, out

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(x, self.pool).reshape(len(x), self.steps, -1)
        return self.head(self.lstm(x)[0][:, -1])


class Decoder(nn.Module):
    """A small GPT: pre-norm blocks of causal attention and GELU, as PyTorch draws them.

    Maps tokens `(n, 2 k)`, those of `sequences`, to logits `(n, 10, k)`.

    Source: Radford et al. 2019, Language models are unsupervised multitask learners.
    """

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, width), nn.Embedding(32, width)
        settings = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(  # not nn.TransformerEncoder, whose layers are copies
            nn.TransformerEncoderLayer(width, 4, 4 * width, **settings) for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h, length = self.token(x) + self.place.weight[: x.shape[1]], x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            h = block(h, mask)
        return self.head(self.norm(h[:, length // 2 :])).transpose(1, 2)

    @torch.no_grad()
    def draw_as_gpt2_(self, scaled: bool) -> None:
        """Draw all matrices from N(0, 0.02^2), or smaller where a branch ends; biases are 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends = name.endswith(("out_proj.weight", "linear2.weight"))
                shrink = math.sqrt(2 * len(self.blocks)) if scaled and ends else 1.0
                nn.init.normal_(parameter, 0, 0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
