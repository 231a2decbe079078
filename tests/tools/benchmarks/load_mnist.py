"""Time and peak memory of `load_mnist()` against the naive way to load the same.

Run `python tests/tools/benchmarks/load_mnist.py`; it exits with 1 if a ratio is above its limit.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RAW = Path(__file__).resolve().parents[3] / "data" / "MNIST" / "raw"
PAIRS = 9
LIMITS = {"seconds": 0.8, "peak": 0.5}


def naive(root: str, n: int = 50_000) -> tuple:
    """Normalise the pictures without checks, chunks or in-place operations."""
    from torchvision.datasets import MNIST

    dataset, test = MNIST(root, download=True), MNIST(root, train=False)
    x = dataset.data[:n].view(n, -1) / 255
    mean, std = x.mean(), x.std()
    train = (x - mean) / std
    valid = (dataset.data[n:].view(len(dataset.data) - n, -1) / 255 - mean) / std
    x_test = (test.data.view(len(test.data), -1) / 255 - mean) / std
    targets = dataset.targets[:n], dataset.targets[n:], test.targets
    return train, valid, x_test, *targets, mean, std


def measure(which: str, root: str) -> None:
    """Print seconds and growth of peak memory of one call, in this process."""
    import torchvision.datasets  # noqa: F401 (whose import is not to be measured)

    from initlab import mnist

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    kept = mnist.load_mnist(root) if which == "ours" else naive(root)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del kept
    print(json.dumps({"seconds": seconds, "peak": peak}))


def run(which: str, root: str) -> dict[str, float]:
    """Measure in a fresh process."""
    # This process must stay small, so it does not import torch: on Linux a child's ru_maxrss
    # starts from the memory of the process that started it, which would hide the growth.
    command = [sys.executable, __file__, which, root]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> int:
    """Measure in alternation, print medians and ratios, and return the exit code."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "naive": []}
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, "MNIST", "raw")
        raw.mkdir(parents=True)
        for packed in RAW.glob("*.gz"):
            shutil.copy(packed, raw)
        run("naive", root)  # unpacks the files, and brings them into the page cache
        run("ours", root)
        for pair in range(PAIRS):
            for which in ("ours", "naive") if pair % 2 else ("naive", "ours"):
                runs[which].append(run(which, root))
    for which, results in runs.items():
        seconds, peak = (median(r[key] for r in results) for key in LIMITS)
        # ru_maxrss is in KiB on Linux, in bytes on macOS
        mib = peak / (1024**2 if sys.platform == "darwin" else 1024)
        print(f"{which:>5}: {seconds:.3f} s, peak memory +{mib:.0f} MiB (medians of {PAIRS})")
    failed = False
    for key, limit in LIMITS.items():
        pairs = zip(runs["ours"], runs["naive"], strict=True)
        ratios = [ours[key] / other[key] for ours, other in pairs]
        ratio = median(ratios)
        failed |= ratio > limit
        verdict = "TOO HIGH" if ratio > limit else "ok"
        print(
            f"{key}: ratio {ratio:.2f} (pairs {min(ratios):.2f} to {max(ratios):.2f}), "
            f"limit {limit}: {verdict}"
        )
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*sys.argv[1:])
    else:
        sys.exit(main())
