"""What a trace holds: a row for each operation that was measured, and the problems found."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# A signal below this share of the rms is rounding: float32 has an eps of 1.2e-7.
ROUNDING = 1e-6

ADVICE = {
    "not finite": "Look at its weights and at its input.",
    "dead": "Start its biases at 0; if training did this, start again with a lower rate.",
    "constant": "Draw its weights at random; zeros are fine only where a residual branch ends.",
    "equal units": "Draw its weights at random: equal units get equal gradients and stay equal.",
    "mean": "Draw its weights with mean 0.",
    "scale": "Draw its weights on the scale that their fan_in asks for.",
    "shrinks": "Draw the weights by fan_in with the gain of the activation.",
    "grows": "Draw the weights by fan_in with the gain of the activation.",
    "alike": "Start the biases at 0, and look for a mean that is large against the differences.",
    "input scale": "Scale the inputs to a mean square near 1 before the first layer.",
    "loud output": "Draw the last layer smaller.",
    "silent output": "Look at what comes after it: a softmax over one value, rounding, a factor 0.",
    "no gradient": "Let the loss reach it (detach, no_grad, argmax cut the graph).",
    "gradient vanishes": "Draw the weights with the gain of the activation.",
    "gradient explodes": "Draw smaller weights in the layers before it.",
    "forgets": "Start the forget gate's bias at 1 or above, or the recurrent weight orthogonal.",
}
IDLE = "BatchNorm in eval mode does nothing before training: look at train mode."


@dataclass(frozen=True)
class Weight:
    """A weight that an operation multiplied by, as it was given (after a reparametrisation)."""

    names: tuple[str, ...]  # qualified names of the parameters that it was made from
    numel: int
    fan_in: int  # how many products each output sums
    mean: float
    std: float
    equal: bool = False  # whether all of its units, of 2 or more, are the same
    trains: bool = True  # whether one of its parameters requires a gradient
    grad_rms: float | None = None  # of its parameters over all uses, the largest; or None


def _hidden(default: Any) -> Any:
    return field(default=default, repr=False)


@dataclass(frozen=True)
class LayerTrace:
    """The numbers of one operation: a weight that multiplies data, an activation or a norm.

    Attributes:
        name: Qualified name of the module whose operation it is, or of the parameter without
            `".weight"`; the class if the model is itself the layer; `"act#2"` for the second call,
            `"block.relu"` for a function that the module `"block"` calls.
        kind: Class name of that module, or name of the function.
        shape: Shape of the output.
        mean: Mean of the output over everything: inputs, channels, positions.
        std: Its unbiased standard deviation over everything.
        rms: Its root mean square.
        signal: Standard deviation *across inputs*: root of the mean, over channels and positions,
            of the unbiased variance; `nan` for a single input.
        grad_rms: Rms of the gradient of the loss with respect to the output; None without a loss
            or when the loss does not depend on the output.
        weight_grad_rms: The same for the first of its weights, summed over all its uses; None also
            when it is frozen.
        dead: Share of the features (channels) that are 0 for every input and position, for
            activations that can die; None for others.
        weight_std: Standard deviation with which the first of its weights is drawn.
        asked_std: That which its fan_in and the activation after it ask for, gain / sqrt(fan_in).
        memory: Of a recurrent layer, by how much a gradient from its last step has changed at the
            first; None where that was not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    std: float
    rms: float
    signal: float
    grad_rms: float | None = None
    weight_grad_rms: float | None = None
    dead: float | None = None
    above: int = _hidden(0)  # how many features are above 0 for every input and position
    in_rms: float = _hidden(math.nan)  # of the data given; nan if that is not known
    in_signal: float = _hidden(math.nan)
    # "layer" (multiplies by a weight), "mixer" (embedding, recurrent), "activation", "norm"
    # (divides by what it measures) or "affine" (BatchNorm in eval mode, which only scales)
    role: str = _hidden("layer")
    features: int = _hidden(1)  # their number
    op: str = _hidden("")  # name of the operation
    parents: tuple[int, ...] = _hidden(())  # the rows that feed it, by way of what has no row
    weights: tuple[Weight, ...] = _hidden(())  # what it multiplied by
    weight_std: float | None = _hidden(None)
    asked_std: float | None = _hidden(None)
    memory: float | None = _hidden(None)
    learned: bool = _hidden(False)  # it was given what is made of parameters alone, as tokens are
    idle: bool = _hidden(False)  # a BatchNorm whose running statistics are those of its start
    gated: bool = _hidden(False)  # it was given a product of its parents
    scalar: float = _hidden(1.0)  # the number that its data was multiplied by just before

    @property
    def size(self) -> float:
        """The signal, or the rms where there is one input only."""
        return self.rms if math.isnan(self.signal) else self.signal

    @property
    def given(self) -> float:
        """The same of what it was given, before a number below 1 that multiplies it."""
        size = self.in_rms if math.isnan(self.in_signal) else self.in_signal
        return size / (min(abs(self.scalar), 1.0) or 1.0)

    @property
    def fix(self) -> str:
        """The call that draws its weight on the scale asked for; empty where there is none."""
        if self.asked_std is None or len(self.weights[0].names) > 1:
            return ""
        w = self.weights[0]
        parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in w.names[0].split("."))
        name = f"net{''.join(parts)}"
        call = f"nn.init.normal_({name}, std={self.asked_std:.3g})"
        # What torch takes for the fan_in of a weight
        usual = name.endswith(".weight") and w.numel == w.fan_in * self.features
        if math.isclose(self.asked_std**2 * w.fan_in, 2) and usual and "Trans" not in self.kind:
            call = f'nn.init.kaiming_normal_({name}, nonlinearity="relu")'
        own = self.name == self.kind or w.names[0].startswith(self.name.partition("#")[0])
        return f"{call}  # std {self.asked_std:.3g}, is {w.std:.3g}{'' if own else '; tied'}"


Rows = Sequence[LayerTrace]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an init.

    Attributes:
        layer: Name of the first layer that causes it.
        kind: One of the keys of `ADVICE`.
        value: The number that was judged: the factor of this layer ("scale"), of all layers
            ("shrinks", "grows", "gradient ..."), the dead share, signal / rms ("alike"), else rms.
        reason: What was measured, and what is allowed.
        fix: The call that mends it, by its name in the model; empty where there is none.
        idle: Whether a BatchNorm that does nothing yet may be all that is wrong.
    """

    layer: str
    kind: str
    value: float
    reason: str
    fix: str = ""
    idle: bool = False

    @property
    def advice(self) -> str:
        """What to do."""
        return IDLE if self.idle else ADVICE[self.kind]

    def __str__(self) -> str:
        lines = [line for text in (self.reason, self.advice) for line in textwrap.wrap(text, 84)]
        return "\n    ".join([f"{self.layer}: {self.kind}", *lines, *self.fix.splitlines()])


def number(value: float | None) -> str:
    """Return three significant digits; "-" for None."""
    return "-" if value is None else f"{value:#.3g}".removesuffix(".")


def some(names: Sequence[str]) -> str:
    """Return the first two of some names, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{', '.join(names[:2])}{more}"
