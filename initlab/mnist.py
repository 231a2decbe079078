"""MNIST and Fashion-MNIST as whole tensors: read from their four files, checked, normalised."""

import hashlib
import os
import zlib
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = [f"{a}-{b}-ubyte.gz" for a in ("train", "t10k") for b in ("images-idx3", "labels-idx1")]
SHA256 = {  # of the files unpacked, as they have been packed in several ways; the first digits
    "MNIST": "ba891046e6505d7a 65a50cbbf4e906d7 0fa7898d509279e4 ff7bcfd416de3373",
    "FashionMNIST": "c59f468a2f672dc8 bad3541b69d91243 5b4141f0afbad91e 0402a96d92fd2663",
}
REPOSITORY = Path(__file__).resolve().parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist


class Splits(NamedTuple):
    """Pictures, float32 (n, 1, 28, 28), and their classes, int64 (n,), in the order of the files.

    Pixels are 0..1, less `mean`, over `std` (unbiased), which are those of the training pictures.
    """

    x_train: Tensor
    y_train: Tensor
    x_valid: Tensor
    y_valid: Tensor
    mean: float
    std: float
    x_test: Tensor
    y_test: Tensor


def load_mnist(root: str | os.PathLike[str] | None = None, n_train: int = 50_000) -> Splits:
    """Load MNIST (http://yann.lecun.com/exdb/mnist/) as normalised tensors, on the CPU.

    The files are in `MNIST/raw/` of `root`, by default the environment variable `INITLAB_DATA`, or
    else the `data/` folder of the clone that initlab is imported from. Their content is checked.
    The first `n_train` pictures are for training.

    Raises a ValueError if `n_train` is not within 1..59,999, a TypeError if it is no whole number,
    a FileNotFoundError if a file is missing or damaged, which says where to get it.

    >>> tuple(load_mnist().x_train.shape)
    (50000, 1, 28, 28)
    """
    return _load("MNIST", root, n_train)


def load_fashion(root: str | os.PathLike[str] | None = None, n_train: int = 50_000) -> Splits:
    """Load Fashion-MNIST (arXiv 1708.07747) as `load_mnist`, or from Debian."""
    return _load("FashionMNIST", root, n_train)


def _load(name: str, root: str | os.PathLike[str] | None, n_train: int) -> Splits:
    n_train = index(n_train)
    if not 1 <= n_train < 60_000:
        raise ValueError(f"n_train must be within 1..59,999, got {n_train:,}")
    root = Path(root or os.environ.get("INITLAB_DATA") or REPOSITORY / "data").expanduser()
    folders = [root / name / "raw", *([DEBIAN] if name == "FashionMNIST" else [])]
    contents = [_read(folders, *file) for file in zip(NAMES, SHA256[name].split(), strict=True)]
    # The first 16 bytes of pictures, 8 of labels, say what the sums have vouched for
    pixels, test_pixels = (content[16:].view(-1, 1, 28, 28) for content in contents[::2])
    labels, test_labels = (content[8:].long() for content in contents[1::2])
    # Mean and std from how often each value occurs: in whole numbers, so without roundings
    often = pixels[:n_train].flatten().bincount(minlength=256).double()
    values, n = torch.arange(256, device="cpu").double(), often.sum()
    mean = (often @ values / n).item()
    std = (often @ (values - mean).square() / (n - 1)).sqrt().item()

    def normalised(pixels: Tensor) -> Tensor:
        return pixels.float().sub_(mean).div_(std)

    x_train, x_valid = normalised(pixels[:n_train]), normalised(pixels[n_train:])
    y_train, y_valid = labels[:n_train].clone(), labels[n_train:].clone()
    del contents, pixels  # or their memory would add to that of the test pictures
    x_test = normalised(test_pixels)
    return Splits(x_train, y_train, x_valid, y_valid, mean / 255, std / 255, x_test, test_labels)


def _read(folders: list[Path], file: str, sha256: str) -> Tensor:
    """Return the bytes of a file, uint8, from the first folder that has it sound."""
    for folder in folders:
        with suppress(OSError, zlib.error):  # missing or damaged
            content = bytearray(zlib.decompress((folder / file).read_bytes(), wbits=31))
            if hashlib.sha256(content).hexdigest().startswith(sha256):
                return torch.frombuffer(content, dtype=torch.uint8)
    raise FileNotFoundError(
        f"{file}: missing or damaged in {' and '.join(map(str, folders))}. A clone of this project "
        "has MNIST in its folder data, Debian's package dataset-fashion-mnist has Fashion-MNIST; "
        f"torchvision.datasets.{folders[0].parent.name}(root, download=True) fetches the files. "
        "Give that folder as root, or as the environment variable INITLAB_DATA."
    )
