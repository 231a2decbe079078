"""`load_mnist` against a plain float64 computation, and against files in every bad state."""

import gzip
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST, FashionMNIST

from initlab import load_fashion, load_mnist, mnist

DATA = Path(__file__).resolve().parents[1] / "data"
PACKED = [name for name, _ in MNIST.resources]


@pytest.fixture(autouse=True)
def no_folder_chosen(monkeypatch):
    monkeypatch.delenv("INITLAB_DATA", raising=False)


@pytest.fixture
def fresh(tmp_path):
    """Return a data folder as in a fresh clone: only the four .gz, here as links."""
    raw = tmp_path / "fresh" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in PACKED:
        (raw / name).symlink_to(DATA / "MNIST" / "raw" / name)
    return tmp_path / "fresh"


def unpacked(tmp_path_factory, kind, folder):
    """Return torchvision's pictures and labels, of both files, unpacked independently."""
    root = tmp_path_factory.mktemp("oracle")
    raw = root / kind.__name__ / "raw"
    raw.mkdir(parents=True)
    for name in PACKED:
        content = gzip.decompress((folder / name).read_bytes())
        (raw / name.removesuffix(".gz")).write_bytes(content)
    return kind(root), kind(root, train=False)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    return unpacked(tmp_path_factory, MNIST, DATA / "MNIST" / "raw")


@pytest.fixture(scope="session")
def splits():
    return load_mnist()


def listing(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def damage(path, how):
    """Damage a file; a link is replaced by a damaged copy."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "altered":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "other":  # sound, but not the file
        path.write_bytes(gzip.compress(b"not the labels"))
    else:
        assert how == "missing"


def assert_splits(splits, train, test):
    """Compare with the naive way, in float32 as users would write it."""
    assert type(splits.mean) is type(splits.std) is float
    x = train.data[:50_000].unsqueeze(1) / 255
    mean, std = x.mean(), x.std()
    for x, y, pixels, labels in (
        (splits.x_train, splits.y_train, train.data[:50_000], train.targets[:50_000]),
        (splits.x_valid, splits.y_valid, train.data[50_000:], train.targets[50_000:]),
        (splits.x_test, splits.y_test, test.data, test.targets),
    ):
        assert x.shape == (len(labels), 1, 28, 28)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert torch.equal(y, labels)
        some = slice(None, None, 5)  # for time; the labels of all say that none is displaced
        assert (x[some] - (pixels[some].unsqueeze(1) / 255 - mean) / std).abs().max() < 1e-5
    assert abs(splits.x_train.mean()) < 1e-5
    assert abs(splits.x_train.std() - 1) < 1e-5
    for x in (splits.x_valid, splits.x_test):  # not normalised by their own statistics
        assert abs(x.mean()) > 1e-3


def test_splits_and_statistics_match_torchvision(splits, oracle):
    assert_splits(splits, *oracle)
    assert (round(splits.mean, 4), round(splits.std, 4)) == (0.1310, 0.3085)


@pytest.mark.skipif(not mnist.DEBIAN.is_dir(), reason=f"no Fashion-MNIST in {mnist.DEBIAN}")
def test_fashion_matches_torchvision(tmp_path_factory, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in PACKED[:2]:  # the others are Debian's
        (raw / name).symlink_to(mnist.DEBIAN / name)
    damage(raw / PACKED[1], "other")  # then Debian's is taken, too
    splits = load_fashion(tmp_path)
    assert_splits(splits, *unpacked(tmp_path_factory, FashionMNIST, mnist.DEBIAN))
    assert splits.y_test.bincount().tolist() == [1000] * 10


def test_without_fashion_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "DEBIAN", tmp_path / "debian")
    told = r"FashionMNIST.raw and .*debian. A clone .*Debian's package .*torchvision"
    with pytest.raises(FileNotFoundError, match=told):
        load_fashion(tmp_path)


def test_tensors_are_the_users_own(splits):
    tensors = [t for t in splits if isinstance(t, torch.Tensor)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) == 6
    assert all(t.is_contiguous() for t in tensors)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


@pytest.mark.parametrize("n_train", [1, 41, 59_999])
def test_any_split_is_in_file_order_with_exact_statistics(oracle, n_train):
    splits, train = load_mnist(n_train=n_train), oracle[0]
    pixels = train.data[:n_train].double() / 255
    mean, std = pixels.mean().item(), pixels.std().item()
    # Sharp enough to tell the unbiased from the biased standard deviation (1e-8 apart or more)
    assert splits.mean == pytest.approx(mean, rel=1e-9)
    assert splits.std == pytest.approx(std, rel=1e-9)
    assert len(splits.x_train) == len(splits.y_train) == n_train
    assert len(splits.x_valid) == len(splits.y_valid) == 60_000 - n_train
    assert torch.equal(torch.cat([splits.y_train, splits.y_valid]), train.targets)
    for part, index, at in [(splits.x_train, -1, n_train - 1), (splits.x_valid, 0, n_train)]:
        want = (train.data[at].double() / 255 - mean) / std
        assert (part[index, 0] - want).abs().max() < 1e-6


@pytest.mark.parametrize("n_train", [-1, 0, 60_000, 70_000])
def test_n_train_out_of_range(tmp_path, n_train):
    with pytest.raises(ValueError, match=r"n_train must be within 1\.\.59,999"):
        load_mnist(tmp_path, n_train)


@pytest.mark.parametrize("n_train", [50_000.0, "50000", None])
def test_n_train_of_wrong_type(tmp_path, n_train):
    with pytest.raises(TypeError):
        load_mnist(tmp_path, n_train)


def test_root_goes_before_environment_goes_before_default(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("INITLAB_DATA", str(tmp_path / "chosen"))
    assert len(load_mnist(fresh).y_train) == 50_000
    with pytest.raises(FileNotFoundError, match=r"chosen.MNIST.raw"):
        load_mnist()
    monkeypatch.setenv("INITLAB_DATA", "")
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")  # which is not the default: that is the repository
    assert len(load_mnist().y_train) == 50_000
    assert listing(tmp_path / "here") == ["data"]


def test_outside_a_clone_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "REPOSITORY", tmp_path / "site-packages")
    told = r"site-packages.data.MNIST.raw\. A clone .* torchvision.*MNIST.root.*INITLAB_DATA"
    with pytest.raises(FileNotFoundError, match=told):
        load_mnist()
    assert listing(tmp_path) == []


def test_a_default_device_changes_nothing(splits, fresh):
    with torch.device("meta"):
        assert torch.equal(load_mnist(fresh).x_valid, splits.x_valid)


def test_what_others_unpacked_is_neither_read_nor_touched(fresh, oracle, capfd):
    raw, processed = fresh / "MNIST" / "raw", fresh / "MNIST" / "processed"
    processed.mkdir()
    for name in (MNIST.training_file, MNIST.test_file):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), processed / name)
    for name in PACKED:
        (raw / name.removesuffix(".gz")).write_bytes(b"something else")
    before = listing(fresh)
    splits = load_mnist(fresh)
    assert torch.equal(torch.cat([splits.y_train, splits.y_valid]), oracle[0].targets)
    assert listing(fresh) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *zip(PACKED, ["altered", "truncated", "missing", "other"], strict=True),
        (PACKED[0], "missing"),
    ],
)
def test_a_bad_file_is_one_clear_error(fresh, name, how):
    damage(fresh / "MNIST" / "raw" / name, how)
    before = listing(fresh)
    with pytest.raises(FileNotFoundError, match=f"^{name}: missing or damaged in .*") as caught:
        load_mnist(fresh)
    assert str(fresh / "MNIST" / "raw") in str(caught.value)
    assert listing(fresh) == before
