"""MNIST as whole tensors: read from the four official files, checked, split and normalised."""

import hashlib
import os
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from math import sqrt
from operator import index
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

N_PICTURES = 60_000
CHUNK = 2500  # pictures normalised at a time: 8 MB, so that the second step finds them in cache


class MNISTSplits(NamedTuple):
    """MNIST's pictures, the training file's split in file order, all on one scale.

    Attributes:
        x_train: Pictures, float32, (n_train, 1, 28, 28) in N, C, H, W; no unit: pixels scaled to
            0..1, less `mean`, over `std`, so `x_train` has mean 0 and standard deviation 1.
        y_train: Digits 0 to 9, int64, (n_train,).
        x_valid: The other 60,000 - n_train pictures.
        y_valid: Their digits.
        mean: Mean of the training part's pixels before, on the scale 0..1.
        std: Their standard deviation (unbiased, as `torch.std`) before, on the scale 0..1.
        x_test: The 10,000 test pictures.
        y_test: Their digits.
    """

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    mean: float
    std: float
    x_test: Tensor
    y_test: Tensor


def load_mnist(root: str | os.PathLike[str] | None = None, n_train: int = 50_000) -> MNISTSplits:
    """Load MNIST as normalised training, validation and test tensors.

    The files (http://yann.lecun.com/exdb/mnist/) are checked against torchvision's md5 sums; a
    missing or damaged one is downloaded again through torchvision if there is a network.

    Args:
        root: Folder that holds `MNIST/raw/`. By default the environment variable `INITLAB_DATA`,
            or else the `data/` folder of the repository that initlab is installed from.
        n_train: How many pictures go to the training part, 1 to 59,999.

    Raises:
        TypeError: If `n_train` is not a whole number.
        ValueError: If `n_train` is not within 1..59,999.
        FileNotFoundError: If there is no default folder.
        RuntimeError: If a file is missing or damaged and cannot be downloaded.

    Example:
        >>> mnist = load_mnist()
        >>> tuple(mnist.x_train.shape), tuple(mnist.x_valid.shape), tuple(mnist.x_test.shape)
        ((50000, 1, 28, 28), (10000, 1, 28, 28), (10000, 1, 28, 28))
        >>> print(f"{mnist.mean:.4f} {mnist.std:.4f}")
        0.1310 0.3085
    """
    if isinstance(n_train, bool):
        raise TypeError("n_train must be a whole number, not a bool")
    n_train = index(n_train)
    if not 1 <= n_train < N_PICTURES:
        raise ValueError(f"n_train must be within 1..{N_PICTURES - 1:,}, got {n_train:,}")
    from torchvision.datasets import MNIST  # which takes as long to import as torch itself

    raw = (_default_root() if root is None else Path(root).expanduser()) / "MNIST" / "raw"
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        # That the bytes must not be written to: they are only read
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        files = pool.map(lambda file: _read(raw / file[0], file[1]), MNIST.resources)
        pixels, labels, test_pixels, test_labels = files
    mean, std = _mean_std(pixels[:n_train])
    x_train, x_valid = (_normalise(p, mean, std) for p in (pixels[:n_train], pixels[n_train:]))
    y_train, y_valid = labels[:n_train].long(), labels[n_train:].long()
    del pixels  # or its memory would add to that of the test pictures
    x_test, y_test = _normalise(test_pixels, mean, std), test_labels.long()
    return MNISTSplits(x_train, y_train, x_valid, y_valid, mean / 255, std / 255, x_test, y_test)


def _read(path: Path, md5: str) -> Tensor:
    """Return a file's pictures (N, 28, 28) or labels (N,), uint8; download it if it is bad."""
    packed = path.read_bytes() if path.is_file() else b""
    if hashlib.md5(packed, usedforsecurity=False).hexdigest() != md5:
        _download(path, md5)
        packed = path.read_bytes()
    size = int.from_bytes(packed[-4:], "little")  # gzip ends with it: no growing and copying
    content = torch.frombuffer(zlib.decompress(packed, 31, size + 1), dtype=torch.uint8)
    # The first 16 bytes of pictures, 8 of labels, say what the md5 has vouched for
    return content[16:].view(-1, 28, 28) if "images" in path.name else content[8:]


def _mean_std(pixels: Tensor) -> tuple[float, float]:
    """Return the mean and unbiased standard deviation of uint8 `pixels`, on the scale 0..255.

    From how often each value occurs: in whole numbers, so exact.
    """
    counts = list(enumerate(pixels.flatten().bincount().tolist()))
    n, total = pixels.numel(), sum(value * often for value, often in counts)
    squares = sum(value**2 * often for value, often in counts)
    return total / n, sqrt((n * squares - total**2) / (n * (n - 1)))


def _normalise(pixels: Tensor, mean: float, std: float) -> Tensor:
    """Return uint8 `pixels` (N, H, W) as float32 (N, 1, H, W), less `mean` and over `std`."""
    out = pixels.new_empty(pixels.shape, dtype=torch.float32)
    for target, chunk in zip(out.split(CHUNK), pixels.split(CHUNK), strict=True):
        target.copy_(chunk).sub_(mean).div_(std)
    return out.unsqueeze(1)


def _default_root() -> Path:
    if chosen := os.environ.get("INITLAB_DATA"):
        return Path(chosen).expanduser()
    root = Path(__file__).resolve().parents[1] / "data"
    if not root.is_dir():
        raise FileNotFoundError(
            f"No folder {root}. Set INITLAB_DATA to a folder for MNIST, or pass it as root."
        )
    return root


def _download(path: Path, md5: str) -> None:
    """Download a file from torchvision's mirrors, in place of a missing or damaged one."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    state = "damaged" if path.exists() else "missing"
    for mirror in MNIST.mirrors:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may do this at once: nobody sees a half-written file
            with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as scratch:
                download_url(mirror + path.name, scratch, path.name, md5)
                os.replace(Path(scratch, path.name), path)
                return
        except (RuntimeError, OSError, HTTPException) as error:
            reason = error
    raise RuntimeError(
        f"{path} is {state}, and downloading it failed ({reason}). Restore it, in a clone by "
        "`git checkout`, or run again with a network and a folder that can be written."
    ) from None
