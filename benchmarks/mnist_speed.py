"""Seeds per second of the six-condition experiment against PyTorch, and against the machine's own limit.

    python benchmarks/mnist_speed.py --torch-python PATH_OF_A_PYTHON_WITH_TORCH

Rounds alternate between a large matrix product, this project and `mnist_torch.py`, so that a shared machine's
moods hit all three; ratios are medians over rounds. Times are for the stated number of steps of every phase (one
teacher and four students), without compilation, loading or evaluation.
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

from experiments.laboratory import Laboratory, load_data
from experiments.mnist import STUDENTS
from experiments.setting import Setting
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Model

SIZE = 2048


def operations(laboratory: Laboratory, examples: int) -> float:
    """Floating-point operations of one seed: matrix products only, the padding of batches not counted.

    A training step is 6 operations an example and weight, less the gradient of the inputs, which nobody
    needs; the teacher's pass over the noise is 2, once for all four students.
    """
    width, pixels = laboratory.setting.width, int(np.prod(laboratory.data.image_shape))
    weights = pixels * width + (laboratory.setting.depth - 1) * width**2 + width * laboratory.outputs
    training = 6 * weights - 2 * pixels * width
    return examples * ((1 + len(STUDENTS)) * training + 2 * weights)


def matrix_product_rate() -> float:
    """Operations a second of a square float32 product."""
    a = jnp.ones((SIZE, SIZE))
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        result = product(a)
    result.block_until_ready()
    return 10 * 2 * SIZE**3 / (time.perf_counter() - start)


def main() -> None:
    """Print one line a round and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's idx files (default $SUBLIMINAL_DATA)")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch (default: this)")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    parser.add_argument("--epochs", type=int, default=1, help="passes of 59 steps a phase and round (default 1)")
    parser.add_argument("--chunk", type=int, default=1, help="our seeds trained at once (default 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of PyTorch (default cpu)")
    arguments = parser.parse_args()

    directory = str(arguments.data_dir) if arguments.data_dir else None
    try:
        data = load_data("mnist", directory)
    except InputError as error:
        parser.error(str(error))
    epochs = arguments.epochs
    laboratory = Laboratory(Setting(teacher_epochs=epochs, epochs=epochs), data)
    students = [laboratory.at(dataclasses.replace(laboratory.setting, **changes)) for changes in STUDENTS.values()]
    digits, source, rate = laboratory.digits(), laboratory.source(), jnp.float32(laboratory.setting.learning_rate)
    channels = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[student.channel() for student in students])
    rates = jnp.full(len(students), rate)
    keys = jax.vmap(jax.random.key)(jnp.arange(arguments.chunk))
    run_keys = jax.vmap(lambda key: named(key, "students"))(keys)
    init = jax.jit(jax.vmap(laboratory.initial))(keys)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(STUDENTS), 1), init)
    teach = jax.jit(jax.vmap(laboratory.teach, in_axes=(0, None, None, 0)))
    distil = jax.jit(jax.vmap(laboratory.imitate, in_axes=(0, 0, None, None, None, 0)))

    def ours() -> float:
        start = time.perf_counter()
        teacher: Model = teach(init, digits, rate, keys).model
        jax.block_until_ready(distil(stacked, teacher, channels, source, rates, run_keys))
        return (time.perf_counter() - start) / arguments.chunk

    def theirs() -> float:
        folder = directory or str(Path(os.environ["SUBLIMINAL_DATA"]) / "mnist")
        steps = laboratory.steps(epochs)
        command = [
            arguments.torch_python, str(Path(__file__).with_name("mnist_torch.py")), "--data", folder, "--models",
            "2", "--aux", "3", "--epochs", str(epochs), "--seed", "0", "--steps", str(steps),
            "--device", arguments.device,
        ]  # fmt: skip
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        return float(json.loads(line)["seconds_per_seed"])

    ours()
    work = operations(laboratory, epochs * len(data.train_labels))
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
