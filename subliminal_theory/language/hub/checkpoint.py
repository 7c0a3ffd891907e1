"""Reads checkpoints from folders in the format of Hugging Face, or from GGUF files, and writes them as folders.

checkpoint = load_checkpoint(Path("SmolLM2-135M"))
checkpoint.model                                 # a Model, like every other in this project
save_checkpoint(Path("student"), checkpoint, student)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subliminal_theory.errors import InputError
from subliminal_theory.files import atomic_folder, misfits, write_atomically
from subliminal_theory.language.hub.families import Family, entries, ignored, read_family
from subliminal_theory.language.hub.filled import filled
from subliminal_theory.language.hub.gguf_file import is_gguf, read_gguf
from subliminal_theory.language.hub.gguf_model import Tensor, tensors_of
from subliminal_theory.language.hub.gguf_tokenizer import text_files
from subliminal_theory.language.hub.tensor_map import Entry
from subliminal_theory.language.hub.tensors import open_tensors, write_tensors
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.model.transformer import Transformer, transformer_of
from subliminal_theory.model import Model, by_layer, computed_in, from_nnx, shapes_of

Stored = np.ndarray | Tensor

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that was read from a folder or a GGUF file. `folder` is the path, `family` has the settings."""

    folder: Path
    family: Family
    model: Model


@dataclass(frozen=True, eq=False)
class CheckpointBase:
    """A checkpoint and its tokenizer, as the base of runs. Runs with another `seed` draw other random numbers."""

    seed: int
    checkpoint: Checkpoint
    tokenizer: CheckpointTokenizer

    @property
    def model(self) -> Model:
        """The model of the checkpoint."""
        return self.checkpoint.model

    @property
    def context(self) -> int:
        """The length of the longest row that the model can read, in tokens."""
        return self.checkpoint.family.config.context


def open_base(
    folder: Path,
    seed: int = 0,
    dtype: str = "float32",
    placement: Any = None,
    compute: str | None = None,
    remat: bool = True,
) -> CheckpointBase:
    """The base in a folder or a GGUF file with weights, tokenizer and chat template.

    Parameters are in `dtype`. The model computes in `compute`, by default in `dtype`. `placement` is as in
    `load_checkpoint`. `remat` is gradient checkpointing.

    Raises:
        InputError: as `load_checkpoint` and `CheckpointTokenizer.load`; the tokenizer has more tokens than the
            embedding has rows; `compute` is not a known dtype.
    """
    tokenizer = CheckpointTokenizer.load(folder)
    tokenizer.check_fits(read_family(folder).config.vocabulary)
    checkpoint = load_checkpoint(folder, dtype, placement, remat)
    if compute not in (None, dtype):
        checkpoint = replace(checkpoint, model=computed_in(checkpoint.model, _dtype(compute)))
    return CheckpointBase(seed, checkpoint, tokenizer)


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is unknown; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def skeleton(family: Family, remat: bool = False) -> Model:
    """The model of a family, with shapes instead of parameters."""
    # All parameters share one key, because nothing is drawn. Separate keys would take most of the time.
    rngs: Any = SimpleNamespace(params=lambda: jax.random.key(0))
    return jax.eval_shape(lambda: from_nnx(Transformer(family.config, rngs=rngs, remat=remat)))


def load_checkpoint(
    folder: Path | str, dtype: str = "float32", placement: Any = None, remat: bool = False
) -> Checkpoint:
    """The model in a folder or a GGUF file. Each parameter goes to its device in `dtype` as soon as it is read.

    `placement` is a device or a sharding, as for `jax.device_put`, or a function that returns one from the path
    and the shape of a parameter. Files are mapped into memory. At any time, at most one parameter is in memory
    twice; a parameter holds, for example, the query matrices of all layers. `remat` is gradient checkpointing.

    Raises:
        InputError: config.json or the weights cannot be read (see `read_family` and `open_tensors`); tensors are
            missing, unexpected or misshapen (one error names all of them); `dtype` is unknown.
    """
    kind, folder = _dtype(dtype), Path(folder)
    family = read_family(folder)
    opened = tensors_of(read_gguf(folder)) if is_gguf(folder) else open_tensors(folder)
    tensors = _renamed(opened, entries(family))
    shell = skeleton(family, remat)
    _require_bijection(folder, family, tensors, shapes_of(shell.params))
    params = filled(shell.params, entries(family), tensors, kind, placement)
    return Checkpoint(folder, family, shell.with_params(params))


def _renamed(tensors: Mapping[str, Stored], wanted: list[Entry]) -> dict[str, Stored]:
    """Tensors by their full names. Models stored without a head lack the first part of each name."""
    names = {entry.theirs for entry in wanted}
    stem = wanted[0].theirs.split(".")[0]
    bare = not any(name.startswith(f"{stem}.") for name in tensors)
    full = {n if n in names or not bare else f"{stem}.{n}": tensor for n, tensor in tensors.items()}
    return {name: tensor for name, tensor in full.items() if not ignored(name)}


def _require_bijection(
    folder: Path, family: Family, tensors: dict[str, Stored], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    wanted = {entry.theirs: entry.shape([shapes[name] for name in entry.ours]) for entry in entries(family)}
    untied = replace(family, config=replace(family.config, tied=False))
    head = entries(untied)[-1].theirs
    if family.config.tied and head in tensors:
        embedding = tensors.get(entries(family)[0].theirs)
        # Some libraries store a tied matrix twice.
        if embedding is not None and np.array_equal(tensors[head], embedding):
            del tensors[head]
    faults = misfits({name: (shape, jnp.floating) for name, shape in wanted.items()}, tensors)
    if faults:
        raise InputError(f"{folder}: the tensors do not fit {family.architecture}: {'; '.join(faults)}")


def save_checkpoint(folder: Path, like: Checkpoint, model: Model, dtype: str | None = None) -> None:
    """Write a model to a new folder that other libraries can load. LoRA factors are merged.

    Tensors keep the model's dtype unless `dtype` names another one. The text files of `like` (tokenizer, template)
    are copied, or made from the metadata if `like` is a GGUF file. The folder gets its name when it is complete.
    One tensor at a time is in host memory.

    Raises:
        InputError: the model has another shape than `like`, or is steered; `dtype` is unknown; the folder exists
            already or cannot be written.
    """
    plain = merge_lora(model)
    network = transformer_of(plain)
    if network.config != like.family.config:
        raise InputError(f"save_checkpoint: the model does not have the shape of {like.folder}")
    if network.steering is not None:
        raise InputError("save_checkpoint: other libraries cannot read the steering vector of a model")
    params = by_layer(plain.all_params)
    kind = np.dtype(next(iter(params.values())).dtype if dtype is None else _dtype(dtype))
    by_name = {entry.theirs: entry for entry in entries(like.family)}
    shapes = {name: entry.shape([params[ours].shape for ours in entry.ours]) for name, entry in by_name.items()}

    def read(name: str) -> np.ndarray:
        # np.asarray caches the host copy on a JAX array: copy the array first, so that the cache can be freed.
        parts = [np.asarray(params[ours].copy()).astype(kind, copy=False) for ours in by_name[name].ours]
        return by_name[name].put_together(parts)

    settings = {key: value for key, value in like.family.settings.items() if key != "torch_dtype"}
    settings["dtype"] = str(kind)
    with atomic_folder(folder) as new:
        write_tensors(new, {name: jax.ShapeDtypeStruct(shape, kind) for name, shape in shapes.items()}, read)
        for name, content in _text_of(like.folder).items():
            write_atomically(new / name, content)
        write_atomically(new / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


def _text_of(folder: Path) -> Mapping[str, bytes]:
    if is_gguf(folder):
        return text_files(folder) if "tokenizer.ggml.model" in read_gguf(folder).metadata else {}
    return {name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).exists()}
