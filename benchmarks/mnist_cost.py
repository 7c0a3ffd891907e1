"""Start-up time and peak memory of `python -m experiments mnist`, cold and with its compilation cache.

    python benchmarks/mnist_cost.py

The time to the first training step is bounded from above by the time to the first stored run, in which one
teacher trains for an epoch and four students for a step. Memory is the largest resident size of the process,
against the number of seeds and of noise images.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """Seconds to the first stored run and to the end, and peak resident GB."""

    first_run: float
    total: float
    peak_gb: float


def run(cache: Path, *settings: str) -> Cost:
    """The cost of one command in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        start, first = time.perf_counter(), 0.0
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments", "mnist", *settings, "--out", out],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            stdout=subprocess.DEVNULL,
        )
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not first and any(Path(out).glob("parts/*.json")):
                first = time.perf_counter() - start
            if ended:
                break
            time.sleep(0.02)
        if status:
            sys.exit(os.waitstatus_to_exitcode(status))
        return Cost(round(first, 1), round(time.perf_counter() - start, 1), round(usage.ru_maxrss / 1e6, 2))


def main() -> None:
    """Print one line a measurement and all as JSON."""
    short = ("--epochs", "1", "--noise-images", "1024", "--student-epochs", "1")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for name, settings in {
            "cold, 1 seed": (*short, "--seeds", "1"),
            "cached, 1 seed": (*short, "--seeds", "1"),
            "cached, 100 seeds": (*short, "--seeds", "100"),
            "60,000 noise images, 1 seed": ("--epochs", "1", "--seeds", "1"),
            "600,000 noise images, 1 seed": ("--epochs", "1", "--seeds", "1", "--noise-images", "600000"),
        }.items():
            cost = run(cache, *settings)
            found[name] = cost._asdict()
            print(
                f"{name}: first run after {cost.first_run} s, end after {cost.total} s, peak {cost.peak_gb} GB",
                flush=True,
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
