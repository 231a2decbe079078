"""Helpers of the notebooks on PyTorch's default initialisation of convolutions."""

from initlab.data import MNISTSplits, load_mnist
from initlab.draw import draw
from initlab.init import fans, gain, initialize_
from initlab.moments import Drawn, Moments, Predicted
from initlab.predict import predict
from initlab.stats import Stats, stats

__all__ = [
    "Drawn",
    "MNISTSplits",
    "Moments",
    "Predicted",
    "Stats",
    "draw",
    "fans",
    "gain",
    "initialize_",
    "load_mnist",
    "predict",
    "stats",
]
