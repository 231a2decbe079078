"""`load_mnist` against a plain float64 computation, and against files in every bad state."""

import errno
import gzip
import io
import multiprocessing
import os
import shutil
import tempfile
import threading
import warnings
import zlib
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from initlab import mnist
from initlab.mnist import load_mnist

FORKS = multiprocessing.get_context("spawn")
DATA = Path(__file__).resolve().parents[1] / "data"
PACKED = [name for name, _ in MNIST.resources]
UNPACKED = [name.removesuffix(".gz") for name in PACKED]
DEAD_MIRROR = "http://127.0.0.1:9/"


def load_and_send(threads, mirrors, root, send):
    """Load MNIST in a process of its own, and send what tells whether it is the same."""
    warnings.simplefilter("error")
    MNIST.mirrors = mirrors
    os.environ["INITLAB_DATA"] = str(root)
    torch.set_num_threads(threads)
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        s = load_mnist()
    sums = [zlib.crc32(t.numpy()) for t in s if isinstance(t, torch.Tensor)]
    send.send((s.mean.hex(), s.std.hex(), sums, said.getvalue()))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", [DEAD_MIRROR, DEAD_MIRROR])
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("INITLAB_DATA", raising=False)


@pytest.fixture
def fresh(tmp_path):
    """Return a data folder as in a fresh clone: only the four .gz, here as links."""
    raw = tmp_path / "fresh" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in PACKED:
        (raw / name).symlink_to(DATA / "MNIST" / "raw" / name)
    return tmp_path / "fresh"


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Return torchvision's pictures and labels, of both files, unpacked independently."""
    root = tmp_path_factory.mktemp("oracle")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for packed, name in zip(PACKED, UNPACKED, strict=True):
        content = gzip.decompress((DATA / "MNIST" / "raw" / packed).read_bytes())
        (root / "MNIST" / "raw" / name).write_bytes(content)
    return MNIST(root), MNIST(root, train=False)


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
    else:
        assert how == "missing"


def test_splits_and_statistics_match_torchvision(oracle):
    splits = load_mnist()
    assert type(splits.mean) is type(splits.std) is float
    assert (round(splits.mean, 4), round(splits.std, 4)) == (0.1310, 0.3085)
    # The naive way, in float32 as users would write it
    train, test = oracle
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
        assert (x - (pixels.unsqueeze(1) / 255 - mean) / std).abs().max() < 1e-5
    assert abs(splits.x_train.mean()) < 1e-5
    assert abs(splits.x_train.std() - 1) < 1e-5
    for x in (splits.x_valid, splits.x_test):  # not normalised by their own statistics
        assert abs(x.mean()) > 1e-3


def test_tensors_are_the_users_own(fresh):
    splits = load_mnist(fresh)
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


@pytest.mark.parametrize("n_train", [True, 50_000.0, "50000", None])
def test_n_train_of_wrong_type(tmp_path, n_train):
    with pytest.raises(TypeError):
        load_mnist(tmp_path, n_train)


def test_default_root_is_the_repository_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert len(load_mnist().y_train) == 50_000
    assert mnist._default_root() == DATA
    assert listing(tmp_path) == before


def test_root_goes_before_environment_goes_before_default(tmp_path, monkeypatch):
    chosen, passed = tmp_path / "chosen", tmp_path / "passed"
    monkeypatch.setenv("INITLAB_DATA", str(chosen))
    with pytest.raises(RuntimeError, match=r"chosen/MNIST/raw/train-images-idx3-ubyte\.gz"):
        load_mnist()
    with pytest.raises(RuntimeError, match=r"passed/MNIST/raw/train-images-idx3-ubyte\.gz"):
        load_mnist(str(passed))
    monkeypatch.setenv("INITLAB_DATA", "")
    assert mnist._default_root() == DATA


def test_without_a_default_folder_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "__file__", str(tmp_path / "site-packages" / "initlab" / "mnist.py"))
    with pytest.raises(FileNotFoundError, match=r"Set INITLAB_DATA .* or pass it as root"):
        load_mnist()


def test_what_others_unpacked_is_neither_read_nor_touched(fresh, oracle, capfd):
    raw, processed = fresh / "MNIST" / "raw", fresh / "MNIST" / "processed"
    processed.mkdir()
    for name in (MNIST.training_file, MNIST.test_file):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), processed / name)
    for name in UNPACKED:
        (raw / name).write_bytes(b"something else")
    before = listing(fresh)
    splits = load_mnist(fresh)
    assert torch.equal(torch.cat([splits.y_train, splits.y_valid]), oracle[0].targets)
    assert listing(fresh) == before
    assert all((raw / name).read_bytes() == b"something else" for name in UNPACKED)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", PACKED)
def test_bad_file_offline_is_one_clear_error(fresh, name, how):
    bad = fresh / "MNIST" / "raw" / name
    damage(bad, how)
    before = listing(fresh)
    state = "missing" if how == "missing" else "damaged"
    with pytest.raises(RuntimeError, match=f"{name} is {state}.*git checkout.*network") as caught:
        load_mnist(fresh)
    assert str(bad) in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert listing(fresh) == before


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Serve a folder, as the second mirror after a dead one, and return the folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        live = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [DEAD_MIRROR, live])
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("how", ["missing", "altered"])
def test_bad_file_is_downloaded(fresh, mirror, how):
    good = DATA / "MNIST" / "raw" / PACKED[1]
    shutil.copy(good, mirror)
    bad = fresh / "MNIST" / "raw" / PACKED[1]
    damage(bad, how)
    assert len(load_mnist(fresh).y_train) == 50_000
    assert bad.read_bytes() == good.read_bytes()
    assert listing(fresh / "MNIST" / "raw") == sorted(PACKED)


def test_four_processes_download_at_once(fresh, mirror):
    good = DATA / "MNIST" / "raw" / PACKED[3]
    shutil.copy(good, mirror)
    damage(fresh / "MNIST" / "raw" / PACKED[3], "missing")
    pipes = [FORKS.Pipe(duplex=False) for _ in range(4)]
    processes = [
        FORKS.Process(target=load_and_send, args=(threads, MNIST.mirrors, fresh, send))
        for threads, (_, send) in enumerate(pipes, 1)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
    # The same bits whatever the number of threads
    first, *others = (receive.recv() for receive, _ in pipes)
    assert others == [first] * 3
    assert first[0].startswith("0x1.")
    assert first[-1] == ""  # nothing is printed
    for process in processes:
        process.join()
        assert process.exitcode == 0
    raw = fresh / "MNIST" / "raw"
    assert listing(raw) == sorted(PACKED)
    assert (raw / PACKED[3]).read_bytes() == good.read_bytes()


def test_download_with_wrong_md5_is_refused(fresh, mirror):
    (mirror / PACKED[1]).write_bytes(b"not the labels")
    damage(fresh / "MNIST" / "raw" / PACKED[1], "missing")
    before = listing(fresh)
    with pytest.raises(RuntimeError, match=f"{PACKED[1]} is missing.*corrupted"):
        load_mnist(fresh)
    assert listing(fresh) == before


@pytest.fixture
def read_only(fresh, tmp_path, monkeypatch):
    """Refuse to make or rename anything in `fresh` (chmod would not stop root)."""

    def refuse(function):
        def guarded(*args, **kwargs):
            if any(str(arg).startswith(str(fresh)) for arg in args):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
            return function(*args, **kwargs)

        return guarded

    for name in ("mkdir", "replace", "rename", "open"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    return fresh


def test_read_only_folder(read_only, oracle, tmp_path):
    splits = load_mnist(read_only)
    assert torch.equal(splits.y_train, oracle[0].targets[:50_000])
    assert listing(read_only / "MNIST" / "raw") == sorted(PACKED)
    assert listing(tmp_path / "spare") == []


def test_read_only_folder_with_missing_file(read_only):
    (read_only / "MNIST" / "raw" / PACKED[0]).unlink()
    with pytest.raises(RuntimeError, match=r"is missing.*Read-only.*git checkout.*can be written"):
        load_mnist(read_only)


def test_interrupted_download_leaves_nothing(fresh, monkeypatch):
    def interrupted(url, folder, name, md5):
        Path(folder, name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.download_url", interrupted)
    damage(fresh / "MNIST" / "raw" / PACKED[0], "altered")
    before = listing(fresh)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(fresh)
    assert listing(fresh) == before
