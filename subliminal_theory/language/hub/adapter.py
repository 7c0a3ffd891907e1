"""Adapters: folders with only the LoRA factors of a model, in the format of the library `peft`.

save_adapter(Path("student"), checkpoint, student)          # a student that `add_lora` made
student = load_adapter(Path("student"), checkpoint)         # the same student, with the same parameters trainable

adapter_model.safetensors   lora_A [rank, inputs] and lora_B [outputs, rank] of every adapted module
adapter_config.json         rank, alpha and the modules

The metadata of the safetensors file has the fingerprints of the base's parameters and of the chat template with
which the factors were trained. `peft` ignores it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.files import (
    atomic_folder,
    fingerprint,
    misfits,
    save_arrays,
    some,
    write_atomically,
)
from subliminal_theory.language.hub.checkpoint import Checkpoint
from subliminal_theory.language.hub.families import Family, entries
from subliminal_theory.language.hub.peft_config import CONFIG, PeftConfig, alpha_of, read_peft_config
from subliminal_theory.language.hub.tensor_map import Entry
from subliminal_theory.language.hub.tensors import open_file
from subliminal_theory.language.model.layers import Factored
from subliminal_theory.language.model.lora import Adapted, with_factors
from subliminal_theory.language.model.transformer import transformer_of
from subliminal_theory.model import Model, by_layer, leaves_by_path, names_of, of_layers, shapes_of

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# Keys of the metadata. Other programs may add their own.
BASE, TEMPLATE = "subliminal_theory.base_fingerprint", "subliminal_theory.template_fingerprint"
_PREFIX = "base_model.model."
_NOT_ALONE = "merge the factors and save a whole checkpoint"


def save_adapter(folder: Path, like: Checkpoint, model: Model, *, template: str = "") -> None:
    """Write the LoRA factors of a model to a new folder that `peft` can load.

    `like` must be the base to which the factors were added. `template` is the fingerprint of the tokenizer and the
    chat template used in training, "" for none.

    Raises:
        InputError: the model has no factors, or has another shape or another base than `like`; an adapted
            parameter is not the matrix of a linear layer, or shares its tensor with others, as query, key and
            value of GPT-2 do; the factors do not have one rank; the folder exists already or cannot be written.
    """
    if not isinstance(model.apply, Adapted):
        raise InputError("save_adapter: the model has no low-rank factors: save a whole checkpoint")
    base, factors = _split(model)
    _require_base(like, Model(model.apply.apply, base))
    own = _own_kernels(like.family)
    others = [name for name in factors if name not in own]
    if others:
        raise InputError(
            f"save_adapter: {some(others)} of {like.family.architecture} cannot be in an adapter "
            f"(only linear layers with a tensor of their own can): {_NOT_ALONE}"
        )
    adapted = [own[name] for name in factors]
    settings = _settings(like, adapted, model.apply.scale, _rank(shapes_of(base), factors))
    tensors = {
        key: factor.T
        for entry, pair in zip(adapted, factors.values(), strict=True)
        for key, factor in zip(_keys(entry), pair, strict=True)
    }
    about = {"format": "pt", BASE: _base_fingerprint(like.model)} | ({TEMPLATE: template} if template else {})
    with atomic_folder(folder) as new:
        save_arrays(new / WEIGHTS, tensors, about)
        write_atomically(new / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())


def fits_adapter(like: Checkpoint, model: Model) -> bool:
    """Whether `save_adapter` can save the model: it has factors, all of linear layers with their own tensor."""
    return isinstance(model.apply, Adapted) and _split(model)[1].keys() <= _own_kernels(like.family).keys()


def load_adapter(folder: Path, checkpoint: Checkpoint, *, template: str = "") -> Model:
    """The model of a checkpoint with the LoRA factors in a folder. Only the factors train, as after `add_lora`.

    Factors are in at least float32. If query, key and value share a tensor, they share one A in the file; each
    gets a copy. `template` is the fingerprint of the tokenizer and chat template that will be used, "" to accept
    any. Adapters of other programs do not record base and template; only their shapes are checked.

    Raises:
        InputError: the folder has no adapter, or has one in a pickle file, which is never opened; a file is
            damaged; a setting is missing, wrong or not supported; tensors are missing, unexpected or misshapen
            (one error names all of them); the factors were trained on another base or with another chat template.
    """
    config = read_peft_config(folder)
    file = folder / WEIGHTS
    if not file.exists():
        if (folder / PICKLE).exists():
            raise InputError(
                f"{folder} has its factors in a pickle file ({PICKLE}), which is never opened because it can run "
                "code: convert it to safetensors"
            )
        raise InputError(f"{folder} has no {WEIGHTS}: download what is missing")
    tensors, about = open_file(file)
    found = _fitting(file, checkpoint, config, tensors)
    if template and about.get(TEMPLATE, template) != template:
        raise InputError(f"{file}: trained with another chat template: give the tokenizer that was used then")
    # A fingerprint reads the whole base, so it is computed only if the adapter records one.
    if BASE in about and about[BASE] != _base_fingerprint(checkpoint.model):
        raise InputError(
            f"{file}: adapter of another base than {checkpoint.folder}, or of the same in another dtype: "
            "load the one that it was trained on"
        )
    return with_factors(checkpoint.model, config.scale, _factors_in(checkpoint, found, tensors))


# --- models


def _is_factored(node: Any) -> bool:
    return isinstance(node, Factored)


def _split(model: Model) -> tuple[PyTree, dict[str, tuple[Array, Array]]]:
    """The parameters without factors, and A and B of every adapted parameter."""
    nodes = jax.tree_util.tree_leaves_with_path(model.all_params, is_leaf=_is_factored)
    factors: dict[str, tuple[Array, Array]] = {}
    for path, node in nodes:
        if _is_factored(node):
            names = names_of(path, node.base)
            pairs = zip(node.a, node.b, strict=True) if of_layers(path) else [(node.a, node.b)]
            # If the model holds several runs, the number of pairs differs; `_rank` refuses such factors.
            factors |= {name: pair for name, pair in zip(names, pairs, strict=False) if pair[0] is not None}
    base = jax.tree.map(
        lambda node: node.base if _is_factored(node) else node, model.all_params, is_leaf=_is_factored
    )
    return base, factors


def _rank(base: Mapping[str, tuple[int, ...]], factors: Mapping[str, tuple[Array, Array]]) -> int:
    """The rank, which all factors share. Refuses factors of several runs, which have one more axis."""
    rank: int = next(iter(factors.values()))[0].shape[-1]
    for name, (a, b) in factors.items():
        inputs, outputs = base[name]
        if (a.shape, b.shape) != ((inputs, rank), (rank, outputs)):
            raise InputError(
                f"save_adapter: the factors of {name} are {a.shape} and {b.shape}, not {(inputs, rank)} and "
                f"{(rank, outputs)}: save one model at a time"
            )
    return rank


def _require_base(like: Checkpoint, model: Model) -> None:
    """Refuse a model whose base is not `like`: its factors would not reproduce it."""
    if transformer_of(model).config != like.family.config:
        raise InputError(f"save_adapter: the model does not have the shape of {like.folder}")
    ours, theirs = leaves_by_path(model.params), leaves_by_path(like.model.params)
    changed = [
        name for name, leaf in ours.items()
        if leaf is not theirs[name] and fingerprint(_float32(leaf)) != fingerprint(_float32(theirs[name]))
    ]  # fmt: skip
    if changed:
        raise InputError(
            f"save_adapter: {some(changed)} of the model's base differ from {like.folder}: "
            f"give its base, or {_NOT_ALONE}"
        )


def _base_fingerprint(model: Model) -> str:
    """The fingerprint of the parameters in float32, so that bfloat16 weights have the same one in both dtypes."""
    leaves = by_layer(model.all_params)
    return fingerprint({name: fingerprint(_float32(leaf)) for name, leaf in leaves.items()})


def _float32(leaf: Array) -> Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


# --- modules


def _kernels(family: Family) -> list[Entry]:
    """The entries of the matrices of linear layers."""
    return [entry for entry in entries(family) if entry.ours[0].endswith("/kernel")]


def _own_kernels(family: Family) -> dict[str, Entry]:
    """The entries of `_kernels` that hold only one parameter, by its name."""
    return {entry.ours[0]: entry for entry in _kernels(family) if len(entry.ours) == 1}


def _module(entry: Entry) -> str:
    return entry.theirs.removesuffix(".weight")


def _keys(entry: Entry) -> tuple[str, str]:
    """The names of the tensors of A and B."""
    return f"{_PREFIX}{_module(entry)}.lora_A.weight", f"{_PREFIX}{_module(entry)}.lora_B.weight"


def _targets(family: Family, adapted: Sequence[Entry]) -> list[str]:
    """The last part of each adapted module's name, or the whole name if the last part is not unique to them."""
    chosen = {_module(entry) for entry in adapted}
    mixed = {_last(_module(entry)) for entry in _kernels(family) if _module(entry) not in chosen}
    return sorted({module if _last(module) in mixed else _last(module) for module in chosen})


def _last(module: str) -> str:
    return module.rpartition(".")[2]


# --- writing


def _settings(like: Checkpoint, adapted: Sequence[Entry], scale: float, rank: int) -> dict[str, Any]:
    alpha, rooted = alpha_of(scale, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(like.folder),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rooted,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(not entry.transposed for entry in adapted),
        "target_modules": _targets(like.family, adapted),
    }


# --- reading


def _fitting(
    file: Path, checkpoint: Checkpoint, config: PeftConfig, tensors: Mapping[str, np.ndarray]
) -> list[Entry]:
    """The entries of the base that have factors. One error names all faults of the factors."""
    shapes, found = shapes_of(checkpoint.model.params), list[Entry]()
    wanted: dict[str, tuple[tuple[int, int], Any]] = {}
    for entry in _kernels(checkpoint.family):
        a, b = _keys(entry)
        held = a in tensors or b in tensors
        if config.adapts(_module(entry)) or (held and config.targets is None):
            found.append(entry)
            inputs, outputs = shapes[entry.ours[0]][0], sum(shapes[name][1] for name in entry.ours)
            wanted |= {a: ((config.rank, inputs), jnp.floating), b: ((outputs, config.rank), jnp.floating)}
    faults = misfits(wanted, tensors) if wanted else ["no linear layer has factors"]
    if faults:
        raise InputError(
            f"{file}: the tensors do not fit {checkpoint.folder} ({checkpoint.family.architecture}): "
            f"{'; '.join(faults)}; give the base that the adapter was trained on"
        )
    return found


def _factors_in(
    checkpoint: Checkpoint, found: Sequence[Entry], tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[Float[Array, "inputs rank"], Float[Array, "rank outputs"]]]:
    """A and B of every adapted parameter."""
    dtype = jnp.promote_types(jax.tree.leaves(checkpoint.model.params)[0].dtype, jnp.float32)
    factors = {}
    for entry in found:
        a, b = (tensors[key] for key in _keys(entry))
        # B splits as the matrix of the base does, if its outputs are on the same axis.
        parts = entry.take_apart(b if entry.transposed else b.T)
        for name, part in zip(entry.ours, parts, strict=True):
            factors[name] = (_copied(a.T, dtype), _copied(part, dtype))
    return factors


def _copied(tensor: np.ndarray, dtype: Any) -> Array:
    """A copy. A device may use the memory that it is given, and that must not be the mapped file."""
    return jnp.asarray(np.array(tensor, dtype, order="C"))
