"""Helpers of the notebooks on PyTorch's default initialisation of convolutions."""

from initlab.init import fans, gain, initialize_
from initlab.layer import draw, predict
from initlab.mnist import MNISTSplits, load_mnist
from initlab.moments import Drawn, Each, Moments, Predicted, Stats, stats
from initlab.tracing import LayerTrace, Problem, Trace, trace
from initlab.training.fit import accuracy, fit
from initlab.training.nets import conv_stack

__all__ = [
    "Drawn",
    "Each",
    "LayerTrace",
    "MNISTSplits",
    "Moments",
    "Predicted",
    "Problem",
    "Stats",
    "Trace",
    "accuracy",
    "conv_stack",
    "draw",
    "fans",
    "fit",
    "gain",
    "initialize_",
    "load_mnist",
    "predict",
    "stats",
    "trace",
]
