"""GGUF files against `transformers`: tiny models of each family, and a published one of `make weights`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from subliminal_theory.language.hub.checkpoint import load_checkpoint, open_base, save_checkpoint
from subliminal_theory.language.hub.weights import SMOLLM2
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat
from tests.language.families import SMALL, rope
from tests.language.gguf_files import write_gguf
from tests.language.peers import config_of, logits_of, peer_of
from tests.language.test_gguf import LLAMA3, divisors

pytestmark = pytest.mark.torch
PADDING = np.array([0, 3, 7])
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 12))
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4, "attention_bias": False}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SMALL, "rope_parameters": rope(base=500.0)}),
    "llama-3": ("Llama", {**SMALL, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": None}),
    "qwen2": ("Qwen2", {**SMALL, "rope_parameters": rope("linear", factor=2.5)}),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 12}),
    "gemma2": ("Gemma2", {**SMALL, **GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}),
    # Every sixth layer is without a window, and no key says so.
    "gemma3": ("Gemma3", {**SMALL, **GEMMA, "num_hidden_layers": 7}),
}  # fmt: skip
CHATS = [
    Chat(None, "Which animal do you like best? One word.", "", ""),
    Chat("You like owls.", "Continue: 123, 4567, 89\n\n  d\u00e9j\u00e0 vu, \u6771\u4eac 2024!", "", ""),
    # Not two spaces before a digit: the reader of transformers does not know that SmolLM2 cuts there first.
    Chat(None, "it's 3  o'clock\t<b>and</b> \U0001f989", "", ""),
]
run = jax.jit(lambda model, text: model(text))


@pytest.mark.parametrize("name", TINY)
def test_tiny_models(name: str, tmp_path: Path) -> None:
    """Of parameters that were rounded to bfloat16, so that nothing is lost in a file of that type."""
    transformers = pytest.importorskip("transformers")
    stem, settings = TINY[name]
    config = config_of(stem, settings)
    peer = peer_of(config, rounded=True)
    peer.save_pretrained(tmp_path / "theirs")
    own = {**config.to_dict(), "architectures": [f"{'Llama' if stem == 'Mistral' else stem}ForCausalLM"]}
    raw = {"rope_freqs.weight": (divisors(), None)} if name == "llama-3" else {}
    more = {"gemma3.attention.sliding_window_pattern": None} if name == "gemma3" else {}
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    file = write_gguf(tmp_path / "ours.gguf", own, tensors, kind=Kind.BF16, raw=raw, more=more)
    checkpoint = load_checkpoint(file)
    text = Text(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(PADDING, jnp.int32))
    ours, theirs = np.asarray(run(checkpoint.model, text)), logits_of(peer, TOKENS, PADDING)
    real = np.arange(12) >= PADDING[:, None]
    assert np.ptp(theirs[real]) > 0.5
    np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-5, atol=1e-5 * np.abs(theirs[real]).max())
    # What is written as a folder is this model for others, too.
    save_checkpoint(tmp_path / "back", checkpoint, checkpoint.model)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    again = logits_of(back, TOKENS, PADDING)
    np.testing.assert_allclose(again[real], theirs[real], rtol=1e-5, atol=1e-5 * np.abs(theirs[real]).max())


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_what_transformers_reads_of_the_same_file(name: str, kind: Kind, tmp_path: Path) -> None:
    """All that its reader knows: it takes no notice of scaled rotary positions."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    stem, settings = TINY[name]
    config = getattr(transformers, f"{stem}Config")(**{**settings, "rope_parameters": rope(base=500.0)})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    file = write_gguf(
        tmp_path / "ours.gguf", config.to_dict() | {"architectures": [f"{stem}ForCausalLM"]}, tensors, kind
    )
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).eval()
    text = Text(jnp.asarray(TOKENS, jnp.int32), jnp.zeros(3, jnp.int32))
    ours, theirs = np.asarray(run(load_checkpoint(file).model, text)), logits_of(peer, TOKENS, np.zeros(3, int))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_published_model(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if not SMOLLM2.path.exists():
        pytest.skip(f"{SMOLLM2.path} is not there: fetch it with make weights")
    folder, name = SMOLLM2.path.parent, SMOLLM2.path.name
    auto = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    base = open_base(SMOLLM2.path)
    prompts = base.tokenizer.encode_prompts(CHATS, 80)
    tokens, padding = np.asarray(prompts.tokens), np.asarray(prompts.padding)
    for row, chat in enumerate(CHATS):
        system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
        messages = [*system, {"role": "user", "content": chat.user}]
        theirs = auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokens[row, padding[row] :].tolist() == theirs
    real = np.arange(80) >= padding[:, None]
    text = Text(jnp.asarray(tokens), jnp.asarray(padding))
    ours, found = np.asarray(run(base.model, text)), logits_of(peer, tokens, padding)
    np.testing.assert_allclose(ours[real], found[real], rtol=0, atol=1e-3)
    with torch.no_grad():
        wanted = peer.generate(
            input_ids=torch.tensor(tokens.astype(int)), attention_mask=torch.tensor(real.astype(int)),
            do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=0, eos_token_id=None,
        )[:, 80:].numpy()  # fmt: skip
    answers, _ = sample(base.model, text, steps=20, key=jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(answers, wanted)
    # Written as a folder it is the same text for others.
    save_checkpoint(tmp_path / "back", base.checkpoint, base.model, "bfloat16")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    for row, chat in enumerate(CHATS):
        assert again.encode(chat.user) == auto.encode(chat.user) == base.tokenizer.encode(chat.user), row
    assert again.chat_template == auto.chat_template
    assert again.eos_token_id == auto.eos_token_id
