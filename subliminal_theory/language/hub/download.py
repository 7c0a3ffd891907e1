"""Names of checkpoints: a local folder or file, or OWNER/NAME[@REVISION] on the Hugging Face Hub.

For a model on the Hub, the text files and the safetensors files with its weights are downloaded into the cache of
`huggingface_hub`. Its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) apply.
"""

import re
import textwrap
from pathlib import Path
from typing import NoReturn

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.tensors import INDEX, MODEL, read_index

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_TEXTS = ["*.json", "*.jinja"]
_LOGIN = "log in (hf auth login, or HF_TOKEN)"


def resolve(checkpoint: str, *, weights: bool = True) -> Path:
    """The folder or file of a checkpoint. A model on the Hub is downloaded first.

    Without `weights`, only its text files are downloaded. A path that exists, ends in .gguf, or is not a name on
    the Hub is returned unchanged.

    Raises:
        InputError: a model on the Hub cannot be downloaded: `huggingface_hub` is not installed, the Hub cannot be
            reached and the cache lacks the model, there is no such name or revision, or the model needs a login or
            has no safetensors file.
    """
    path, asked = Path(checkpoint), _NAME.fullmatch(checkpoint)
    if path.exists() or path.suffix == ".gguf" or asked is None:
        return path
    name, revision = asked["name"], asked["revision"]
    folder = _downloaded(name, revision, _TEXTS)
    if not weights:
        return folder
    index = folder / INDEX
    files = sorted(set(read_index(index).values())) if index.exists() else [MODEL]
    _downloaded(name, revision, files)
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise InputError(
            f"{checkpoint} has no {missing[0]} on the Hub: take a model with safetensors files, or download "
            "and convert it"
        )
    return folder


def _downloaded(name: str, revision: str | None, files: list[str]) -> Path:
    """The folder of a model in the cache, with these files. Subfolders are not downloaded."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{name} is not a folder here; to download it from the Hub, "
            "pip install 'subliminal_theory[hub]', or give a folder"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]
        )
    except Exception as error:  # errors of the library, of its HTTP client, or of the system
        _refuse(name, revision, error)
    return Path(folder)


def _refuse(name: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        message = f"{name} needs a login: accept its terms on its page, then {_LOGIN}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"{name} is not a folder here, and not a model on the Hub that you may read: check the name; "
            f"for a private model, {_LOGIN}"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"{name} has no revision {revision!r} on the Hub: give a branch, a tag or a commit of it"
    elif status in (401, 403):
        message = f"{name} needs a login on the Hub: {_LOGIN}"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        message = (
            f"{name} is not a folder here, the Hub cannot be reached, and its cache does not hold all of it: "
            "connect (or unset HF_HUB_OFFLINE), or give a folder"
        )
    else:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        message = f"cannot download {name} ({reason}): try again, or give a folder"
    raise InputError(message) from error
