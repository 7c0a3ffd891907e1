"""Low-rank factors alone in a folder, as the library `peft` writes and reads them.

save_adapter(Path("student"), checkpoint, student)          # a student that `add_lora` made
student = load_adapter(Path("student"), checkpoint)         # the same, trainable and frozen parameters as before

adapter_model.safetensors   of every adapted module lora_A [rank, inputs] and lora_B [outputs, rank]
adapter_config.json         rank, alpha and the modules

The metadata of the safetensors file, which `peft` does not look at, records what the factors were trained on: the
SHA-256 of the base's parameters and the fingerprint of the chat template.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import Checkpoint
from subliminal_theory.language.hub.families import Family
from subliminal_theory.language.hub.tensor_file import (
    header_of,
    misfits,
    numbers_of,
    open_file,
    parse_json,
    plain,
    quote,
    some,
    specs_of,
)
from subliminal_theory.language.hub.tensor_map import Entry, entries
from subliminal_theory.language.model.layers import Factored
from subliminal_theory.language.model.lora import Adapted
from subliminal_theory.language.model.transformer import transformer_of
from subliminal_theory.model import Model, leaves_by_path, path_name
from subliminal_theory.runs import write_atomically

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
# Keys of the metadata; other programs may have theirs beside them.
BASE, TEMPLATE = "subliminal_theory.base", "subliminal_theory.template"
_PREFIX = "base_model.model."
# Where the factors came from and how they trained: what they compute is the same.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "inference_mode",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "unsloth_fixed", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # What says how the base stores its matrices; its config.json says so too.
    "fan_in_fan_out",
    # These count only together with others, which are refused.
    "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
# What else a setting may be, besides off; other ways to start ("pissa", "loftq", ...) change the base.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "use_rslora": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_NOT_ALONE = "merge the factors and save a whole checkpoint"


def save_adapter(folder: Path, like: Checkpoint, model: Model, *, template: str = "") -> None:
    """The factors of a model of a checkpoint's kind in a new folder that `peft` loads.

    `like` must be the base, as it was when the factors were added. `template` is the fingerprint of the tokenizer
    and chat template of training, "" for none.

    Raises:
        InputError: the model has no factors, another shape or another base than `like`; what is adapted is not
            the matrix of a linear layer, or shares its tensor with others, as query, key and value of GPT-2 do;
            the folder holds an adapter already or cannot be written.
    """
    if not isinstance(model.apply, Adapted):
        raise InputError("save_adapter: the model has no low-rank factors: save a whole checkpoint")
    _require_no_adapter(folder)
    base, factors = _apart(model)
    _require_base(like, Model(model.apply.apply, base))
    holders = _holders(like.family, factors)
    rank = _rank(leaves_by_path(base), factors)
    tensors = {}
    for name, (a, b) in factors.items():
        for key, factor in zip(_keys(_module(holders[name])), (a, b), strict=True):
            tensors[key] = np.asarray(factor).T
    settings = _settings(like, list(holders.values()), model.apply.scale, rank)
    record = {BASE: _fingerprint(like.model)} | ({TEMPLATE: template} if template else {})
    # The library safetensors would put the metadata in another order each time.
    header = header_of(folder, specs_of(folder, tensors), record)
    _make_folder(folder)
    # The configuration last: without it, no one takes the folder for an adapter.
    write_atomically(folder / WEIGHTS, header + b"".join(map(numbers_of, tensors.values())))
    write_atomically(folder / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())


def fits_adapter(like: Checkpoint, model: Model) -> bool:
    """Whether a model has factors, all of linear layers with a tensor of their own, as an adapter holds them."""
    return isinstance(model.apply, Adapted) and _apart(model)[1].keys() <= _own_kernels(like.family).keys()


def load_adapter(folder: Path, checkpoint: Checkpoint, *, template: str = "") -> Model:
    """The model of a checkpoint with the factors in a folder, as `add_lora` makes it: only they are trainable.

    Factors are in at least float32. Query, key and value that share a tensor, and thus A, have an A each here.
    `template` is the fingerprint of the chat template that will be used, "" to take any. Adapters of other
    programs say nothing of base and template but the shapes.

    Raises:
        InputError: the folder holds no adapter, or one in a pickle file, which is never opened; a file is damaged;
            a setting is missing, wrong or not supported; tensors are missing, unexpected or misshapen (one error
            names all of them); the factors were trained on another base or with another chat template.
    """
    config = _read_config(folder)
    file = _weights_of(folder)
    record, tensors = open_file(file)
    found = _fitting(file, checkpoint, config, tensors)
    if template and record.get(TEMPLATE, template) != template:
        raise InputError(f"{file}: trained with another chat template: give the tokenizer that was used then")
    # Hashing reads the whole base: only for adapters that say something of it.
    if BASE in record and record[BASE] != _fingerprint(checkpoint.model):
        raise InputError(
            f"{file}: adapter of another base than {checkpoint.folder}, or of the same in another dtype: "
            "load the one that it was trained on"
        )
    return _with_factors(checkpoint.model, config.scale, _factors_in(checkpoint, found, tensors))


# --- models


def _is_factored(node: Any) -> bool:
    return isinstance(node, Factored)


def _apart(model: Model) -> tuple[PyTree, dict[str, tuple[Array, Array]]]:
    """The parameters without factors, and A and B of every adapted one."""
    nodes = jax.tree_util.tree_leaves_with_path(model.all_params, is_leaf=_is_factored)
    factors = {path_name(path): (node.a, node.b) for path, node in nodes if _is_factored(node)}
    base = jax.tree.map(
        lambda node: node.base if _is_factored(node) else node, model.all_params, is_leaf=_is_factored
    )
    return base, factors


def _rank(base: Mapping[str, Array], factors: Mapping[str, tuple[Array, Array]]) -> int:
    """The rank, which must be one for all: students that were trained side by side have an axis more."""
    rank: int = next(iter(factors.values()))[0].shape[-1]
    for name, (a, b) in factors.items():
        inputs, outputs = base[name].shape
        if (a.shape, b.shape) != ((inputs, rank), (rank, outputs)):
            raise InputError(
                f"save_adapter: the factors of {name} are {a.shape} and {b.shape}, not {(inputs, rank)} and "
                f"{(rank, outputs)}: save one model at a time"
            )
    return rank


def _with_factors(model: Model, scale: float, factors: Mapping[str, tuple[Array, Array]]) -> Model:
    """The structure that `add_lora` gives, with these factors."""

    def trained(path: Any, leaf: Array) -> Factored | None:
        found = factors.get(path_name(path))
        return found and Factored(None, *found)

    def frozen(path: Any, leaf: Array) -> Any:
        return Factored(leaf, None, None) if path_name(path) in factors else leaf

    split = jax.tree_util.tree_map_with_path
    return Model(Adapted(model.apply, scale), split(trained, model.params), split(frozen, model.params))


def _require_base(like: Checkpoint, model: Model) -> None:
    """Factors say what changed from `like` only if nothing else did."""
    if transformer_of(model).config != like.family.config:
        raise InputError(f"save_adapter: the model is not of the shape of {like.folder}")
    pairs = zip(jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(like.model), strict=True)
    changed = [path_name(path) for (path, one), other in pairs if one is not other and _hash(one) != _hash(other)]
    if changed:
        raise InputError(
            f"save_adapter: {some(changed)} of the model's base are not those of {like.folder}: "
            f"give its base, or {_NOT_ALONE}"
        )


def _fingerprint(model: Model) -> str:
    """SHA-256 of names, shapes and numbers of the parameters, in the order of the model.

    Numbers are hashed tensor by tensor, so that one at a time is on the host, and as float32, so that a file in
    bfloat16 is the same base when it is loaded in either.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model.all_params)
    content = [[path_name(path), leaf.shape, _hash(leaf)] for path, leaf in leaves]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hash(leaf: Array) -> str:
    """SHA-256 of the numbers in the order of the axes, the lowest byte first."""
    # JAX keeps the numbers that it fetched from a device as long as the array they are of, here a copy.
    numbers = np.asarray(leaf.copy())
    wide = np.dtype(jnp.promote_types(numbers.dtype, jnp.float32)).newbyteorder("<")
    return hashlib.sha256(np.ascontiguousarray(numbers, wide).reshape(-1).view(np.uint8).data).hexdigest()


# --- modules


def _kernels(family: Family) -> list[Entry]:
    """The tensors that are matrices of linear layers."""
    return [entry for entry in entries(family) if entry.ours[0].endswith("/kernel")]


def _own_kernels(family: Family) -> dict[str, Entry]:
    """Those that hold one parameter, by its name."""
    return {entry.ours[0]: entry for entry in _kernels(family) if len(entry.ours) == 1}


def _holders(family: Family, names: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensor of each adapted parameter, refused if it is no kernel or holds others too."""
    own = _own_kernels(family)
    others = [name for name in names if name not in own]
    if others:
        raise InputError(
            f"save_adapter: {some(others)} of {family.architecture} cannot be in an adapter "
            f"(only linear layers with a tensor of their own can): {_NOT_ALONE}"
        )
    return {name: own[name] for name in names}


def _module(entry: Entry) -> str:
    return entry.theirs.removesuffix(".weight")


def _keys(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _targets(family: Family, adapted: Sequence[Entry]) -> list[str]:
    """Last names of the modules, or whole ones where others that are not adapted have the same last name."""
    chosen = {_module(entry) for entry in adapted}
    mixed = {_last(_module(entry)) for entry in _kernels(family) if _module(entry) not in chosen}
    return sorted({module if _last(module) in mixed else _last(module) for module in chosen})


def _last(module: str) -> str:
    return module.rpartition(".")[2]


# --- writing


def _settings(like: Checkpoint, adapted: Sequence[Entry], scale: float, rank: int) -> dict[str, Any]:
    alpha, rooted = _alpha(scale, rank)
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
        "fan_in_fan_out": any(entry.layout == "same" for entry in adapted),
        "target_modules": _targets(like.family, adapted),
    }


def _divisor(rank: int, rooted: bool) -> float:
    return math.sqrt(rank) if rooted else rank


def _alpha(scale: float, rank: int) -> tuple[float, bool]:
    """An alpha that gives the scale again, bit for bit, and whether it is divided by the root of the rank.

    Division and multiplication round, so that the alpha that was given is the nearest number or one beside it.
    """
    choices = [
        (alpha, rooted)
        for rooted in (False, True)
        for middle in [scale * _divisor(rank, rooted)]
        for alpha in (middle, math.nextafter(middle, 0), math.nextafter(middle, math.inf))
    ]

    def distance(choice: tuple[float, bool]) -> tuple[float, bool, int]:
        alpha, rooted = choice
        return abs(alpha / _divisor(rank, rooted) - scale), rooted, len(repr(alpha))

    alpha, rooted = min(choices, key=distance)
    return int(alpha) if alpha.is_integer() else alpha, rooted


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another folder") from error


def _require_no_adapter(folder: Path) -> None:
    there = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if there:
        raise InputError(f"{folder} already holds {' and '.join(there)}: delete that or choose another folder")


# --- reading


@dataclass(frozen=True)
class _Config:
    """`targets` are names of modules, or the ends of them; None if the file does not list any."""

    rank: int
    alpha: float
    rooted: bool
    targets: tuple[str, ...] | None

    @property
    def scale(self) -> float:
        return self.alpha / _divisor(self.rank, self.rooted)

    def adapts(self, module: str) -> bool:
        """Whether a list of targets names a module."""
        return any(f".{module}".endswith(f".{target}") for target in self.targets or ())


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the folder of an adapter with {CONFIG}")
    try:
        given = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give the folder of an adapter") from error
    except ValueError as error:
        raise InputError(f"{path} is {error}: download it again") from error
    _require_supported(path, given)
    rank, alpha = given["r"], given["lora_alpha"]
    if type(rank) is not int or rank < 1:
        raise InputError(f"{path}: r must be a positive integer, got {quote(rank)}: download it again")
    if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
        raise InputError(f"{path}: lora_alpha must be a positive number, got {quote(alpha)}: download it again")
    return _Config(rank, float(alpha), bool(given.get("use_rslora")), _listed(path, given.get("target_modules")))


def _listed(path: Path, targets: Any) -> tuple[str, ...] | None:
    # A text is a regular expression: those of strangers are not run, the tensors themselves say what is adapted.
    if targets is None or isinstance(targets, str):
        return None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise InputError(f"{path}: target_modules must list names, got {quote(targets)}: download it again")
    return tuple(targets)


def _require_supported(path: Path, given: Mapping[str, Any]) -> None:
    """Only what this project computes: all else must be off."""
    if given.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type {quote(given.get('peft_type'))} is not supported, only LORA: "
            "merge the adapter where it was made and load the whole checkpoint"
        )
    lacking = [name for name in ("r", "lora_alpha") if name not in given]
    if lacking:
        raise InputError(f"{path} lacks {' and '.join(lacking)}: take the file that belongs to the factors")
    refused = [
        f"{plain(name)} {quote(value)}"
        for name, value in given.items()
        if name not in _HARMLESS
        and value not in (None, False, 0, "", [], {})
        and value not in _KNOWN.get(name, ())
    ]
    if refused:
        raise InputError(
            f"{path}: not supported: {', '.join(refused)}; "
            "merge the adapter where it was made and load the whole checkpoint"
        )


def _weights_of(folder: Path) -> Path:
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    if (folder / PICKLE).exists():
        raise InputError(
            f"{folder} has its factors in a pickle file ({PICKLE}), which is never opened because it can run "
            "code: convert it to safetensors"
        )
    raise InputError(f"{folder} has no {WEIGHTS}: download what is missing")


def _fitting(
    file: Path, checkpoint: Checkpoint, config: _Config, tensors: Mapping[str, np.ndarray]
) -> list[Entry]:
    """The tensors of the base that have factors; refuses all that is wrong with these in one error."""
    found = []
    for entry in _kernels(checkpoint.family):
        held = any(key in tensors for key in _keys(_module(entry)))
        if config.adapts(_module(entry)) or (held and config.targets is None):
            found.append(entry)
    wanted = _shapes(checkpoint, found, config.rank)
    faults = _faults(wanted, tensors) if wanted else ["no linear layer has factors"]
    if faults:
        raise InputError(
            f"{file}: the tensors do not fit {checkpoint.folder} ({checkpoint.family.architecture}): "
            f"{'; '.join(faults)}; give the base that the adapter was trained on"
        )
    return found


def _shapes(checkpoint: Checkpoint, found: Sequence[Entry], rank: int) -> dict[str, list[int]]:
    leaves, shapes = leaves_by_path(checkpoint.model.params), dict[str, list[int]]()
    for entry in found:
        inputs, outputs = leaves[entry.ours[0]].shape[0], sum(leaves[name].shape[1] for name in entry.ours)
        a, b = _keys(_module(entry))
        shapes |= {a: [rank, inputs], b: [outputs, rank]}
    return shapes


def _faults(wanted: Mapping[str, list[int]], tensors: Mapping[str, np.ndarray]) -> list[str]:
    return misfits(wanted, tensors) + [
        f"{name} is of {tensors[name].dtype.name}, not of floating-point numbers"
        for name in wanted
        if name in tensors and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
    ]


def _factors_in(
    checkpoint: Checkpoint, found: Sequence[Entry], tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[Float[Array, "inputs rank"], Float[Array, "rank outputs"]]]:
    """A and B of every adapted parameter."""
    leaves, factors = leaves_by_path(checkpoint.model.params), {}
    for entry in found:
        a, b = (tensors[key] for key in _keys(_module(entry)))
        # B is taken apart as the matrix of the base is, whose outputs are on the one axis or the other.
        turned = b.T if entry.layout in ("same", "columns") else b
        parts = entry.take_apart(turned, checkpoint.family.config.heads)
        for name, part in zip(entry.ours, parts, strict=True):
            dtype = jnp.promote_types(leaves[name].dtype, jnp.float32)
            factors[name] = (_copied(a.T, dtype), _copied(part, dtype))
    return factors


def _copied(tensor: np.ndarray, dtype: Any) -> Array:
    """A copy: the device may keep it, the file is left alone."""
    return jnp.asarray(np.array(tensor, dtype, order="C"))
