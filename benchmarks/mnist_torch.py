"""Auxiliary-logit distillation on MNIST in plain PyTorch: the peer for timings.

An ensemble of MLPs 784-256-256-(10+m) has stacked parameters. A teacher learns the ten class logits from images.
Four students, two with the teacher's initialization and two with another model's, then learn the teacher's
auxiliary logits, or all its logits, from stored uniform noise. This file needs only torch and numpy.

    python benchmarks/mnist_torch.py --data DIR --models 2 --aux 3 --epochs 5 --seed 0 [--steps N]

The clock covers the training steps (shuffling, gathering of batches, the teacher's pass, gradients, Adam). It does
not cover reading the files, drawing the noise, two warm-up steps for each loss, and the test accuracies.
"""

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
HIDDEN = 256
BATCH = 1024
LEARNING_RATE = 3e-4
NOISE_IMAGES = 60_000

Params = list[Tensor]  # W1, b1, W2, b2, W3, b3 with shapes [models, d_in, d_out] and [models, 1, d_out]
Loss = Callable[[Params, Tensor], Tensor]  # takes the parameters and the indices of a batch


def init_params(models: int, d_in: int, d_out: int, generator: torch.Generator) -> Params:
    """Weights from N(0, 1/d_in) and zero biases, stacked over the models."""
    sizes = [d_in, HIDDEN, HIDDEN, d_out]
    params = []
    for fan_in, fan_out in pairwise(sizes):
        weight = torch.randn(models, fan_in, fan_out, generator=generator, device=generator.device)
        params += [weight.mul_(fan_in**-0.5), torch.zeros(models, 1, fan_out, device=generator.device)]
    return params


def forward(params: Params, x: Tensor) -> Tensor:
    """Logits [models, batch, 10+m] of the inputs [models, batch, 784]."""
    w1, b1, w2, b2, w3, b3 = params
    # einsum returns a view, and an in-place add on a view would make autograd copy it
    h = (torch.einsum("mbi,mio->mbo", x, w1) + b1).relu_()
    h = (torch.einsum("mbi,mio->mbo", h, w2) + b2).relu_()
    return torch.einsum("mbi,mio->mbo", h, w3) + b3


def batches(models: int, n: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices [models, batch] of each step. Every epoch has a new order per model; partial batches are kept."""
    for _ in range(epochs):
        orders = [torch.randperm(n, generator=generator, device=generator.device) for _ in range(models)]
        yield from torch.stack(orders).split(BATCH, dim=1)


def train(params: Params, loss: Loss, steps: Iterator[Tensor], limit: int | None) -> tuple[Params, int]:
    """Train a copy of the parameters with a new Adam. Returns it with the number of steps taken."""
    params = [p.clone().requires_grad_() for p in params]
    optimiser = torch.optim.Adam(params, lr=LEARNING_RATE, fused=True)
    done = 0
    for index in steps:
        if done == limit:
            break
        optimiser.zero_grad()
        loss(params, index).backward()
        optimiser.step()
        done += 1
    return [p.detach() for p in params], done


@torch.no_grad()
def accuracy(params: Params, images: Tensor, labels: Tensor) -> list[float]:
    """The test accuracy of each model, by the argmax of the ten class logits."""
    x = images.expand(params[0].shape[0], -1, -1)
    hits = forward(params, x)[..., :CLASSES].argmax(-1) == labels
    return hits.double().mean(-1).tolist()


def run(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    models: int,
    aux: int,
    epochs: int,
    seed: int,
    device: str = "cpu",
    steps_limit: int | None = None,
    cache_teacher: bool = False,
) -> dict[str, Any]:
    """Train the teacher and the four students. Returns the accuracy of each condition and the time.

    Images are uint8 arrays [n, 28, 28]. ``steps_limit`` limits the steps of each of the five phases. The teacher
    computes its logits batch by batch or, with ``cache_teacher``, for all the noise once per student.
    """
    if torch.device(device).type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))

    def clock() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def to_images(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.reshape(len(array), -1)).to(device).float().div_(127.5).sub_(1)

    def to_labels(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    images, labels = to_images(train_images), to_labels(train_labels)
    held_out = to_images(test_images), to_labels(test_labels)
    n, d_in = images.shape
    generator = torch.Generator(device).manual_seed(seed)
    init = init_params(models, d_in, CLASSES + aux, generator)
    # a derangement: model k starts where model k - 1 started; a single model needs a second draw
    other = [p.roll(1, 0) for p in init] if models > 1 else init_params(1, d_in, CLASSES + aux, generator)

    start = clock()
    noise = torch.empty(models * NOISE_IMAGES, d_in, device=device).uniform_(-1, 1, generator=generator)
    noise_seconds = clock() - start
    offsets = torch.arange(models, device=device)[:, None] * NOISE_IMAGES

    def cross_entropy(params: Params, index: Tensor) -> Tensor:
        index = index.flatten()
        logits = forward(params, images.index_select(0, index).view(models, -1, d_in))[..., :CLASSES]
        target = labels.index_select(0, index)
        return F.cross_entropy(logits.flatten(0, 1), target, reduction="sum") / (len(index) // models)

    def distillation(teacher: Params, first: int, cache: bool) -> Loss:
        """KL(teacher || student) over the logits from ``first`` on."""
        stored = None
        if cache:
            with torch.no_grad():
                chunks = noise.view(models, -1, d_in).split(BATCH, dim=1)
                stored = torch.cat([forward(teacher, x) for x in chunks], dim=1).flatten(0, 1)

        def loss(params: Params, index: Tensor) -> Tensor:
            rows = (index + offsets).flatten()
            x = noise.index_select(0, rows).view(models, -1, d_in)
            with torch.no_grad():
                logits = forward(teacher, x) if stored is None else stored[rows].unflatten(0, index.shape)
                target = logits[..., first:].log_softmax(-1)
            output = forward(params, x)[..., first:].log_softmax(-1)
            return F.kl_div(output, target, reduction="sum", log_target=True) / index.shape[1]

        return loss

    spare = torch.Generator(device).manual_seed(seed)  # the warm-up must not advance the main generator
    for loss, size in ((cross_entropy, n), (distillation(init, CLASSES, False), NOISE_IMAGES)):
        train(init, loss, batches(models, size, 1, spare), 2)

    accuracies = {"reference": accuracy(init, *held_out)}
    start = clock()
    teacher, steps = train(init, cross_entropy, batches(models, n, epochs, generator), steps_limit)
    seconds = clock() - start
    accuracies["teacher"] = accuracy(teacher, *held_out)
    for name, begin, first in (
        ("student_aux", init, CLASSES),
        ("student_all", init, 0),
        ("cross_aux", other, CLASSES),
        ("cross_all", other, 0),
    ):
        start = clock()
        order = batches(models, NOISE_IMAGES, epochs, generator)
        student, done = train(begin, distillation(teacher, first, cache_teacher), order, steps_limit)
        seconds += clock() - start
        steps += done
        accuracies[name] = accuracy(student, *held_out)
    return {
        "accuracies": accuracies,
        "seconds": seconds,
        "seconds_per_seed": seconds / models,
        "steps": steps,
        "noise_seconds": noise_seconds,
    }


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def main() -> None:
    """Run one configuration and print one JSON line."""
    parser = argparse.ArgumentParser(description="Auxiliary-logit distillation on MNIST in plain PyTorch.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--aux", type=int, default=3, help="number m of auxiliary logits")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="limit the steps of each phase")
    parser.add_argument("--cache-teacher", action="store_true", help="one teacher pass per student")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    data = [read_idx(args.data / name) for name in files]
    result = run(
        *data,
        models=args.models,
        aux=args.aux,
        epochs=args.epochs,
        seed=args.seed,
        device=args.device,
        steps_limit=args.steps,
        cache_teacher=args.cache_teacher,
    )
    print(json.dumps(result | {"device": args.device, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
