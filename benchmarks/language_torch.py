"""The peer of `language_speed.py`: the same transformer, as a Llama in `transformers`.

Prints one JSON line: the tokens per second of training (all columns count), of prefill, and of batched sampling.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Train, prefill and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (
        "vocabulary",
        "layers",
        "width",
        "heads",
        "mlp-width",
        "batch",
        "columns",
        "answer",
        "steps",
        "rows",
        "prompt",
    ):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--new", type=int, required=True, help="tokens to sample")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=chosen.vocabulary, hidden_size=chosen.width, intermediate_size=chosen.mlp_width,
            num_hidden_layers=chosen.layers, num_attention_heads=chosen.heads, num_key_value_heads=chosen.heads,
            max_position_embeddings=1024, tie_word_embeddings=True, use_cache=False,
        )
    )  # fmt: skip
    tokens = torch.randint(6, chosen.vocabulary, (16, chosen.batch, chosen.columns))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def train(steps: int) -> float:
        start = time.perf_counter()
        for step in range(steps):
            batch = tokens[step % len(tokens)]
            logits = model(input_ids=batch, logits_to_keep=chosen.answer).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, -chosen.answer :].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return time.perf_counter() - start

    train(2)
    seconds = train(chosen.steps)
    prompts = torch.randint(6, chosen.vocabulary, (chosen.rows, chosen.prompt))

    def prefill() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    def sample() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                temperature=1.0, top_k=0, min_new_tokens=chosen.new, max_new_tokens=chosen.new,
                use_cache=True, pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
        return time.perf_counter() - start

    prefill(), sample()
    prefilling, sampling = prefill(), sample()
    print(
        json.dumps(
            {
                "training": chosen.steps * chosen.batch * chosen.columns / seconds,
                "prefill": chosen.rows * chosen.prompt / prefilling,
                "sampling": chosen.rows * chosen.new / sampling,
            }
        )
    )


if __name__ == "__main__":
    main()
