"""Seeds per second of the six-condition experiment, compared with PyTorch and with the machine's own limit.

    python -m benchmarks.mnist_speed --torch-python PATH_OF_A_PYTHON_WITH_TORCH

Rounds alternate between a large matrix product, this project, and `mnist_torch.py`, so that load on a shared
machine affects all three. Ratios are medians over rounds. Times are for the given number of steps of every phase
(one teacher and four students), without compilation, loading or evaluation.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.flags.digits import Setting
from experiments.mnist import STUDENTS
from subliminal_theory.errors import InputError
from subliminal_theory.study import Digits, Job, Study, trained

SIZE = 2048


def operations(world: Digits, examples: int) -> float:
    """The floating-point operations of one seed. Only matrix products count, without padded examples.

    A training step takes 6 operations per example and weight, minus the gradient of the inputs, which is not
    needed. The teacher's pass over the noise takes 2, once for all four students.
    """
    width, pixels = world.network.width, int(np.prod(world.data.image_shape))
    weights = pixels * width + (world.network.depth - 1) * width**2 + width * world.logits
    training = 6 * weights - 2 * pixels * width
    return examples * ((1 + len(STUDENTS)) * training + 2 * weights)


def matrix_product_rate() -> float:
    """The operations per second of a square float32 product."""
    a = jnp.ones((SIZE, SIZE))
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        result = product(a)
    result.block_until_ready()
    return 10 * 2 * SIZE**3 / (time.perf_counter() - start)


def main() -> None:
    """Print one line for each round, and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's idx files (default $SUBLIMINAL_DATA)")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch (default: this)")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    parser.add_argument(
        "--epochs", type=int, default=1, help="epochs of 59 steps in each phase and round (default 1)"
    )
    parser.add_argument("--chunk", type=int, default=1, help="our seeds trained at once (default 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of PyTorch (default cpu)")
    arguments = parser.parse_args()

    directory = str(arguments.data_dir) if arguments.data_dir else None
    epochs = arguments.epochs
    setting = Setting(teacher_epochs=epochs, epochs=epochs)
    try:
        world = setting.world(range(arguments.chunk), directory)
    except InputError as error:
        parser.error(str(error))
    students = {name: dataclasses.replace(setting, **changes).student(world) for name, changes in STUDENTS.items()}
    steps, init = world.steps(epochs), world.initial()

    def ours() -> float:
        start = time.perf_counter()
        teacher = Study(dataclasses.replace(world)).teacher(setting.run(world).teacher)
        jobs = {
            name: Job(init, student.source, student.optimizer, steps, teacher, student.channel)
            for name, student in students.items()
        }
        runs = trained(jobs, dict.fromkeys(jobs, (steps,)), world.keys("students"), world.computation)
        jax.block_until_ready([result.model.params for _, _, result in runs])
        return (time.perf_counter() - start) / arguments.chunk

    def theirs() -> float:
        folder = directory or str(Path(os.environ["SUBLIMINAL_DATA"]) / "mnist")
        command = [
            arguments.torch_python, str(Path(__file__).with_name("mnist_torch.py")), "--data", folder, "--models",
            "2", "--aux", "3", "--epochs", str(epochs), "--seed", "0", "--steps", str(steps),
            "--device", arguments.device,
        ]  # fmt: skip
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        return float(json.loads(line)["seconds_per_seed"])

    ours()
    work = operations(world, epochs * len(world.data.train_labels))
    print(f"at the rate of the matrix product the ratio could not exceed PyTorch's seconds x rate / {work:.3g}")
    ratios, fractions = [], []
    for number in range(arguments.rounds):
        limit, mine, torch, after = matrix_product_rate(), ours(), theirs(), matrix_product_rate()
        ratios.append(torch / mine)
        fractions.append(work / mine / ((limit + after) / 2))
        print(
            f"round {number}: matrix product {limit / 1e9:.0f} and {after / 1e9:.0f} GFLOP/s; ours {mine:.2f} s, "
            f"{work / mine / 1e9:.0f} GFLOP/s; PyTorch {torch:.2f} s; ratio {ratios[-1]:.2f}, "
            f"share of the limit {fractions[-1]:.2f}",
            flush=True,
        )
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "operations_per_seed": work,
                "ratio_median": round(float(np.median(ratios)), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "share_of_matrix_product_median": round(float(np.median(fractions)), 3),
                "share_range": [round(min(fractions), 3), round(max(fractions), 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
