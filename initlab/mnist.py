"""MNIST and Fashion-MNIST as whole tensors: read from their four files, checked, normalised."""

import hashlib
import os
import zlib
from contextlib import suppress
from http.client import HTTPException
from operator import index
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import torch
from torch import Tensor

PARTS = ("train", "t10k")
NAMES = [f"{part}-{of}-ubyte.gz" for part in PARTS for of in ("images-idx3", "labels-idx1")]
SHA256 = {  # of the four files, unpacked: they have been packed in more than one way
    "MNIST": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "FashionMNIST": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"  # of MNIST; torchvision's first
REPOSITORY = Path(__file__).resolve().parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist


class Splits(NamedTuple):
    """The pictures of a data set, the training file's split in file order, all on one scale.

    Pictures are float32 (n, 1, 28, 28): pixels, 0..1, less `mean`, over `std` (unbiased), which are
    those of `x_train` before. Classes are int64 (n,).
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
    else the `data/` folder of the clone that initlab is imported from. Their content is checked;
    one that is missing or damaged is downloaded. The first `n_train` pictures are for training.

    Raises a ValueError if `n_train` is not within 1..59,999, a TypeError if it is no whole number,
    a FileNotFoundError if a file is missing or damaged and cannot be downloaded.

    >>> tuple(load_mnist().x_train.shape)
    (50000, 1, 28, 28)
    """
    return _load("MNIST", root, n_train)


def load_fashion(root: str | os.PathLike[str] | None = None, n_train: int = 50_000) -> Splits:
    """Load Fashion-MNIST (arXiv 1708.07747) as `load_mnist`, or from Debian; download nothing."""
    return _load("FashionMNIST", root, n_train)


def _load(name: str, root: str | os.PathLike[str] | None, n_train: int) -> Splits:
    n_train = index(n_train)
    if not 1 <= n_train < 60_000:
        raise ValueError(f"n_train must be within 1..59,999, got {n_train:,}")
    root = Path(root or os.environ.get("INITLAB_DATA") or REPOSITORY / "data").expanduser()
    folders = [root / name / "raw", *([DEBIAN] if name == "FashionMNIST" else [])]
    mirror = MIRROR if name == "MNIST" and root.is_dir() else None
    contents = [_read(folders, mirror, *pair) for pair in zip(NAMES, SHA256[name], strict=True)]
    if bad := [file for file, content in zip(NAMES, contents, strict=True) if content is None]:
        raise FileNotFoundError(
            f"{', '.join(bad)}: missing or damaged in {' and '.join(map(str, folders))}. A clone "
            "of this project has MNIST in its folder data, Debian's package dataset-fashion-mnist "
            f"has Fashion-MNIST; torchvision.datasets.{name}(root, download=True) fetches the "
            "files. Give that folder as root, or as the environment variable INITLAB_DATA."
        )
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


def _read(folders: list[Path], mirror: str | None, file: str, sha256: str) -> Tensor | None:
    """Return the bytes of a file, uint8, from the first folder that has it sound, or the mirror."""

    def unpack(packed: bytes) -> Tensor | None:
        with suppress(zlib.error):
            content = bytearray(zlib.decompress(packed, wbits=31))
            if hashlib.sha256(content).hexdigest() == sha256:
                return torch.frombuffer(content, dtype=torch.uint8)
        return None

    for path in (folder / file for folder in folders):
        if path.is_file() and (content := unpack(path.read_bytes())) is not None:
            return content
    content = None
    if mirror:
        with suppress(OSError, HTTPException), urlopen(mirror + file, timeout=30) as answer:
            if (content := unpack(packed := answer.read())) is not None:
                folders[0].mkdir(parents=True, exist_ok=True)
                (folders[0] / file).write_bytes(packed)
    return content
