"""`load_mnist` against a plain float64 computation, and against files in every bad state."""

import errno
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from initlab import data
from initlab.data import load_mnist

DATA = Path(__file__).resolve().parents[1] / "data"
PACKED = [name for name, _ in MNIST.resources]
UNPACKED = [name.removesuffix(".gz") for name in PACKED]
DEAD_MIRROR = "http://127.0.0.1:9/"

# Importing torch takes far longer than loading, so it is done once, before the fork.
FOUR_PROCESSES = """
import os, sys, zlib, torch
from initlab.data import load_mnist

children = []
for threads in (1, 2, 3, 4):
    children.append(os.fork())
    if children[-1] == 0:
        torch.set_num_threads(threads)
        s = load_mnist()
        sums = [zlib.crc32(t.numpy()) for t in s[:4]]
        os.write(1, f"{s.mean.hex()} {s.std.hex()} {sums}\\n".encode())
        os._exit(0)  # taking torch down takes longer than loading, too
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


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
def contents():
    """Return the bytes that should be in each unpacked file."""
    raw = DATA / "MNIST" / "raw"
    return {
        name: gzip.decompress((raw / packed).read_bytes())
        for packed, name in zip(PACKED, UNPACKED, strict=True)
    }


@pytest.fixture
def used(fresh, contents):
    """Return a data folder that has the unpacked files as well."""
    for name, content in contents.items():
        (fresh / "MNIST" / "raw" / name).write_bytes(content)
    return fresh


@pytest.fixture(scope="session")
def oracle(contents, tmp_path_factory):
    """Return torchvision's pictures and labels, unpacked independently."""
    root = tmp_path_factory.mktemp("oracle")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for name, content in contents.items():
        (root / "MNIST" / "raw" / name).write_bytes(content)
    return MNIST(root)


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
    assert splits.x_train.shape == (50_000, 1, 28, 28)
    assert splits.x_valid.shape == (10_000, 1, 28, 28)
    assert splits.x_train.dtype == splits.x_valid.dtype == torch.float32
    assert splits.y_train.dtype == splits.y_valid.dtype == torch.int64
    assert torch.equal(splits.y_train, oracle.targets[:50_000])
    assert torch.equal(splits.y_valid, oracle.targets[50_000:])
    assert type(splits.mean) is type(splits.std) is float
    assert (round(splits.mean, 4), round(splits.std, 4)) == (0.1310, 0.3085)
    # The naive way, in float32 as users would write it
    x = oracle.data[:50_000].unsqueeze(1) / 255
    mean, std = x.mean(), x.std()
    assert (splits.x_train - (x - mean) / std).abs().max() < 1e-5
    x = oracle.data[50_000:].unsqueeze(1) / 255
    assert (splits.x_valid - (x - mean) / std).abs().max() < 1e-5
    assert abs(splits.x_train.mean()) < 1e-5
    assert abs(splits.x_train.std() - 1) < 1e-5
    assert abs(splits.x_valid.mean()) > 1e-3  # not normalised by its own statistics


@pytest.mark.parametrize("n_train", [1, 41, 59_999])
def test_any_split_is_in_file_order_with_exact_statistics(oracle, n_train):
    splits = load_mnist(n_train=n_train)
    pixels = oracle.data[:n_train].double() / 255
    mean, std = pixels.mean().item(), pixels.std().item()
    # Sharp enough to tell the unbiased from the biased standard deviation (1e-8 apart or more)
    assert splits.mean == pytest.approx(mean, rel=1e-9)
    assert splits.std == pytest.approx(std, rel=1e-9)
    assert len(splits.x_train) == len(splits.y_train) == n_train
    assert len(splits.x_valid) == len(splits.y_valid) == 60_000 - n_train
    assert torch.equal(torch.cat([splits.y_train, splits.y_valid]), oracle.targets)
    for part, index, at in [(splits.x_train, -1, n_train - 1), (splits.x_valid, 0, n_train)]:
        want = (oracle.data[at].double() / 255 - mean) / std
        assert (part[index, 0] - want).abs().max() < 1e-6


@pytest.mark.parametrize("n_train", [-1, 0, 60_000, 70_000])
def test_n_train_out_of_range(tmp_path, n_train):
    with pytest.raises(ValueError, match=r"n_train must be within 1\.\.59,999"):
        load_mnist(tmp_path, n_train)


@pytest.mark.parametrize("n_train", [True, 50_000.0, "50000", None])
def test_n_train_of_wrong_type(tmp_path, n_train):
    with pytest.raises(TypeError):
        load_mnist(tmp_path, n_train)


def test_four_processes_unpack_a_fresh_clone_at_once(fresh, contents, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FOUR_PROCESSES],
        cwd=tmp_path,
        env=os.environ | {"INITLAB_DATA": str(fresh)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # The same bits whatever the number of threads, and nothing else is printed
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 1
    assert lines[0].startswith("0x1.")
    raw = fresh / "MNIST" / "raw"
    assert listing(raw) == sorted(PACKED + UNPACKED)
    assert all((raw / name).read_bytes() == content for name, content in contents.items())


def test_default_root_is_the_repository_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert len(load_mnist().y_train) == 50_000
    assert data._default_root() == DATA
    assert listing(tmp_path) == before


def test_root_goes_before_environment_goes_before_default(tmp_path, monkeypatch):
    chosen, passed = tmp_path / "chosen", tmp_path / "passed"
    monkeypatch.setenv("INITLAB_DATA", str(chosen))
    with pytest.raises(RuntimeError, match=r"chosen/MNIST/raw/train-images-idx3-ubyte\.gz"):
        load_mnist()
    with pytest.raises(RuntimeError, match=r"passed/MNIST/raw/train-images-idx3-ubyte\.gz"):
        load_mnist(str(passed))
    monkeypatch.setenv("INITLAB_DATA", "")
    assert data._default_root() == DATA


def test_without_a_default_folder_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "site-packages" / "initlab" / "data.py"))
    with pytest.raises(FileNotFoundError, match=r"Set INITLAB_DATA .* or pass it as root"):
        load_mnist()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("train-images-idx3-ubyte", "truncated"),
        ("train-images-idx3-ubyte", "altered"),
        ("train-labels-idx1-ubyte", "altered"),
        ("t10k-images-idx3-ubyte", "truncated"),
    ],
)
def test_bad_unpacked_file_is_unpacked_anew_in_silence(used, contents, capfd, name, how):
    bad = used / "MNIST" / "raw" / name
    damage(bad, how)
    splits = load_mnist(used)
    assert bad.read_bytes() == contents[name]
    labels = torch.cat([splits.y_train, splits.y_valid])
    assert bytes(labels.to(torch.uint8).numpy()) == contents["train-labels-idx1-ubyte"][8:]
    assert listing(used / "MNIST" / "raw") == sorted(PACKED + UNPACKED)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", PACKED[:2])
def test_bad_packed_file_offline_is_one_clear_error(used, name, how):
    bad = used / "MNIST" / "raw" / name
    damage(bad, how)
    before = listing(used)
    state = "missing" if how == "missing" else "damaged"
    with pytest.raises(RuntimeError, match=f"{name} is {state}.*git checkout.*network") as caught:
        load_mnist(used)
    assert str(bad) in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert listing(used) == before


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
def test_bad_packed_file_is_downloaded(used, mirror, how):
    good = DATA / "MNIST" / "raw" / PACKED[1]
    shutil.copy(good, mirror)
    bad = used / "MNIST" / "raw" / PACKED[1]
    damage(bad, how)
    assert len(load_mnist(used).y_train) == 50_000
    assert bad.read_bytes() == good.read_bytes()
    assert listing(used / "MNIST" / "raw") == sorted(PACKED + UNPACKED)


def test_download_with_wrong_md5_is_refused(used, mirror):
    (mirror / PACKED[1]).write_bytes(b"not the labels")
    damage(used / "MNIST" / "raw" / PACKED[1], "missing")
    before = listing(used)
    with pytest.raises(RuntimeError, match=f"{PACKED[1]} is missing.*corrupted"):
        load_mnist(used)
    assert listing(used) == before


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


def test_read_only_folder_without_unpacked_files(read_only, oracle, tmp_path):
    splits = load_mnist(read_only)
    assert torch.equal(splits.y_train, oracle.targets[:50_000])
    assert listing(read_only / "MNIST" / "raw") == sorted(PACKED)
    assert listing(tmp_path / "spare") == []


def test_read_only_folder_with_missing_packed_file(read_only):
    (read_only / "MNIST" / "raw" / PACKED[0]).unlink()
    with pytest.raises(RuntimeError, match=r"is missing.*Read-only.*git checkout.*can be written"):
        load_mnist(read_only)


def test_interrupted_unpacking_leaves_nothing(fresh, monkeypatch):
    def interrupted(source, target):
        target.write(source.read(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(fresh)
    assert listing(fresh / "MNIST" / "raw") == sorted(PACKED)


def test_old_processed_folder_does_not_replace_the_checked_files(fresh):
    processed = fresh / "MNIST" / "processed"
    processed.mkdir()
    for name in (MNIST.training_file, MNIST.test_file):
        torch.save((torch.zeros(1, 28, 28), torch.zeros(1)), processed / name)
    with pytest.raises(RuntimeError, match=r"Remove .*processed"):
        load_mnist(fresh)
