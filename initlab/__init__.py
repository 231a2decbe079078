"""Helpers of the notebooks on PyTorch's default initialisation of convolutions."""

from initlab.data import MNISTSplits, load_mnist
from initlab.draw import draw
from initlab.init import fans, gain, initialize_
from initlab.moments import Drawn, Moments, Predicted
from initlab.predict import predict
from initlab.stats import Stats, stats
from initlab.tracing import LayerTrace, Trace, trace
from initlab.net import accuracy, conv_stack, fit

__all__ = [
    "Drawn",
    "LayerTrace",
    "MNISTSplits",
    "Moments",
    "Predicted",
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
