"""MNIST as whole tensors: split, normalised, and checked against the official files."""

import gzip
import os
import shutil
import struct
import tempfile
import zlib
from http.client import HTTPException
from math import sqrt
from operator import index
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity, download_url

N_PICTURES = 60_000
# Pictures summed at a time. 31,360 pixels stay in the CPU's cache, and are few enough (under
# 32,768) for torch not to wake its threads, which on a busy machine wait for each other for long.
SUM_CHUNK = 40
# Pictures normalised at a time. Most of that time goes to memory touched for the first time, which
# all threads share; 8 MB are enough for them to be woken seldom.
NORMALISE_CHUNK = 2500


class MNISTSplits(NamedTuple):
    """MNIST's 60,000 training pictures, split in file order and normalised.

    Attributes:
        x_train: Pictures, float32, (n_train, 1, 28, 28) in N, C, H, W; no unit: pixels scaled to
            0..1, less `mean`, over `std`, so `x_train` has mean 0 and standard deviation 1.
        y_train: Digits 0 to 9, int64, (n_train,).
        x_valid: Pictures, float32, (60,000 - n_train, 1, 28, 28), on the scale of `x_train`.
        y_valid: Digits 0 to 9, int64, (60,000 - n_train,).
        mean: Mean of the training part's pixels before, on the scale 0..1.
        std: Their standard deviation (unbiased, as `torch.std`) before, on the scale 0..1.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_valid: torch.Tensor
    y_valid: torch.Tensor
    mean: float
    std: float


def load_mnist(root: str | os.PathLike[str] | None = None, n_train: int = 50_000) -> MNISTSplits:
    """Load MNIST's training pictures as normalised training and validation tensors.

    The files (http://yann.lecun.com/exdb/mnist/) are checked against torchvision's md5 sums; a
    missing or damaged one is downloaded again through torchvision if there is a network.

    Args:
        root: Folder that holds `MNIST/raw/`. By default the environment variable `INITLAB_DATA`,
            or else the `data/` folder of the repository that initlab is installed from.
        n_train: How many pictures go to the training part, 1 to 59,999.

    Returns:
        Pictures of (n_train, 1, 28, 28) and (60,000 - n_train, 1, 28, 28), their labels, and the
        mean and standard deviation they were normalised by: see `MNISTSplits`.

    Raises:
        TypeError: If `n_train` is not a whole number.
        ValueError: If `n_train` is not within 1..59,999.
        FileNotFoundError: If there is no default folder.
        RuntimeError: If a file is missing or damaged and cannot be downloaded, or if an old
            torchvision's `MNIST/processed/` is in the way.

    Example:
        >>> mnist = load_mnist()
        >>> tuple(mnist.x_train.shape), tuple(mnist.x_valid.shape)
        ((50000, 1, 28, 28), (10000, 1, 28, 28))
        >>> print(f"{mnist.mean:.4f} {mnist.std:.4f}")
        0.1310 0.3085
    """
    if isinstance(n_train, bool):
        raise TypeError("n_train must be a whole number, not a bool")
    n_train = index(n_train)
    if not 1 <= n_train < N_PICTURES:
        raise ValueError(f"n_train must be within 1..{N_PICTURES - 1:,}, got {n_train:,}")
    dataset = _load_checked(_default_root() if root is None else Path(root).expanduser())
    pixels, labels = dataset.data, dataset.targets
    mean, std = _mean_std(pixels[:n_train])
    return MNISTSplits(
        _normalise(pixels[:n_train], mean, std),
        labels[:n_train].clone(),
        _normalise(pixels[n_train:], mean, std),
        labels[n_train:].clone(),
        mean / 255,
        std / 255,
    )


def _mean_std(pixels: torch.Tensor) -> tuple[float, float]:
    """Return the mean and unbiased standard deviation of uint8 `pixels`, on the scale 0..255."""
    n, total, squares = pixels.numel(), 0, 0
    # A chunk's sums are whole numbers far below 2**53, so float64 holds them exactly, and neither
    # the order of summation nor the number of threads can change the result.
    for chunk in pixels.split(SUM_CHUNK):
        values = chunk.double()
        total += int(values.sum())
        squares += int(values.square_().sum())
    return total / n, sqrt((n * squares - total**2) / (n * (n - 1)))


def _normalise(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Return uint8 `pixels` (N, H, W) as float32 (N, 1, H, W), less `mean` and over `std`."""
    out = pixels.new_empty(pixels.shape, dtype=torch.float32)
    for target, chunk in zip(*(t.split(NORMALISE_CHUNK) for t in (out, pixels)), strict=True):
        target.copy_(chunk).sub_(mean).div_(std)
    return out.unsqueeze(1)


def _default_root() -> Path:
    if chosen := os.environ.get("INITLAB_DATA"):
        return Path(chosen).expanduser()
    root = Path(__file__).resolve().parents[1] / "data"
    if not root.is_dir():
        raise FileNotFoundError(
            f"No data folder at {root}: initlab is not installed from its repository with "
            "`pip install -e .`. Set INITLAB_DATA to a folder for MNIST, or pass it as root."
        )
    return root


def _load_checked(root: Path) -> MNIST:
    """Return torchvision's dataset, read from files that were checked first."""
    processed = root / "MNIST" / "processed"
    if (processed / MNIST.training_file).exists():
        raise RuntimeError(f"Remove {processed}: torchvision would load it in place of MNIST/raw/.")
    raw = root / "MNIST" / "raw"
    for name, md5 in MNIST.resources:
        if not check_integrity(raw / name, md5):
            _download(name, md5, raw)
    try:
        _unpack(raw, raw)
    except OSError:  # read-only, or full
        with tempfile.TemporaryDirectory() as spare:
            spare_raw = Path(spare, "MNIST", "raw")
            spare_raw.mkdir(parents=True)
            _unpack(raw, spare_raw)
            return MNIST(spare, download=True)
    return MNIST(root, download=True)


def _download(name: str, md5: str, raw: Path) -> None:
    """Download one .gz from torchvision's mirrors, in place of a missing or damaged one."""
    reason: Exception | None = None
    state = "damaged" if (raw / name).exists() else "missing"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw, suffix=".tmp") as scratch:
            for mirror in MNIST.mirrors:
                try:
                    download_url(mirror + name, scratch, name, md5)
                    os.replace(Path(scratch, name), raw / name)
                    return
                except (RuntimeError, OSError, HTTPException) as error:
                    reason = error
    except OSError as error:
        reason = error
    raise RuntimeError(
        f"{raw / name} is {state}, and downloading it failed ({reason}). Restore it (in a clone, "
        f"with `git checkout -- {name}` in its folder), or run again with a network (and a folder "
        "that can be written) so that torchvision downloads it."
    ) from None


def _unpack(raw: Path, into: Path) -> None:
    """Unpack each .gz whose unpacked file is missing or differs."""
    for name, _ in MNIST.resources:
        unpacked = into / Path(name).stem
        if _is_content(raw / name, unpacked):
            continue
        # Several processes may do this at once: nobody sees a half-written file.
        with tempfile.TemporaryDirectory(dir=into, suffix=".tmp") as scratch:
            partial = Path(scratch, unpacked.name)
            with gzip.open(raw / name) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(partial, unpacked)


def _is_content(packed: Path, unpacked: Path) -> bool:
    """Tell whether `unpacked` has the size and CRC-32 that end the gzip file `packed`."""
    with packed.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        crc, size = struct.unpack("<II", file.read())
    if not unpacked.is_file() or unpacked.stat().st_size != size:
        return False
    found = 0
    with unpacked.open("rb") as file:
        while chunk := file.read(1 << 18):
            found = zlib.crc32(chunk, found)
    return found == crc
