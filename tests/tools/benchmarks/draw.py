"""Time of `draw()` against the plain loop over draws and slopes, and its memory against n.

Run `python tests/tools/benchmarks/draw.py`; it exits with 1 if `draw` is not as many times faster
as it should be, or if 10,000 draws take more memory than 100.
"""

import resource
import subprocess
import sys
import time
from statistics import median

PAIRS = 7
FACTORS = {21: 25.0, 1: 1.3}  # least ratio of times, by the number of slopes
LOOP_DRAWS = {21: 3, 1: 24}  # draws that the plain loop is timed over; 21 slopes take far longer
DRAWS = 96
MEMORY_LIMIT = 50  # MiB


def ours(x, conv, slopes: list[float], n: int) -> list:
    """Return the moments, each for every draw, at every slope."""
    from initlab import draw

    drawn = draw(x, conv, "default", n=n)
    return [drawn.each(slope) for slope in slopes]


def plain(x, conv, slopes: list[float], n: int) -> list:
    """Do what `draw` does as one would write it down: a pass for each draw, an activation each."""
    import torch
    import torch.nn.functional as F

    from initlab import initialize_

    moments = []
    with torch.no_grad():
        for _ in range(n):
            initialize_(conv, "default", bias="default")
            for slope in slopes:
                y = F.leaky_relu(conv(x), slope)
                moments.append((y.mean().item(), y.std().item()))
    return moments


def time_both() -> int:
    """Time in alternation, in this process; print medians and ratios, and return the exit code."""
    import torch

    from initlab import load_mnist

    x, conv = load_mnist().x_valid[:100], torch.nn.Conv2d(1, 32, 5)
    print(f"{len(x)} pictures, {conv}, {torch.get_num_threads()} threads")
    failed = False
    for n_slopes, factor in FACTORS.items():
        slopes = torch.linspace(0, 1, n_slopes).tolist()
        calls = {
            "ours": lambda s=slopes: ours(x, conv, s, DRAWS),
            "plain": lambda s=slopes, n=LOOP_DRAWS[n_slopes]: plain(x, conv, s, n),
        }
        per_draw = {"ours": DRAWS, "plain": LOOP_DRAWS[n_slopes]}
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        ours(x, conv, slopes, 32)  # warms up
        plain(x, conv, slopes, 1)
        for pair in range(PAIRS):
            for which in ("ours", "plain") if pair % 2 else ("plain", "ours"):
                start = time.perf_counter()
                calls[which]()
                times[which].append((time.perf_counter() - start) / per_draw[which])
        ratios = [slow / fast for slow, fast in zip(times["plain"], times["ours"], strict=True)]
        ratio = median(ratios)
        failed |= ratio < factor
        verdict = "TOO LOW" if ratio < factor else "ok"
        ms = {which: 1000 * median(values) for which, values in times.items()}
        print(
            f"slopes {n_slopes}: ours {ms['ours']:.2f}, plain {ms['plain']:.2f} ms a draw; "
            f"ratio {ratio:.2f} (pairs {min(ratios):.2f} to {max(ratios):.2f}), "
            f"limit {factor}: {verdict}",
            flush=True,
        )
    return int(failed)


def print_peak(n: int) -> None:
    """Print the peak memory of this process, in MiB, after n draws on one picture."""
    import torch

    # Not MNIST, the loading of which takes more memory than what is to be seen here
    ours(torch.rand(1, 1, 28, 28), torch.nn.Conv2d(1, 32, 5), [0.0], n)
    # ru_maxrss is in KiB on Linux, in bytes on macOS
    unit = 1024**2 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def peak(n: int) -> float:
    """Measure in a fresh process."""
    # This process must stay small, so it does not import torch: on Linux a child's ru_maxrss
    # starts from the memory of the process that started it, which would hide the growth.
    command = [sys.executable, __file__, "peak", str(n)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> int:
    """Measure time and memory, each in fresh processes, and return the exit code."""
    failed = subprocess.run([sys.executable, __file__, "time"]).returncode != 0
    few, many = peak(100), peak(10_000)
    verdict = "TOO HIGH" if many - few > MEMORY_LIMIT else "ok"
    print(
        f"peak memory of 10,000 draws: {many:.0f} MiB, of 100: {few:.0f} MiB; "
        f"growth {many - few:.1f}, limit {MEMORY_LIMIT}: {verdict}"
    )
    return int(failed or many - few > MEMORY_LIMIT)


if __name__ == "__main__":
    if sys.argv[1:] == ["time"]:
        sys.exit(time_both())
    elif sys.argv[1:2] == ["peak"]:
        print_peak(int(sys.argv[2]))
    else:
        sys.exit(main())
