"""Which parameters of a `Transformer` the tensors of a checkpoint hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and the parameters in it. The outputs of a parameter are its last axis.

    Attributes:
        theirs: the name of the tensor.
        ours: the names of the parameters.
        transposed: whether outputs are the first axis of the tensor, not the last.
        sizes: the number of outputs of each parameter, if there are several.
        groups: the outputs of each parameter consist of this many equal groups, such as heads. The tensor has the
            first group of every parameter, then the second group of every parameter, and so on.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    sizes: tuple[int, ...] = ()
    groups: int = 1

    def take_apart(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parameters in a tensor, as views of it if possible."""
        if len(self.ours) == 1:
            return [tensor.T if self.transposed else tensor]
        ends = np.cumsum(self.sizes)[:-1]
        if not self.transposed:
            return np.split(tensor, ends, axis=-1)
        inputs = tensor.shape[1:]
        parts = np.split(tensor.reshape(self.groups, -1, *inputs), ends // self.groups, axis=1)
        return [part.reshape(-1, *inputs).T for part in parts]

    def put_together(self, params: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `take_apart`."""
        if len(self.ours) == 1:
            return params[0].T if self.transposed else params[0]
        if not self.transposed:
            return np.concatenate(params, axis=-1)
        inputs = params[0].shape[:-1]
        parts = [param.T.reshape(self.groups, -1, *inputs) for param in params]
        return np.concatenate(parts, axis=1).reshape(-1, *inputs)

    def shape(self, params: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the tensor that holds parameters of these shapes."""
        inputs, outputs = params[0][:-1], sum(shape[-1] for shape in params)
        return (outputs, *inputs) if self.transposed else (*inputs, outputs)


def linear(theirs: str, ours: str, bias: bool, transposed: bool = True) -> list[Entry]:
    """The matrix of a linear layer, and its bias if it has one."""
    found = [Entry(f"{theirs}.weight", (f"{ours}/kernel",), transposed)]
    return found + [Entry(f"{theirs}.bias", (f"{ours}/bias",))] * bias


def fused(
    theirs: str, ours: Sequence[str], sizes: Sequence[int], bias: bool, transposed: bool, groups: int = 1
) -> list[Entry]:
    """Several linear layers in one matrix, and their biases in one vector if they have any."""
    parts = (("weight", "kernel"), ("bias", "bias"))[: 1 + bias]
    return [
        Entry(f"{theirs}.{part}", tuple(f"{name}/{leaf}" for name in ours), transposed, tuple(sizes), groups)
        for part, leaf in parts
    ]


def layer_norm(theirs: str, ours: str) -> list[Entry]:
    """The scale and the bias of a layer norm."""
    return [Entry(f"{theirs}.weight", (f"{ours}/scale",)), Entry(f"{theirs}.bias", (f"{ours}/bias",))]
