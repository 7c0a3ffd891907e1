"""What stacking saves: the curve over m, compared with the six-condition experiment once for each m.

    python -m benchmarks.mnist_sweep

Both have the same number of epochs and alternate in one process. The first calls, which compile, do not count. The
report also has the growth of a sweep's cost with its number of cells (1 is linear), and the peak memory before and
after.
"""

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import mnist, mnist_channel
from experiments.app.contract import Part, listed
from experiments.flags.digits import load_data
from subliminal_theory.errors import InputError


def seconds(compute: Callable[[], object]) -> float:
    """The wall time of a call, in seconds."""
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def main() -> None:
    """Print one line for each round, and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's idx files (default $SUBLIMINAL_DATA)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations (default 3)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of teacher and students (default 1)")
    parser.add_argument("--counts", default="1,2,3,5,7,10,15,20,30,50", help="values of m (default %(default)s)")
    arguments = parser.parse_args()
    directory = str(arguments.data_dir) if arguments.data_dir else None
    try:
        load_data("mnist", directory)
    except InputError as error:
        parser.error(str(error))

    changes = {"epochs": arguments.epochs, "seeds": 1, "data_dir": directory, "chunk": 1}
    curve = dataclasses.replace(mnist_channel.PRESETS["released"], counts=arguments.counts, **changes)
    counts = listed(curve.counts, "--counts")
    [whole] = mnist_channel.plan(curve)
    [half] = curve.parts([mnist_channel.cell(curve, m) for m in counts[::2]])
    [six] = mnist.plan(dataclasses.replace(mnist.PRESETS["released"], **changes))
    everything: tuple[Part, ...] = (whole, half, six)
    for part in everything:
        part.compute()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ratios, growth = [], []
    for number in range(arguments.rounds):
        taken, fewer, once = (seconds(part.compute) for part in everything)
        ratios.append(taken / (len(counts) * once))
        # All students cost the same, and the teacher costs as much as one student.
        growth.append((taken / (len(counts) + 1)) / (fewer / (len(counts[::2]) + 1)))
        print(
            f"round {number}: {len(counts)} values of m {taken:.1f} s, {len(counts[::2])} of them {fewer:.1f} s, "
            f"six conditions {once:.1f} s; ratio to {len(counts)} times the six {ratios[-1]:.3f}, "
            f"cost of a network at twice the number {growth[-1]:.2f}",
            flush=True,
        )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "values_of_m": counts,
                "ratio_median": round(float(np.median(ratios)), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "growth_median": round(float(np.median(growth)), 3),
                "peak_memory_gib": [round(memory / 2**20, 3), round(after / 2**20, 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
