"""The plain way to answer questions: whole rows for every prompt and every spelling of every word."""

import jax
import jax.numpy as jnp
import numpy as np

from subliminal_theory.language.measure import Questions
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model

run = jax.jit(lambda model, text: model(text))


def spellings_of(model: Model, text: Text, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits at the end of prompts, and the log-probability of spellings [prompts, words, spellings]."""
    prompts, _, _, length = words.shape
    logits = np.asarray(run(model, text), np.float64)[:, -1]
    total = np.logaddexp.reduce(logits, axis=-1)
    found = np.full(words.shape[:-1], -np.inf)
    for place in np.ndindex(words.shape[1:3]):
        tokens = words[(slice(None), *place)]
        begun = np.concatenate([np.asarray(text.tokens), np.maximum(tokens[:, :-1], 0)], axis=1)
        steps = jax.nn.log_softmax(run(model, Text(jnp.asarray(begun), text.padding)))[:, -length:]
        for prompt in range(prompts):
            if tokens[prompt, 0] >= 0:
                own = logits[prompt, tokens[prompt, 0]] - total[prompt]
                behind = [step[t] for step, t in zip(steps[prompt, 1:], tokens[prompt, 1:], strict=True) if t >= 0]
                found[(prompt, *place)] = own + np.sum(behind)
    return logits, found


def plain(model: Model, text: Text, words: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of `Answers` for the questions of one trait."""
    _, found = spellings_of(model, text, words)
    with np.errstate(divide="ignore"):
        p = np.exp(found).sum(axis=-1)
    own = p[np.arange(len(p)), targets]
    total = p.sum(axis=-1)
    return {
        "probability": own.mean(),
        "share": (own / total).mean(),
        "log_odds": np.log(own / (total - own)).mean(),
        "rivals": (p / total[:, None]).mean(axis=0),
    }


def plain_of(model: Model, asked: Questions) -> dict[str, np.ndarray]:
    """The same, for questions as they are measured."""
    rows = np.asarray(asked.prompts)
    text = jax.tree.map(lambda leaf: leaf[rows], asked.text)
    return plain(model, text, np.asarray(asked.words.tokens)[rows], np.asarray(asked.targets))
