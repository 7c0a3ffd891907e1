"""Reads the adapter_config.json of `peft`: rank, alpha and the modules that have LoRA factors."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.files import read_json

CONFIG = "adapter_config.json"
# Settings of training and of libraries. They do not change the function.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "inference_mode",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "unsloth_fixed", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # How the base stores its matrices; the architecture of the base decides this.
    "fan_in_fan_out",
    # These have an effect only together with other settings, which are refused.
    "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Values that settings may have if they are not off. Other initializations ("pissa", "loftq", ...) change the base.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "use_rslora": (True,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter.

    Attributes:
        rank: the rank of the factors.
        alpha: the numerator of the scale.
        rooted: whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        targets: names of modules, or the ends of names; None if the file does not list them.
    """

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


def read_peft_config(folder: Path) -> PeftConfig:
    """The settings of the adapter in a folder.

    Raises:
        InputError: the folder or the file does not exist, or the file has no JSON object; a setting is missing,
            wrong or not supported.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of an adapter with {CONFIG}")
    given = read_json(path)
    _require_supported(path, given)
    rank, alpha = given["r"], given["lora_alpha"]
    if type(rank) is not int or rank < 1:
        raise InputError(f"{path}: r must be a positive integer, got {short(rank)}: download it again")
    if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
        raise InputError(f"{path}: lora_alpha must be a positive number, got {short(alpha)}: download it again")
    targets = given.get("target_modules")
    # A text is a regular expression. Foreign ones are not run: the tensors show which modules are adapted.
    listed = None if targets is None or isinstance(targets, str) else targets
    if listed is not None and not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
        raise InputError(f"{path}: target_modules must list names, got {short(listed)}: download it again")
    return PeftConfig(rank, float(alpha), bool(given.get("use_rslora")), None if listed is None else tuple(listed))


def _require_supported(path: Path, given: Mapping[str, Any]) -> None:
    """Refuse settings that are not off and not supported."""
    if given.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type {short(given.get('peft_type'))} is not supported, only LORA: "
            "merge the adapter where it was made and load the whole checkpoint"
        )
    lacking = [name for name in ("r", "lora_alpha") if name not in given]
    if lacking:
        raise InputError(f"{path} lacks {' and '.join(lacking)}: take the file that belongs to the factors")
    refused = [
        f"{ascii(name)[1:-1]} {short(value)}"
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


def _divisor(rank: int, rooted: bool) -> float:
    return math.sqrt(rank) if rooted else rank


def alpha_of(scale: float, rank: int) -> tuple[float, bool]:
    """An alpha that reproduces the scale bit for bit, and whether the divisor is the root of the rank.

    Multiplication rounds, so the right alpha is scale * divisor or one of its two neighbors.
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
