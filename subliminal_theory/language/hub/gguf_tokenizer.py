"""The tokenizer in the metadata of a GGUF file, as the text files of a checkpoint's folder."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from subliminal_theory.errors import InputError, one_line, shown
from subliminal_theory.language.hub.gguf_file import GgufFile, read_gguf, types_checked

_LONGEST = 1000  # the most characters of a token, since all its splits into two tokens are tried
_SPACE = "\u2581"  # the character that SentencePiece uses for spaces
_ADDED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
_ENDS = ("eos", "eot", "eom")  # end of a text, a turn, a message
_KNOWN = {
    "model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_space_prefix",
    "token_type_count", *(f"{name}_token_id" for name in (*_ROLES, *_ENDS, "seperator", "mask", "cls")),
    *(f"{name}_token_id" for name in ("prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
}  # fmt: skip
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(*patterns: str) -> list[Any]:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


# How a text is split before merges apply, by the names of `tokenizer.ggml.pre`.
_CUTS = {
    "gpt-2": [_PLAIN],
    "default": _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _PLAIN],
    **dict.fromkeys(_LLAMA3, _split(_WORDS.replace("DIGITS", r"\p{N}{1,3}"))),
    **dict.fromkeys(_QWEN2, _split(_WORDS.replace("DIGITS", r"\p{N}"))),
}


def text_files(path: Path) -> Mapping[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json for the GGUF file at a path.

    Raises:
        InputError: as `read_gguf`; the tokenizer or its pre-tokenizer is of an unknown kind, is incomplete or
            damaged, or has a setting that is not supported.
    """
    return _files(read_gguf(path))


@functools.lru_cache(maxsize=2)
def _files(file: GgufFile) -> Mapping[str, bytes]:
    with types_checked(file.path):
        return _written(file)


def _written(file: GgufFile) -> Mapping[str, bytes]:
    given = _Metadata(file)
    backend, adds_bos = _BACKENDS[given.kind](given)
    roles = {f"{to}_token": given.token(name) for name, to in _ROLES.items()}
    named = {role: given.tokens[token] for role, token in roles.items() if token is not None}
    adds_bos = bool(given.get("add_bos_token", adds_bos)) and "bos_token" in named
    if adds_bos:
        bos = named["bos_token"]
        backend.post_processor = TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, roles["bos_token"])])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    settings["add_bos_token"] = adds_bos
    template = file.metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    ends = dict.fromkeys(token for token in map(given.token, _ENDS) if token is not None)
    written = {"tokenizer_config.json": settings}
    if ends:
        written["generation_config.json"] = {"eos_token_id": list(ends)}
    found = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in written.items()}
    return {"tokenizer.json": backend.to_str().encode(), **found}


class _Metadata:
    """The checked metadata of a tokenizer.

    Attributes:
        kind: the kind of tokenizer.
        tokens, types: the text and the type of each token.
    """

    def __init__(self, file: GgufFile) -> None:
        prefix = "tokenizer.ggml."
        self.path = file.path
        self._given = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
        self.kind = self.get("model")
        if self.kind not in _BACKENDS:
            known = ", ".join(_BACKENDS)
            raise InputError(f"{self.path}: tokenizer {shown(self.kind)} is not supported; there are {known}")
        for key, value in self._given.items():
            off = isinstance(value, bool | int | str | float) and not value
            if key not in _KNOWN and not off:
                raise InputError(f"{self.path}: {prefix}{one_line(key)} is not supported")
        self.tokens: list[str] = self.need("tokens")
        self.types = self._for_each("token_type", np.full(len(self.tokens), TokenType.NORMAL))

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default if it is missing."""
        return self._given.get(name, default)

    def need(self, name: str) -> list[str]:
        """A list of texts that must exist."""
        found = self.get(name)
        if not isinstance(found, list) or not found:
            raise InputError(
                f"{self.path} lacks tokenizer.ggml.{name}: convert the model again, with its tokenizer"
            )
        return found

    def scores(self) -> np.ndarray:
        """The score of each token."""
        return self._for_each("scores", None)

    def _for_each(self, name: str, default: np.ndarray | None) -> np.ndarray:
        found = self.get(name, default)
        if not isinstance(found, np.ndarray) or len(found) != len(self.tokens):
            raise InputError(
                f"{self.path}: tokenizer.ggml.{name} does not have one number for each of the {len(self.tokens)} "
                "tokens: download it again"
            )
        return found

    def token(self, name: str) -> int | None:
        """The token with a name such as eos; None if there is none."""
        token = self.get(f"{name}_token_id")
        if token is not None and not (isinstance(token, int) and 0 <= token < len(self.tokens)):
            raise InputError(
                f"{self.path}: tokenizer.ggml.{name}_token_id {shown(token)} is not one of the "
                f"{len(self.tokens)} tokens: download it again"
            )
        return token

    def vocabulary(self) -> dict[str, int]:
        """The tokens by text."""
        found = {token: place for place, token in enumerate(self.tokens)}
        if len(found) < len(self.tokens):
            twice = next(token for place, token in enumerate(self.tokens) if found[token] != place)
            raise InputError(f"{self.path}: token {shown(twice)} occurs twice: download it again")
        return found

    def backend(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **how: Any) -> Tokenizer:
        """A BPE tokenizer, with the special and user-defined tokens, which are never split."""
        try:
            backend = Tokenizer(models.BPE(dict(vocabulary), merges, **how))
        except Exception as error:  # the library raises no narrower class
            raise InputError(
                f"{self.path}: the merges are damaged ({one_line(error)}): download it again"
            ) from error
        for own in (True, False):
            kinds = [kind for kind in _ADDED if (kind != TokenType.USER_DEFINED) is own]
            chosen = [self.tokens[place] for place in np.flatnonzero(np.isin(self.types, kinds))]
            backend.add_tokens([AddedToken(token, special=own, normalized=False) for token in chosen if token])
        return backend


def _byte_level(given: _Metadata) -> tuple[Tokenizer, bool]:
    """Byte-level BPE with listed merges, and whether it adds BOS by default."""
    cut = given.get("pre")
    if cut not in _CUTS:
        known = ", ".join(_CUTS)
        raise InputError(f"{given.path}: pre-tokenizer {shown(cut)} is not supported; there are {known}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in given.need("merges"))]
    backend = given.backend(given.vocabulary(), merges, ignore_merges=cut in _LLAMA3)
    if cut in _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_CUTS[cut])
    backend.decoder = decoders.ByteLevel()
    return backend, cut in _LLAMA3


def _sentence_piece(given: _Metadata) -> tuple[Tokenizer, bool]:
    """The BPE of SentencePiece, and that it adds BOS by default.

    The two pieces whose token has the highest score merge first. Unknown characters become bytes if the vocabulary
    has byte tokens.
    """
    user = given.types == TokenType.USER_DEFINED
    given.tokens = [t.replace(_SPACE, " ") if own else t for t, own in zip(given.tokens, user, strict=True)]
    vocabulary, unknown = given.vocabulary(), given.token("unknown")
    bytes_ = bool((given.types == TokenType.BYTE).any())
    backend = given.backend(
        vocabulary, _merges(given, vocabulary), fuse_unk=True, byte_fallback=bytes_,
        unk_token=given.tokens[0 if unknown is None else unknown],
    )  # fmt: skip
    prefixed = bool(given.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges(given: _Metadata, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All splits of a normal token into two tokens, the highest score first."""
    scores = given.scores()
    found = []
    for token in np.flatnonzero(given.types == TokenType.NORMAL):
        text = given.tokens[token]
        if len(text) > _LONGEST:
            raise InputError(
                f"{given.path}: token {shown(text)} has {len(text)} characters, more than {_LONGEST}: "
                "download it again"
            )
        for end in range(1, len(text)):
            first, second = vocabulary.get(text[:end]), vocabulary.get(text[end:])
            if first is not None and second is not None:
                found.append((-scores[token], first, second))
    return [(given.tokens[a], given.tokens[b]) for _, a, b in sorted(found)]


_BACKENDS = {"gpt2": _byte_level, "llama": _sentence_piece}
