"""Every family against `transformers`: logits, greedy text, and checkpoints in both directions."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.language.hub.checkpoint import load_checkpoint, save_checkpoint
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text
from tests.language.families import TINY
from tests.language.peers import config_of, logits_of, peer_of

pytestmark = pytest.mark.torch
PADDING = np.array([0, 3, 7])
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 12))
REAL = np.arange(12) >= PADDING[:, None]
run = jax.jit(lambda model, text: model(text))


def peer_in(name: str, folder: Path) -> Any:
    """A random model of the family in a folder."""
    peer = peer_of(config_of(*TINY[name]))
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize("name", TINY)
def test_logits_and_round_trip(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = peer_in(name, tmp_path / "theirs")
    theirs = logits_of(peer, TOKENS, PADDING)
    checkpoint = load_checkpoint(tmp_path / "theirs")
    text = Text(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(PADDING, jnp.int32))
    ours = np.asarray(run(checkpoint.model, text))
    assert np.ptp(theirs[REAL]) > 0.5
    np.testing.assert_allclose(ours[REAL], theirs[REAL], rtol=1e-5, atol=1e-5 * np.abs(theirs[REAL]).max())

    save_checkpoint(tmp_path / "ours", checkpoint, checkpoint.model)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits_of(back, TOKENS, PADDING), theirs)
    again = load_checkpoint(tmp_path / "ours")
    for first, second in zip(*map(jax.tree.leaves, (checkpoint.model, again.model)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", TINY)
def test_greedy_text(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peer = peer_in(name, tmp_path)
    model = load_checkpoint(tmp_path).model
    with torch.no_grad():
        theirs = peer.generate(
            input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(REAL.astype(int)), do_sample=False,
            max_new_tokens=8, min_new_tokens=8, pad_token_id=0, eos_token_id=None,
        )[:, 12:].numpy()  # fmt: skip
    text = Text(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(PADDING, jnp.int32))
    ours, _ = sample(model, text, steps=8, key=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(ours, theirs)
