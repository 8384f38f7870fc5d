"""What `fit` and `embed` cost over a bare DataLoader, what workers save, and memory by folder size.

    python tests/benchmarks/datasets.py

The folder holds JPEGs of random soft shapes with grain, in eight classes. The bare loops read the
same `ImageFolderDataset` with torch's DataLoader and take the same steps: forward, loss, backward
and the same optimisers for `fit`, forward for `embed`. Both have two worker processes, whose start
and end count. The network is so small, and on one thread, that reading is most of the work. The two
run in turn in one process, and the ratio of a pair is taken within the pair: of images a second,
and of images a second of processor time, workers included, which other programs on the machine
disturb less. For the gain by workers the JPEGs are large and the network is one linear layer.

Memory is that of fresh processes that list a folder and train for an epoch. Another process
samples, every few milliseconds, the anonymous and shared memory of the one that trains and of its
workers, pages that several of them hold counted once (Pss). Pages of files are left out: those of
libraries count for less where other programs use them too.
"""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import machine
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from tripletlib import ImageFolderDataset, TripletLoss, embed, fit
from tripletlib._optimizer import optimizers

IMAGES, LARGE, FEW, MANY = 2048, 768, 1024, 4096  # to read, large ones, and for memory
BATCH, SIDE, WORKERS, TURNS = 128, 32, 2, 5
CLASSES, DRAWN = 8, 64  # pictures drawn; a folder repeats them


def write(folder: Path, images: int, width: int, height: int) -> Path:
    """Write JPEGs into a subfolder a class; return the folder."""
    random, files = np.random.default_rng(0), []
    tints = random.integers(60, 196, (CLASSES, 3))
    for number in range(DRAWN):
        coarse = (tints[number % CLASSES] + random.normal(0, 40, (6, 8, 3))).clip(0, 255)
        soft = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.BICUBIC)
        grained = (np.asarray(soft) + random.normal(0, 6, (height, width, 1))).clip(0, 255)
        Image.fromarray(grained.astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=85)
        files.append(file.getvalue())
    for number in range(images):
        path = folder / f"class{number % CLASSES}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[number % DRAWN])
    return folder


def small_network() -> nn.Module:
    """Make a network of two convolutions."""
    first = [nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 32))


def loader(dataset: ImageFolderDataset, *, shuffle: bool) -> DataLoader:
    """Make torch's own reader of the data set."""
    return DataLoader(dataset, BATCH, shuffle=shuffle, num_workers=WORKERS, persistent_workers=True)


def bare_fit(dataset: ImageFolderDataset) -> None:
    """Train for an epoch with nothing else in the loop."""
    network, loss = small_network(), TripletLoss()
    ours = optimizers(network, loss, 4e-3)
    for images, labels in loader(dataset, shuffle=True):
        value = loss(network(images), labels)
        for optimizer in ours:
            optimizer.zero_grad()
        value.backward()
        for optimizer in ours:
            optimizer.step()


def our_fit(dataset: ImageFolderDataset) -> None:
    """Train for an epoch with `fit`."""
    network = small_network()
    options = {"bf16": False, "progress": False}  # the bare loop has neither
    fit(network, dataset, epochs=1, batch_size=BATCH, workers=WORKERS, **options)


def bare_embed(dataset: ImageFolderDataset) -> None:
    """Embed with nothing else in the loop."""
    network = small_network().eval()
    with torch.no_grad():
        torch.cat([network(images) for images, _ in loader(dataset, shuffle=False)])


def our_embed(dataset: ImageFolderDataset) -> None:
    """Embed with `embed`."""
    embed(small_network(), dataset, BATCH, workers=WORKERS)


def decoding(workers: int) -> Callable[[ImageFolderDataset], object]:
    """Give a run of `embed` with next to no network."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8))
    return lambda dataset: embed(network, dataset, 32, workers=workers)


def rates(run: Callable, dataset: ImageFolderDataset) -> np.ndarray:
    """Images a second, and a second of processor time, of a run with its workers' start and end."""
    start = np.array([time.perf_counter(), sum(os.times()[:4])])
    run(dataset)
    return len(dataset) / (np.array([time.perf_counter(), sum(os.times()[:4])]) - start)


def compare(
    what: str, ours: Callable, other: Callable, dataset: ImageFolderDataset, turns: int = TURNS
) -> None:
    """Print the rates of two runs, and the ratios of the first's to the second's."""
    found: dict[Callable, list[np.ndarray]] = {ours: [], other: []}
    for run in found:
        run(dataset)
    for turn in range(turns):
        for run in (ours, other) if turn % 2 else (other, ours):
            found[run].append(rates(run, dataset))
    print(what)
    for place, second in enumerate(("second", "second of processor time")):
        first, last = (np.array(found[run])[:, place] for run in (ours, other))
        ratio = first / last
        print(
            f"    images a {second}: {np.median(first):.0f} and {np.median(last):.0f}, "
            f"ratio {np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})",
            flush=True,
        )


def held(process: int) -> int:
    """Bytes of anonymous and shared memory of a process and its children; 0 of one that ended."""
    total = 0
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon", "Pss_Shmem")):
                total += int(line.split()[1]) * 1024
    except OSError:
        return total
    return total + sum(held(int(child)) for child in children)


def peak(folder: Path) -> float:
    """MiB that training on a folder takes at its peak above what its process held before."""
    command = [sys.executable, __file__, "--train", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()  # it is ready, and waits
        before = most = held(process.pid)
        process.stdin.write(b"\n")
        process.stdin.close()
        while process.poll() is None:
            most = max(most, held(process.pid))
            time.sleep(0.005)
    if process.returncode:
        raise RuntimeError("training for the measurement of memory failed")
    return (most - before) / 2**20


def memory(place: Path) -> None:
    """Print the peaks of a folder and of one of four times the images, three of each."""
    folders = {images: write(place / str(images), images, 96, 72) for images in (FEW, MANY)}
    peaks: dict[int, list[float]] = {images: [] for images in folders}
    for _ in range(3):
        for images, found in peaks.items():
            found.append(peak(folders[images]))
    for images, found in peaks.items():
        print(
            f"fit on {images} images: {statistics.median(found):.1f} MiB ({min(found):.1f} to "
            f"{max(found):.1f}); all as tensors are {images * 3 * SIDE**2 * 4 / 2**20:.1f} MiB"
        )


def main() -> None:
    """Print all, or be the process whose memory is measured."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--train"]:
        print("ready", flush=True)
        sys.stdin.readline()
        our_fit(ImageFolderDataset(sys.argv[2], SIDE))
        return
    print(f"{machine()}, of which one is used")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small = ImageFolderDataset(write(place / "small", IMAGES, 96, 72), SIDE)
        large = ImageFolderDataset(write(place / "large", LARGE, 800, 600), 64)
        compare("fit and a bare loop, 96 x 72 pixels", our_fit, bare_fit, small)
        compare("embed and a bare loop, 96 x 72 pixels", our_embed, bare_embed, small)
        what = f"embed, 800 x 600 pixels, {WORKERS} workers and none"
        compare(what, decoding(WORKERS), decoding(0), large, turns=3)
        memory(place)


if __name__ == "__main__":
    main()
