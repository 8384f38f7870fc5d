"""Time and memory of R-precision and MAP@R beside pytorch-metric-learning's AccuracyCalculator.

    python tests/benchmarks/metrics.py [queries references]

10 000 queries against 60 000 references unless said otherwise, 64 numbers each, ten balanced
classes, two threads. Once the classes lie apart, as after training; once they overlap. Times are
taken in turn in one process, and a ratio within a pair of ours and theirs (median and range of
three); ours include the confidence interval. The rival computes both metrics for about the price
of one, so that its time for both is also set against our two calls. It is run with faiss, its
default, and with its own exact search, `CustomKNN`. Peak memory is that of a process of its own for
each row, less what the process held before.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import THREADS, machine

from tripletlib import mean_average_precision_at_r, r_precision

ROUNDS = 3
NOISE = {"apart": 1.2, "overlapping": 3.0}
METRICS = ("r_precision", "mean_average_precision_at_r")
OURS = dict(zip(METRICS, (r_precision, mean_average_precision_at_r), strict=True))


def rivals() -> dict:
    """Give the searches of pytorch-metric-learning, by name."""
    import faiss
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN

    faiss.omp_set_num_threads(THREADS)
    return {"faiss": FaissKNN(), "CustomKNN": CustomKNN(LpDistance(normalize_embeddings=False))}


def measure(name: str, metrics: tuple[str, ...], data: tuple) -> tuple[float, ...]:
    """Compute the metrics with tripletlib or with that rival."""
    if name == "tripletlib":
        return tuple(OURS[metric](*data) for metric in metrics)
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(
        metrics, k="max_bin_count", device=torch.device("cpu"), knn_func=rivals()[name]
    )
    found = calculator.get_accuracy(*data)
    return tuple(found[metric] for metric in metrics)


def embeddings(queries: int, references: int, noise: float) -> tuple[torch.Tensor, ...]:
    """Make points on the unit sphere about ten centres."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(10, 64))
    data = []
    for count in (queries, references):
        labels = torch.randperm(count) % 10
        points = centres[labels] + noise / 8 * torch.randn(count, 64)
        data += [torch.nn.functional.normalize(points), labels]
    return tuple(data)


def status(field: str) -> int:
    """Bytes that the kernel reports for this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_here(name: str, queries: int, references: int) -> int:
    """Extra bytes of resident memory at the peak of computing both metrics."""
    data = embeddings(queries, references, NOISE["apart"])
    measure(name, METRICS, embeddings(100, 100, 1.0))  # loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present, from here on
    before = status("VmRSS")
    measure(name, METRICS, data)
    return status("VmHWM") - before


def peak(name: str, queries: int, references: int) -> int:
    """`peak_here` in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, str(queries), str(references)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def seconds(name: str, metrics: tuple[str, ...], data: tuple) -> float:
    """Time that computation."""
    start = time.perf_counter()
    measure(name, metrics, data)
    return time.perf_counter() - start


def compare(queries: int, references: int, kind: str) -> None:
    """Print the rows of one data set."""
    data = embeddings(queries, references, NOISE[kind])
    for metrics in ((METRICS[0],), (METRICS[1],), METRICS):
        what = f"{kind}, {' and '.join(metrics)}"
        found = {name: measure(name, metrics, data) for name in ("tripletlib", *rivals())}
        for name, values in found.items():
            print(what, name, *(f"{float(value):.7f}" for value in values), sep="  ")
        for name in rivals():
            pairs = [
                [seconds(n, metrics, data) for n in ("tripletlib", name)] for _ in range(ROUNDS)
            ]
            ours, theirs = map(statistics.median, zip(*pairs, strict=True))
            ratios = sorted(pair[1] / pair[0] for pair in pairs)
            print(
                f"{what}: {ours:.2f} s, {name} {theirs:.2f} s, ratio "
                f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
                flush=True,
            )


def main() -> None:
    """Print the table, or the peak memory of one row."""
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--peak"]:
        print(peak_here(sys.argv[2], *map(int, sys.argv[3:])))
        return
    sizes = tuple(map(int, sys.argv[1:])) or (10_000, 60_000)
    print(f"{machine()}; {sizes[0]} queries, {sizes[1]} references")
    for name in ("tripletlib", *rivals()):
        print(f"peak memory of {name:13} {peak(name, *sizes) / 2**20:8.0f} MiB", flush=True)
    for kind in NOISE:
        compare(*sizes, kind)


if __name__ == "__main__":
    main()
