"""The peer of `checkpoint_speed.py`: `transformers` trains, prefills, samples and scores with the same file."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from subliminal_theory.errors import InputError


class Peer:
    """The model in a folder or a GGUF file, in float32. Each method makes a function to time.

    All functions wait for the device. On a GPU, models are in bfloat16, or train in float32 under autocast.

    Raises:
        InputError: a GPU is requested, but this PyTorch has none.
    """

    def __init__(self, path: Path, device: str, threads: int) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("JAX has a GPU and PyTorch has none: set JAX_PLATFORMS=cpu to compare on the CPU")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        given = {"gguf_file": path.name} if path.is_file() else {}
        folder = path.parent if given else path
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
        self.device, self.model = device, model.to(device).eval()

    def training(self, tokens: np.ndarray, steps: int, rank: int, remat: bool) -> Callable[[], np.ndarray]:
        """Next-token training at every position with Adam. Returns the first loss."""
        model = copy.deepcopy(self.model) if not rank else self._inference()
        if remat:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if rank:
            model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-5, fused=True)
        rows, targets = self._put(tokens[:, :-1]), self._put(tokens[:, 1:])

        def loss() -> torch.Tensor:
            logits = model(input_ids=rows, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

        loss_of = torch.compile(loss, dynamic=False) if self.device == "cuda" else loss

        def run() -> np.ndarray:
            losses = []
            for _ in range(steps):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                    value = loss_of()
                value.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(value.detach())
            self._wait()
            return losses[0].cpu().numpy()

        return run

    def prefill(self, tokens: np.ndarray) -> Callable[[], np.ndarray]:
        """Compute the logits of the last column, and a cache."""
        model, rows = self._inference(), self._put(tokens)

        @torch.no_grad()
        def run() -> np.ndarray:
            logits = model(input_ids=rows, use_cache=True, logits_to_keep=1).logits
            return logits.float().cpu().numpy()

        return run

    def sampling(self, tokens: np.ndarray, new: int) -> Callable[[], None]:
        """Sample `new` tokens for each row, at temperature 1."""
        model, rows = self._inference(), self._put(tokens)

        @torch.no_grad()
        def run() -> None:
            model.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, min_new_tokens=new, max_new_tokens=new, use_cache=True, pad_token_id=0, eos_token_id=1,
            )  # fmt: skip
            self._wait()

        return run

    def scoring(
        self, tokens: np.ndarray, padding: np.ndarray, words: list[list[list[int]]]
    ) -> Callable[[], np.ndarray]:
        """Each word's share among all words as the beginning of answers, averaged over prompts.

        Each spelling takes one pass over all prompts followed by its tokens. Logits are computed only where these
        tokens are predicted.
        """
        model, prompts = self._inference(), self._put(tokens)
        mask = self._put(np.arange(tokens.shape[1]) >= padding[:, None])

        def spelt(spelling: list[int]) -> torch.Tensor:
            behind = torch.tensor(spelling, device=self.device).expand(len(prompts), -1)
            seen = torch.cat([mask, torch.ones_like(behind)], 1)[:, :-1]
            logits = model(
                input_ids=torch.cat([prompts, behind], 1)[:, :-1], attention_mask=seen,
                position_ids=(seen.cumsum(1) - 1).clamp(min=0), use_cache=False, logits_to_keep=len(spelling),
            ).logits  # fmt: skip
            return logits.float().log_softmax(-1).gather(-1, behind[..., None]).sum((1, 2))

        @torch.no_grad()
        def run() -> np.ndarray:
            found = [torch.stack([spelt(own) for own in word]).logsumexp(0) for word in words]
            return torch.stack(found, 1).softmax(1).mean(0).cpu().numpy()

        return run

    def _inference(self) -> Any:
        """A copy of the model in the dtype for inference."""
        return copy.deepcopy(self.model).to(torch.bfloat16 if self.device == "cuda" else torch.float32)

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array.astype(np.int64), device=self.device)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
