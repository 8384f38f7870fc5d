"""Time and memory of the exact losses beside other libraries' and brute force.

    python tests/benchmarks/loss.py            # all triplets, by batch size, ten classes
    python tests/benchmarks/loss.py --classes  # beside sentence-transformers, by images a class

Embeddings on the unit sphere, 64 numbers each, ten balanced classes, margin 0.2, squared Euclidean
distance; forward and backward, two threads. Times are taken in turn in one process (median and
range). Peak memory is that of a process of its own for each row: the highest resident memory during
one forward and backward, as Linux records it, less what the process held before (in small batches,
mostly a library's own pages). A rival is skipped where the memory it would need, by its measured
bytes a triplet, exceeds 60 % of what is available.

With --classes both losses that sentence-transformers has too, all triplets and semi-hard, with two
images a class, with four and with ten classes. It writes them as n² since version 6.2.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from machine import THREADS, available, machine

from tripletlib import losses

SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
RIVALS = {"pytorch-metric-learning": 45, "brute force": 18}  # bytes a triplet, as measured
LONGEST = 2048  # beyond it no rival is tried


def rival(name: str):
    """Give the loss of that name, a function of embeddings and labels."""
    if name == "tripletlib":
        return losses.batch_all_triplet_loss
    if name == "brute force":
        return brute_force
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss

    distance = LpDistance(power=2, normalize_embeddings=False)
    return TripletMarginLoss(margin=0.2, distance=distance)


def brute_force(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Every (anchor, positive, negative) in an (n, n, n) tensor."""
    distances = torch.cdist(x, x).square()
    same = labels[:, None] == labels[None]
    positive = same & ~torch.eye(len(x), dtype=torch.bool)
    hinge = (distances[:, :, None] - distances[:, None, :] + 0.2).relu()
    hinge = hinge * (positive[:, :, None] & ~same[:, None, :])
    return hinge.sum() / (hinge > 0).sum()


def batch(n: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random embeddings on the unit sphere and balanced labels in random order."""
    torch.manual_seed(n)
    x = torch.nn.functional.normalize(torch.randn(n, 64))
    return x.requires_grad_(), torch.randperm(n) % classes


def seconds(loss, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Time one forward and backward."""
    x.grad = None
    start = time.perf_counter()
    loss(x, labels).backward()
    return time.perf_counter() - start


def status(field: str) -> int:
    """Bytes that the kernel reports for this process: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_here(name: str, n: int) -> int:
    """Extra bytes of resident memory at the peak of one forward and backward."""
    loss, (x, labels) = rival(name), batch(n)
    seconds(loss, *batch(64))  # loads kernels and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present, from here on
    before = status("VmRSS")
    seconds(loss, x, labels)
    return status("VmHWM") - before


def peak(name: str, n: int) -> int:
    """`peak_here` in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, str(n)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def of_sentence_transformers(mining: str):
    """Give the loss of that library, with squared distances and on embeddings."""
    from sentence_transformers.sentence_transformer.losses import (
        BatchAllTripletLoss,
        BatchHardTripletLossDistanceFunction,
        BatchSemiHardTripletLoss,
    )

    kind = {"all": BatchAllTripletLoss, "semihard": BatchSemiHardTripletLoss}[mining]
    euclidean = BatchHardTripletLossDistanceFunction.eucledian_distance
    loss = kind(torch.nn.Module(), lambda x: euclidean(x).square(), margin=0.2)
    return lambda x, labels: loss.compute_loss_from_embeddings([x], labels)


def compare_by_classes(mining: str, n: int, each: int) -> None:
    """Print a row: one batch size, so many images a class."""
    rivals = {"ours": losses.TripletLoss(0.2, mining), "theirs": of_sentence_transformers(mining)}
    x, labels = batch(n, n // each)
    times = {name: [] for name in rivals}
    for _ in range(10):
        for name, loss in rivals.items():
            seconds(loss, x, labels)  # brings back the pages that the other one gave away
            times[name] += [seconds(loss, x, labels) for _ in range(2)]
    values = [loss(x, labels).item() for loss in rivals.values()]
    assert abs(values[0] - values[1]) < 1e-5, values
    ours, theirs = (statistics.median(taken) for taken in times.values())
    ratios = sorted(b / a for a, b in zip(*times.values(), strict=True))
    print(
        f"{mining:9} {n:5} {each:4}  {ours * 1e3:8.2f} ms  {theirs * 1e3:9.2f} ms  "
        f"{theirs / ours:6.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})",
        flush=True,
    )


def compare(n: int) -> None:
    """Print the rows of one batch size."""
    names = ["tripletlib"]
    for name, bytes_each in RIVALS.items():
        need = bytes_each * n**3 * (0.09 if name.startswith("py") else 1)
        if n <= LONGEST and need < 0.6 * available():
            names.append(name)
        else:
            print(f"{n:6}  {name:24} skipped: would need about {need / 2**30:,.0f} GiB")
    (x, labels), times = batch(n), {name: [] for name in names}
    for name in names:
        seconds(rival(name), x, labels)
    for _ in range(3 if n >= 1024 else 9):
        for name in names:
            repeats = 5 if name == "tripletlib" and n <= 2048 else 1
            times[name] += [seconds(rival(name), x, labels) for _ in range(repeats)]
    ours = statistics.median(times["tripletlib"])
    for name, taken in times.items():
        median, extra = statistics.median(taken), peak(name, n)
        print(
            f"{n:6}  {name:24} {median * 1e3:10.2f} ms ({min(taken) * 1e3:.2f} to "
            f"{max(taken) * 1e3:.2f})  {median / ours:7.1f}x  {extra / 2**20:9.1f} MiB "
            f"= {extra / n**2:7.1f} n² bytes",
            flush=True,
        )


def main() -> None:
    """Print the table, or the peak memory of one loss."""
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--peak"]:
        print(peak_here(sys.argv[2], int(sys.argv[3])))
        return
    print(machine())
    if sys.argv[1:2] == ["--classes"]:
        print(
            "mining        n  images a class: ours, sentence-transformers, ratio of medians (range)"
        )
        for mining in losses.MININGS[:2]:
            for n in (512, 1024):
                for each in (2, 4, n // 10):
                    compare_by_classes(mining, n, each)
        return
    print("     n  loss                     forward + backward: median (range), ratio, peak memory")
    for n in SIZES:
        compare(n)


if __name__ == "__main__":
    main()
