"""The families of checkpoints, one file each. A family reads config.json and names the tensors.

A file has `ARCHITECTURE` and `MODEL_TYPE`, the names of the family in config.json. `read(settings)` returns the
configuration of the transformer. `tensors(config)` lists the tensors in the order of the layers, with the head
last unless it is tied. To add a family, add a file here.
"""

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subliminal_theory.errors import InputError, one_line, shown
from subliminal_theory.files import read_json
from subliminal_theory.language.hub.gguf_file import is_gguf, read_gguf
from subliminal_theory.language.hub.gguf_model import settings_of
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.hub.tensor_map import Entry
from subliminal_theory.language.model.config import TransformerConfig

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
_FAMILIES = {module.ARCHITECTURE: module for module in _MODULES}
ARCHITECTURES = tuple(_FAMILIES)
_OF_TYPE = {module.MODEL_TYPE: name for name, module in _FAMILIES.items()}
_HEAD = re.compile("ForCausalLM|LMHeadModel")
# Tables of frequencies and masks, which older libraries stored.
_TABLES = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)")


@dataclass(frozen=True)
class Family:
    """What a config.json (or the metadata of a GGUF file) says.

    Attributes:
        architecture: the name of the architecture.
        config: the configuration of the transformer.
        settings: all settings of the file.
    """

    architecture: str
    config: TransformerConfig
    settings: Mapping[str, Any]


def entries(family: Family) -> list[Entry]:
    """All tensors of a checkpoint, in the order of its layers. The head is last, and left out if it is tied."""
    found: list[Entry] = _FAMILIES[family.architecture].tensors(family.config)
    return found


def ignored(name: str) -> bool:
    """Whether a tensor is a table of frequencies or masks, not parameters."""
    return _TABLES.fullmatch(name) is not None


def read_family(folder: Path) -> Family:
    """The family of the checkpoint in a folder (from config.json) or in a GGUF file (from its metadata).

    Raises:
        InputError: the folder or the file does not exist, or the file has no JSON object; the architecture is
            missing or unknown; a setting is missing, has a bad value or is not supported. The message names the
            fault.
    """
    if is_gguf(folder):
        return _family(settings_of(read_gguf(folder)), folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of a checkpoint with config.json")
    return _family(read_json(path), path)


def _family(given: Mapping[str, Any], path: Path) -> Family:
    architecture = _architecture(path, given)
    settings = Settings(given, str(path))
    try:
        config = _FAMILIES[architecture].read(settings)
        settings.finish()
    except InputError as error:
        text = str(error)
        raise InputError(text if str(path) in text else f"{path}: {text}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{path} has a setting of the wrong type ({one_line(error)}): download it again"
        ) from error
    return Family(architecture, config, given)


def _architecture(path: Path, given: Mapping[str, Any]) -> str:
    """The architecture that the file names, or the one of its `model_type` if it names none."""
    named, kind = given.get("architectures") or [], given.get("model_type")
    of_kind = _OF_TYPE.get(kind) if isinstance(kind, str) else None
    if of_kind is not None and not named:
        return of_kind
    if not isinstance(named, list) or len(named) != 1:
        raise InputError(f"{path} names no architecture: add architectures, one of {', '.join(ARCHITECTURES)}")
    # A model saved without a head has the same settings, but another name for its architecture.
    found = next((name for name in ARCHITECTURES if named[0] in (name, _HEAD.sub("Model", name))), None)
    if found is None:
        raise InputError(
            f"{path}: architecture {shown(named[0])} is not supported; there are {', '.join(ARCHITECTURES)}"
        )
    if kind and kind != _FAMILIES[found].MODEL_TYPE:
        raise InputError(
            f"{path}: model_type {shown(kind)} does not match {found}, "
            f"whose type is {_FAMILIES[found].MODEL_TYPE!r}: "
            "take the config.json that belongs to the weights"
        )
    return found
