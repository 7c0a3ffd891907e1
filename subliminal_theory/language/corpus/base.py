"""Base models: what teachers and students of one seed start from, pre-trained on the corpus and kept on disk."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import platformdirs
from flax import nnx
from jaxtyping import Array, Float, Int

from subliminal_theory.distill import Step, require_finite, teach
from subliminal_theory.errors import InputError
from subliminal_theory.files import fingerprint, load_arrays, open_arrays, save_arrays
from subliminal_theory.keys import named
from subliminal_theory.language.corpus import chats
from subliminal_theory.language.corpus.chats import CorpusConfig, make_corpus
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Text, Transformer
from subliminal_theory.language.text import Encoded, Prompts
from subliminal_theory.model import Model, from_nnx, leaves_by_path
from subliminal_theory.source import Examples

FORMAT_VERSION = 4  # to be raised when the same configuration gives other parameters, or they have other names


@dataclass(frozen=True)
class BaseConfig:
    """Everything that decides a base model.

    Attributes:
        seed: of the initialization and of the order of the chats; bases of all seeds read the same corpus.
        corpus: what it is trained on.
        layers, width, heads, kv_heads, mlp_width, tied, context: as in `TransformerConfig`.
        steps: updates of Adam, whose rate falls to 0 along a cosine; gradients are clipped to norm 1.
        batch_size: chats a step.
        rate: the first learning rate.

    Raises:
        InputError: a size below 1, heads that do not share the width evenly, or a rate that is not positive.
    """

    seed: int = 0
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    layers: int = 2
    width: int = 32
    heads: int = 2
    kv_heads: int = 2
    mlp_width: int = 80
    tied: bool = True
    context: int = 64
    steps: int = 2000
    batch_size: int = 64
    rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"BaseConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rate < np.inf:
            raise InputError(f"BaseConfig: rate must be positive and finite, got {self.rate}")
        if self.width % self.heads:
            raise InputError(f"BaseConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        self.transformer(1)

    def transformer(self, vocabulary: int) -> TransformerConfig:
        """The shape of the model."""
        names = ("layers", "width", "heads", "kv_heads", "mlp_width", "tied", "context")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        return TransformerConfig(vocabulary=vocabulary, head_width=self.width // self.heads, **sizes)

    def fingerprint(self) -> str:
        """The fingerprint of the configuration, the corpus's sentences and the format version."""
        return fingerprint(FORMAT_VERSION, self, chats.fingerprint(self.corpus))


@dataclass(frozen=True, eq=False)
class Base:
    """A pre-trained model, its tokenizer, and the loss of each of its steps in nats a token of the answers."""

    config: BaseConfig
    model: Model
    tokenizer: WordTokenizer
    losses: Float[np.ndarray, " steps"]

    @property
    def seed(self) -> int:
        """Of its initialization and the order of its chats."""
        return self.config.seed

    @property
    def context(self) -> int:
        """The longest row it takes, in tokens."""
        return self.config.context


def token_loss(
    logits: Float[Array, "batch time vocabulary"], labels: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Cross-entropy of the next token at every position: the loss of pre-training and of teachers."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def text_of(encoded: Encoded | Prompts, last: int | None = None) -> Text:
    """Rows as a model takes them, with logits of the last `last` columns, or of all."""
    return Text(jnp.asarray(encoded.tokens), jnp.asarray(encoded.padding), last)


def lessons(encoded: Encoded, batch_size: int, last: int) -> Examples:
    """Training rows of a base or a teacher: the loss counts the tokens of answers, in the last `last` columns."""
    labels, positions = jnp.asarray(encoded.targets[:, -last:]), jnp.asarray(encoded.weights[:, -last:])
    return Examples(text_of(encoded, last), batch_size, labels=labels, positions=positions)


@functools.lru_cache(maxsize=1)
def _read(config: CorpusConfig) -> tuple[WordTokenizer, Encoded]:
    chats, tokenizer = make_corpus(config), WordTokenizer.of_corpus(config)
    _, lengths = tokenizer.lengths(chats)
    return tokenizer, tokenizer.encode_chats(chats, int(lengths.max()))


def untrained(config: BaseConfig, tokenizer: WordTokenizer) -> Model:
    """A base before its training."""
    rngs = nnx.Rngs(named(jax.random.key(config.seed), "init"))
    return from_nnx(Transformer(config.transformer(len(tokenizer)), rngs=rngs))


def pretrain(config: BaseConfig, report: Callable[[int], None] = lambda tokens: None) -> Base:
    """Train a base model from scratch; `report` gets the number of tokens after each step.

    Raises:
        InputError: a chat of the corpus exceeds the context, or the loss is not finite.
    """
    tokenizer, encoded = _read(config.corpus)
    tokens = encoded.tokens.shape[1] * config.batch_size
    schedule = optax.cosine_decay_schedule(config.rate, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def observe(step: Step) -> None:
        jax.debug.callback(lambda _: report(tokens), step.index)

    @jax.jit
    def run(model: Model, source: Examples) -> Any:
        key = named(jax.random.key(config.seed), "pretrain")
        return teach(model, token_loss, source, optimizer, config.steps, key=key, observe=observe)

    trained = run(untrained(config, tokenizer), lessons(encoded, config.batch_size, encoded.answer_columns))
    require_finite(trained.losses, [f"the base of seed {config.seed}"])
    return Base(config, trained.model, tokenizer, np.asarray(trained.losses))


def base_folder() -> Path:
    """The folder of bases: bases/ in the user's cache folder."""
    return platformdirs.user_cache_path("subliminal_theory") / "bases"


def load_base(
    config: BaseConfig, folder: Path | None = None, report: Callable[[int], None] = lambda tokens: None
) -> Base:
    """The base of a configuration, read from `folder`, or else pre-trained and saved there.

    A file is named after the fingerprint of its configuration, which is in its header too.

    Raises:
        InputError: the file is cut, damaged or of another configuration, or cannot be written; names it.
    """
    folder = base_folder() if folder is None else folder
    decided = config.fingerprint()
    path = folder / f"base-{decided[:20]}.safetensors"
    if path.exists():
        return _load(path, config, decided)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot keep base models in {folder}: {error.strerror}") from error
    base = pretrain(config, report)
    save_arrays(path, {**leaves_by_path(base.model.params), "losses": base.losses}, {"fingerprint": decided})
    return base


def _load(path: Path, config: BaseConfig, decided: str) -> Base:
    tokenizer = WordTokenizer.of_corpus(config.corpus)
    model = jax.eval_shape(lambda: untrained(config, tokenizer))
    shapes = leaves_by_path(model.params)
    losses = jax.ShapeDtypeStruct((config.steps,), np.float32)
    try:
        if open_arrays(path)[1].get("fingerprint") != decided:
            raise InputError("it is of another configuration")
        arrays, _ = load_arrays(path, {**shapes, "losses": losses})
    except InputError as error:
        raise InputError(f"cannot use the base model {path} ({error}): delete it, and it is made again") from error
    params = jax.tree.unflatten(jax.tree.structure(model.params), [jnp.asarray(arrays[name]) for name in shapes])
    return Base(config, model.with_params(params), tokenizer, arrays["losses"])
