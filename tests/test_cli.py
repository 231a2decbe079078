"""`initlab trace` from a shell: what it prints and returns, and says when it cannot run."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from initlab.diagnose.cli import add_command

ROOT = Path(__file__).resolve().parents[1]
MINE = """
from torch import nn
def plain(width=7): return nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 2))
def dead():
    net = plain()
    nn.init.constant_(net[0].bias, -10)
    return net
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
    def forward(self, x, y): return self.a(x) + y
def raises(): return 1 / 0
no, tokens, module = dict, lambda: nn.Embedding(9, 4), plain()
lazy = lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
"""


@pytest.fixture
def run(capsys, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)

    def command(name, *argv):
        parser = argparse.ArgumentParser()
        add_command(parser.add_subparsers())
        name = name if ":" in name else f"{file}:{name}"
        args = parser.parse_args(["trace", name, *argv])
        status = args.func(args)
        return status, *capsys.readouterr()

    return command


def test_status_and_first_line(run):
    status, out, err = run("plain")
    assert (status, err) == (0, "")
    assert out.startswith("no problems found; 100% of the weights seen and judged\n")
    assert "Judged on noise of shape (8, 7)" in out
    status, out, err = run("dead", "--all")
    assert (status, err, out.splitlines()[1]) == (1, "", "0: dead")
    assert run("plain", "width=5")[1].count("(8, 5)") == 1
    (noise,) = json.loads(run("plain", "--json")[1])["remarks"]
    assert noise.startswith("Judged on noise of shape (8, 7)")
    assert run("module")[0] == 0
    assert run("tokens")[0] == 0
    assert run("Two", "--shape", "3", "--shape", "3")[0] == 0
    assert run("initlab:conv_stack", "depth=2")[0] == 0  # a module that makes it when asked


def test_output_that_nobody_reads_is_no_error():
    words = [sys.executable, "-m", "initlab", "trace", "initlab:conv_stack", "depth=2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as made:
        made.stdout.close()
        assert (made.stderr.read(), made.wait()) == (b"", 141)


def test_json_data_and_picture(run, tmp_path):
    png, data = tmp_path / "t.png", tmp_path / "x.npy"
    np.save(data, np.random.default_rng(0).normal(size=(6, 7)))
    status, out, err = run("dead", "--json", "--data", str(data), "--save", str(png))
    found = json.loads(out)
    assert (status, err) == (1, "")
    assert found["problems"][0]["layer"] == "0"
    assert found["rows"][0]["shape"] == [6, 9]
    assert found["rows"][0]["asked_std"] == pytest.approx((2 / 7) ** 0.5)
    assert found["remarks"] == ["An output is the same for all inputs, of rms 0.181: no signal."]
    assert png.read_bytes()[:4] == b"\x89PNG"
    torch.save(torch.randn(4, 7), tmp_path / "x.pt")
    assert run("plain", "--data", str(tmp_path / "x.pt"))[0] == 0


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_run_once(run):
    assert run("lazy")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["absent"], "has no absent"),
        (["no_such_module_here:x"], "no_such_module_here"),
        (["no"], "a dict"),
        (["raises"], "ZeroDivisionError: division by zero"),
        (["raises"], "mine.py, line"),
        (["plain", "--shape", "3,x"], "no shape"),
        (["plain", "--shape", "3"], "does not run on (8, 3)"),
        (["Two", "--shape", "3"], "--shape once for each input"),
        (["plain", "--batch", "0"], "empty"),
        (["plain", "--save", "/no/such/folder/t.png"], "no file can be made there"),
        (["plain", "--data", "/no/such.npy"], "No such file"),
    ],
)
def test_an_error_is_one_sentence(run, argv, words):
    status, out, err = run(*argv)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert words in err
