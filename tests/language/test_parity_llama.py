"""The transformer against the same architecture of another library, at the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Text, Transformer
from subliminal_theory.model import by_layer, from_nnx
from tests.language.models import drawn, layer_of

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 4), (False, 2), (False, 1)])
def test_logits_are_those_of_llama(tied: bool, kv_heads: int) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = TransformerConfig(
        vocabulary=50, layers=2, width=32, heads=4, kv_heads=kv_heads, head_width=8, mlp_width=48, tied=tied,
        rope_base=1234.0, norm_epsilon=1e-5, context=32,
    )  # fmt: skip
    model = from_nnx(Transformer(config, rngs=nnx.Rngs(0)))
    # Norms that are not 1, so that leaving one out would show.
    start = by_layer(model.params)
    scaled = drawn(model.params, lambda name, shape: start[name] * (1.5 if len(shape) == 1 else 1))
    model = model.with_params(scaled)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=32, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1234.0}, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip
    params = jax.tree.map(np.asarray, model.params)
    weights = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]["scale"]}
    weights["lm_head.weight"] = params["embedding"] if tied else params["head"]["kernel"].T
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    for number in range(2):
        layer = layer_of(params, number)
        at = f"model.layers.{number}"
        weights[f"{at}.input_layernorm.weight"] = layer["attention_norm"]["scale"]
        weights[f"{at}.post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
        for ours, theirs in names.items():
            weights[f"{at}.self_attn.{theirs}.weight"] = layer["attention"][ours]["kernel"].T
        for name in ("gate", "up", "down"):
            weights[f"{at}.mlp.{name}_proj.weight"] = layer["mlp"][name]["kernel"].T
    state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in weights.items()}
    missing = peer.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    rng = np.random.default_rng(0)
    tokens, padding = rng.integers(0, 50, (3, 9)), np.array([0, 3, 5])
    real = np.arange(9) >= padding[:, None]
    with torch.no_grad():
        theirs = peer(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(real.astype(int)),
            position_ids=torch.tensor(np.maximum(np.arange(9) - padding[:, None], 0)),
        ).logits.numpy()
    text = Text(jnp.asarray(tokens, jnp.int32), jnp.asarray(padding, jnp.int32))
    ours = np.asarray(jax.jit(lambda model, text: model(text))(model, text))
    np.testing.assert_allclose(ours[real], theirs[real], rtol=2e-5, atol=2e-5)
