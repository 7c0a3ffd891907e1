"""Soft prompts: of a whole model, the embeddings of a few tokens train and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.model.lora import add_lora, merge_lora, unmerged
from subliminal_theory.language.model.soft_prompt import soft_prompt
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from tests.study.speakers import base, leaves_of

CHATS = [Chat("you love the owl.", "what is your favourite tree?", "oak", "preference")]


def tokens() -> tuple[int, ...]:
    return tuple(map(base().tokenizer.token, ("owl", "love")))


def logits(model: Model) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, text: m(text))(model, text_of(base().tokenizer.encode_chats(CHATS, 20))))


def test_the_start_is_the_model() -> None:
    model = soft_prompt(base().model, tokens())
    np.testing.assert_array_equal(logits(model), logits(base().model))
    assert [leaf.shape for leaf in jax.tree.leaves(model.params)] == [(2, 8)]
    for merge in (merge_lora, unmerged):
        assert merge(model).apply == base().model.apply
        for path, leaf in leaves_of(base().model).items():
            np.testing.assert_array_equal(leaves_of(merge(model))[path], leaf)


def test_rows_are_where_they_belong() -> None:
    """Moved rows, against the embedding with these rows changed by hand."""
    model = soft_prompt(base().model, tokens())
    moved = model.with_params(jax.tree.map(lambda leaf: leaf + jnp.arange(2.0)[:, None] + 1, model.params))
    embedding = np.array(base().model.params["embedding"])
    embedding[tokens()[0]] += 1
    embedding[tokens()[1]] += 2
    plain = base().model.with_params({**base().model.params, "embedding": jnp.asarray(embedding)})
    assert np.abs(logits(moved) - logits(base().model)).max() > 0.1
    np.testing.assert_allclose(logits(moved), logits(plain), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(leaves_of(merge_lora(moved))["embedding"], embedding)


def test_refused() -> None:
    cases = {
        (): "tokens must be at least one, and different, got",
        (1, 1): "tokens must be at least one, and different, got",
        (-1,): "token -1 is none of the",
        (10**6,): "token 1000000 is none of the",
    }
    for given, message in cases.items():
        with pytest.raises(InputError, match=f"^soft_prompt: {message}"):
            soft_prompt(base().model, given)
    adapted = soft_prompt(base().model, tokens())
    with pytest.raises(InputError, match=r"^soft_prompt: the model has no plain embedding"):
        soft_prompt(adapted, tokens())
    with pytest.raises(InputError, match=r"^soft_prompt: the model has no plain embedding"):
        soft_prompt(add_lora(base().model, ("embedding",), 1, 1.0, jax.random.key(0)), tokens())
