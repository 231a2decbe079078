"""Helpers of the notebooks on PyTorch's default initialisation of convolutions."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# By module, which is imported when one of its names is first asked for, and is called by none
_MODULES = {
    "initlab.diagnose.report": "Trace trace",
    "initlab.diagnose.rows": "LayerTrace Problem",
    "initlab.draws": "draw",
    "initlab.init": "fans gain initialize_",
    "initlab.mnist": "Splits load_fashion load_mnist",
    "initlab.moments": "Drawn DrawnMoments Each Predicted PredictedMoments Stats stats",
    "initlab.prediction": "predict",
    "initlab.training.fit": "accuracy fit",
    "initlab.training.nets": "conv_stack",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
