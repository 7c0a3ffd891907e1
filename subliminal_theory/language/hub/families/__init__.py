"""The families of checkpoints, a file each: it reads config.json and says how the tensors are called.

A file has `ARCHITECTURE` and `MODEL_TYPE`, its names in config.json; `read(settings)`, the shape of the
transformer; and `tensors(config)`, the tensors in the order of the layers, the one of the head last unless it is
tied. A new family is a new file here.
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
# Tables of positions and masks that older libraries stored.
_TABLES = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)")


@dataclass(frozen=True)
class Family:
    """The architecture of a config.json (or of what stands for one), the shape it describes, and its settings."""

    architecture: str
    config: TransformerConfig
    settings: Mapping[str, Any]


def entries(family: Family) -> list[Entry]:
    """All tensors of a checkpoint, in the order of its layers; the one of the head only if it is not tied."""
    found: list[Entry] = _FAMILIES[family.architecture].tensors(family.config)
    return found


def ignored(name: str) -> bool:
    """Whether a tensor holds no parameters but a table, of frequencies or masks."""
    return _TABLES.fullmatch(name) is not None


def read_family(folder: Path) -> Family:
    """The family that the config.json of a checkpoint's folder describes, or the metadata of a GGUF file.

    Raises:
        InputError: no folder or no such file, no JSON object, no architecture or an unknown one, a setting that is
            missing, has a bad value or is not supported; names it.
    """
    if is_gguf(folder):
        return _family(settings_of(read_gguf(folder)), folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give the folder of a checkpoint with config.json")
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
    """The architecture that is named, or else the one of the type, by which `transformers` goes."""
    named, kind = given.get("architectures") or [], given.get("model_type")
    of_kind = _OF_TYPE.get(kind) if isinstance(kind, str) else None
    if of_kind is not None and not named:
        return of_kind
    if not isinstance(named, list) or len(named) != 1:
        raise InputError(f"{path} names no architecture: add architectures, one of {', '.join(ARCHITECTURES)}")
    # A model without a head has the same file; whether the embedding is the head, the tensors tell.
    found = next((name for name in ARCHITECTURES if named[0] in (name, _HEAD.sub("Model", name))), None)
    if found is None:
        raise InputError(
            f"{path}: architecture {shown(named[0])} is not supported; there are {', '.join(ARCHITECTURES)}"
        )
    if kind and kind != _FAMILIES[found].MODEL_TYPE:
        raise InputError(
            f"{path}: model_type {shown(kind)} is not that of {found}, {_FAMILIES[found].MODEL_TYPE!r}: "
            "take the config.json that belongs to the weights"
        )
    return found
