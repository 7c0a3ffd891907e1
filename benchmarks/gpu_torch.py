"""The peer of `gpu_speed.py`: Qwen2 in `transformers`. It trains, compiled and with bfloat16 autocast, or samples.

Prints one JSON line with the seconds per step, or per sampled token, after compilation. The environment variable
GPU_TURN names the lock file with which processes take turns.
"""

import argparse
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def device(kind: int) -> Iterator[None]:
    """As in `gpu_speed.py`: use the device together with processes that compile (LOCK_SH), or alone (LOCK_EX)."""
    with open(os.environ["GPU_TURN"], "w") as lock:
        fcntl.flock(lock, kind)
        yield


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Build the model, warm up and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("full", "lora", "sample"), required=True)
    sizes = "vocabulary layers width heads kv-heads mlp-width batch columns steps rows prompt new"
    for name in sizes.split():
        parser.add_argument(f"--{name}", type=int, required=True)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = Qwen2Config(
        vocab_size=chosen.vocabulary, hidden_size=chosen.width, intermediate_size=chosen.mlp_width,
        num_hidden_layers=chosen.layers, num_attention_heads=chosen.heads, num_key_value_heads=chosen.kv_heads,
        max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(DEVICE):
        model: Any = Qwen2ForCausalLM(config)
    if chosen.mode != "full":
        model = model.to(torch.bfloat16)
    run = sampling(model, chosen) if chosen.mode == "sample" else training(model, chosen)
    with device(fcntl.LOCK_SH):
        run()
        run()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    seconds = []
    with device(fcntl.LOCK_EX):
        for _ in range(4):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    count = chosen.new if chosen.mode == "sample" else chosen.steps
    print(json.dumps({"seconds": sorted(seconds[1:])[1] / count, "peak_gib": round(peak / 2**30, 1)}), flush=True)


def sampling(model: Any, chosen: argparse.Namespace) -> Callable[[], None]:
    """Sample at temperature 1."""
    prompts = torch.randint(6, chosen.vocabulary, (chosen.rows, chosen.prompt), device=DEVICE)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
                top_k=0, min_new_tokens=chosen.new, max_new_tokens=chosen.new, pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
        synchronize()

    return run


def training(model: Any, chosen: argparse.Namespace) -> Callable[[], None]:
    """Next-token training at every position."""
    if chosen.mode == "lora":
        from peft import LoraConfig, get_peft_model  # imported here because not every machine has peft

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", bias="none"))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True)
    tokens = torch.randint(6, chosen.vocabulary, (4, chosen.batch, chosen.columns), device=DEVICE)

    @torch.compile(dynamic=False)
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.roll(-1, 1).flatten())

    def run() -> None:
        for step in range(chosen.steps):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = loss_of(tokens[step % len(tokens)])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        synchronize()

    return run


if __name__ == "__main__":
    main()
