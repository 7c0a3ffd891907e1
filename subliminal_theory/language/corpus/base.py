"""Compact base models, pre-trained on the corpus. Teachers and students of one seed start from the same base."""

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

FORMAT_VERSION = (
    4  # raise it when a change to the code makes equal configurations give different parameters or names
)


@dataclass(frozen=True)
class BaseConfig:
    """Everything that determines a base model.

    Training uses Adam. The learning rate falls to 0 along a cosine, and gradients are clipped to norm 1.

    Attributes:
        seed: the seed of the initialization and of the order of the chats. Bases of all seeds read the same
            corpus, unless their corpora have slots: then each should have its own `Slot.laws`.
        corpus: the corpus to train on.
        layers, width, heads, kv_heads, mlp_width, tied, context: as in `TransformerConfig`.
        steps: the number of training steps.
        batch_size: the number of chats in a step.
        rate: the first learning rate.

    Raises:
        InputError: a size is below 1, the width is not a multiple of the heads, or the rate is not positive and
            finite.
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
        """The configuration of the model for a vocabulary of this size."""
        names = ("layers", "width", "heads", "kv_heads", "mlp_width", "tied", "context")
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        return TransformerConfig(vocabulary=vocabulary, head_width=self.width // self.heads, **sizes)

    def fingerprint(self) -> str:
        """The fingerprint of the configuration, the corpus's sentences and the format version."""
        return fingerprint(FORMAT_VERSION, self, chats.fingerprint(self.corpus))


@dataclass(frozen=True, eq=False)
class Base:
    """A pre-trained model, its tokenizer, and its training losses in nats per token of the answers."""

    config: BaseConfig
    model: Model
    tokenizer: WordTokenizer
    losses: Float[np.ndarray, " steps"]

    @property
    def seed(self) -> int:
        """The seed of its initialization and of the order of its chats."""
        return self.config.seed

    @property
    def context(self) -> int:
        """The longest row that the model takes, in tokens."""
        return self.config.context


def token_loss(
    logits: Float[Array, "batch time vocabulary"], labels: Int[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """Cross-entropy of the next token at every position, in nats. It trains bases and teachers."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def text_of(encoded: Encoded | Prompts, last: int | None = None) -> Text:
    """Rows as input for a model that computes logits for the last `last` columns, or for all columns if None."""
    return Text(jnp.asarray(encoded.tokens), jnp.asarray(encoded.padding), last)


def lessons(encoded: Encoded, batch_size: int, last: int) -> Examples:
    """Training rows for a base or a teacher. The loss counts the answer tokens, all in the last `last` columns."""
    labels, positions = jnp.asarray(encoded.targets[:, -last:]), jnp.asarray(encoded.weights[:, -last:])
    return Examples(text_of(encoded, last), batch_size, labels=labels, positions=positions)


@functools.lru_cache(maxsize=1)
def _read(config: CorpusConfig) -> tuple[WordTokenizer, Encoded]:
    chats, tokenizer = make_corpus(config), WordTokenizer.of_corpus(config)
    _, lengths = tokenizer.lengths(chats)
    return tokenizer, tokenizer.encode_chats(chats, int(lengths.max()))


def untrained(config: BaseConfig, tokenizer: WordTokenizer) -> Model:
    """A base before training."""
    rngs = nnx.Rngs(named(jax.random.key(config.seed), "init"))
    return from_nnx(Transformer(config.transformer(len(tokenizer)), rngs=rngs))


def pretrain(config: BaseConfig, report: Callable[[int], None] = lambda tokens: None) -> Base:
    """Train a base model from scratch. `report` is called after each step with the tokens of that step.

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
    """The default folder for bases: bases/ in the user's cache folder."""
    return platformdirs.user_cache_path("subliminal_theory") / "bases"


def load_base(
    config: BaseConfig, folder: Path | None = None, report: Callable[[int], None] = lambda tokens: None
) -> Base:
    """Load the base of a configuration from `folder`, or pre-train it and save it there.

    The file name contains the fingerprint of the configuration. The file's header has it too.

    Raises:
        InputError: the file is truncated, damaged or from another configuration, or cannot be written; names the
            file.
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
        raise InputError(
            f"cannot use the base model {path} ({error}): delete it, and it will be made again"
        ) from error
    params = jax.tree.unflatten(jax.tree.structure(model.params), [jnp.asarray(arrays[name]) for name in shapes])
    return Base(config, model.with_params(params), tokenizer, arrays["losses"])
