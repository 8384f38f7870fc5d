"""Describe the machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

THREADS = 2


def available() -> int:
    """Bytes of memory that programs can still get."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def machine() -> str:
    """Describe the processor, the memory and the versions."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {THREADS} threads, "
        f"{available() / 2**30:.0f} GiB free, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
