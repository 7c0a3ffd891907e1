"""Start-up time and peak memory of `python -m experiments mnist`, cold and with its compilation cache.

    python benchmarks/mnist_cost.py

Start-up is bounded from above by the wall time of whole runs with almost no training in them. Memory is the
largest resident size of the process, against the number of seeds and of noise images.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(cache: Path, *settings: str) -> tuple[float, float]:
    """Wall seconds and peak resident GB of one command in a process of its own."""
    command = [sys.executable, "-m", "experiments", "mnist", *settings]
    with tempfile.TemporaryDirectory() as out:
        watcher = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
            "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", watcher, *command, "--out", out],
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return time.perf_counter() - start, int(result.stdout) / 1e6


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
            seconds, memory = run(cache, *settings)
            found[name] = {"seconds": round(seconds, 1), "peak_gb": round(memory, 2)}
            print(f"{name}: {seconds:.1f} s, peak {memory:.2f} GB", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
