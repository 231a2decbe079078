"""Helpers of the notebooks on PyTorch's default initialisation of convolutions."""

from initlab.diagnose.report import Trace, trace
from initlab.diagnose.rows import LayerTrace, Problem
from initlab.init import fans, gain, initialize_
from initlab.layer import draw, predict
from initlab.mnist import MNISTSplits, load_mnist
from initlab.moments import Drawn, Each, Moments, Predicted, Stats, stats
from initlab.net import accuracy, conv_stack, fit

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
