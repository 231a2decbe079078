"""MNIST and Fashion-MNIST as whole tensors: read from their four files, checked, normalised."""

import hashlib
import os
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from math import sqrt
from operator import index
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import torch
from torch import Tensor

CHUNK = 2500  # pictures normalised at a time: 8 MB, so that the second step finds them in cache
KINDS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
NAMES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in KINDS]
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
MIRRORS = {"MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/"}  # torchvision's first
REPOSITORY = Path(__file__).resolve().parents[1]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist


class Splits(NamedTuple):
    """The pictures of a data set, the training file's split in file order, all on one scale.

    Pictures are float32 (n, 1, 28, 28), in N, C, H, W: pixels on the scale 0..1, less `mean`, over
    `std`, which are those of `x_train` before (unbiased, as `torch.std`). Classes are int64 (n,),
    0 to 9. The validation part has the other 60,000 - n_train pictures, the test part 10,000.
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

    The content of the files is checked. One that is missing or damaged is downloaded.

    Args:
        root: Folder that holds `MNIST/raw/`. By default the environment variable `INITLAB_DATA`,
            or else the `data/` folder of the clone that initlab is imported from.
        n_train: How many pictures go to the training part, 1 to 59,999.

    Raises:
        TypeError: `n_train` is not a whole number.
        ValueError: `n_train` is not within 1..59,999.
        FileNotFoundError: A file is missing or damaged and cannot be downloaded.

    Example:
        >>> mnist = load_mnist()
        >>> tuple(mnist.x_train.shape), tuple(mnist.x_valid.shape), tuple(mnist.x_test.shape)
        ((50000, 1, 28, 28), (10000, 1, 28, 28), (10000, 1, 28, 28))
        >>> print(f"{mnist.mean:.4f} {mnist.std:.4f}")
        0.1310 0.3085
    """
    return _load("MNIST", root, n_train, "A clone of this project has them in its folder data")


def load_fashion(root: str | os.PathLike[str] | None = None, n_train: int = 50_000) -> Splits:
    """Load Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) as `load_mnist` loads MNIST.

    The files are looked for in `FashionMNIST/raw/` of `root`, and where Debian's package
    dataset-fashion-mnist puts them. They are not downloaded.
    """
    debian = "Debian's package dataset-fashion-mnist has them"
    return _load("FashionMNIST", root, n_train, debian, DEBIAN)


def _load(
    name: str, root: str | os.PathLike[str] | None, n_train: int, source: str, *more: Path
) -> Splits:
    if isinstance(n_train, bool):
        raise TypeError("n_train must be a whole number, not a bool")
    n_train = index(n_train)
    if not 1 <= n_train < 60_000:
        raise ValueError(f"n_train must be within 1..59,999, got {n_train:,}")
    root = Path(root or os.environ.get("INITLAB_DATA") or REPOSITORY / "data").expanduser()
    folders = [root / name / "raw", *more]
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        # That the bytes must not be written to: they are only read
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        contents = list(pool.map(partial(_read, folders, MIRRORS.get(name)), NAMES, SHA256[name]))
    if bad := [file for file, content in zip(NAMES, contents, strict=True) if content is None]:
        raise FileNotFoundError(
            f"{', '.join(bad)}: missing or damaged in {' and '.join(map(str, folders))}. {source}; "
            f"torchvision.datasets.{name}(root, download=True) fetches the files. Give that folder "
            "as root, or as the environment variable INITLAB_DATA."
        )
    # The first 16 bytes of pictures, 8 of labels, say what the sums have vouched for
    pixels, test_pixels = (content[16:].view(-1, 28, 28) for content in contents[::2])
    labels, test_labels = (content[8:] for content in contents[1::2])
    mean, std = _mean_std(pixels[:n_train])
    x_train, x_valid = (_normalise(p, mean, std) for p in (pixels[:n_train], pixels[n_train:]))
    y_train, y_valid = labels[:n_train].long(), labels[n_train:].long()
    del contents, pixels  # or their memory would add to that of the test pictures
    x_test, y_test = _normalise(test_pixels, mean, std), test_labels.long()
    return Splits(x_train, y_train, x_valid, y_valid, mean / 255, std / 255, x_test, y_test)


def _read(folders: Sequence[Path], mirror: str | None, file: str, sha256: str) -> Tensor | None:
    """Return the bytes of a file, uint8, from the first folder where it is as it should be.

    If it is so in none, it comes from the mirror, and is kept in the first folder if it can be.
    """

    def unpack(packed: bytes) -> Tensor | None:
        size = int.from_bytes(packed[-4:], "little")  # gzip ends with it: no growing and copying
        try:
            content = zlib.decompress(packed, 31, size + 1)
        except zlib.error:
            return None
        if hashlib.sha256(content).hexdigest() != sha256:
            return None
        return torch.frombuffer(content, dtype=torch.uint8)

    for path in (folder / file for folder in folders):
        if path.is_file() and (content := unpack(path.read_bytes())) is not None:
            return content
    if mirror is None or not folders[0].parents[1].is_dir():
        return None
    content = None
    with suppress(OSError, HTTPException), urlopen(mirror + file, timeout=30) as answer:
        packed = answer.read()
        if (content := unpack(packed)) is not None:
            folders[0].mkdir(parents=True, exist_ok=True)
            (folders[0] / file).write_bytes(packed)
    return content


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
