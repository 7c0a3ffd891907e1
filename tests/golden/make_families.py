"""Writes families.json: config.json, tensor shapes and logits of each tiny model in tests/language/families.py.

The logits are those of `transformers` at the weights of `weights`, in files as it saves them.

    python -m tests.golden.make_families
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.language.families import TINY

FILE = Path(__file__).with_name("families.json")
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
PADDING = np.array([0, 5])


def weights(name: str, shape: list[int]) -> np.ndarray:
    """Numbers that depend on the tensor's name and shape alone; none is 0, and no scale is 1."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    draw = np.random.default_rng(seed).normal(size=shape)
    return (0.2 * draw + (len(shape) == 1)).astype(np.float32)


def main() -> None:
    """All models, one after the other."""
    import torch
    import transformers

    found = {}
    for name, (stem, settings) in TINY.items():
        config = getattr(transformers, stem + ("TextConfig" if stem == "Gemma3" else "Config"))(**settings)
        auto = transformers.AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            auto.from_config(config).save_pretrained(folder)
            file = Path(folder) / "model.safetensors"
            shapes = {key: list(tensor.shape) for key, tensor in load_file(file).items()}
            save_file({key: weights(key, shape) for key, shape in shapes.items()}, file, {"format": "pt"})
            model = auto.from_pretrained(folder).eval()
            kept = json.loads((Path(folder) / "config.json").read_text())
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(TOKENS),
                attention_mask=torch.tensor((np.arange(12) >= PADDING[:, None]).astype(int)),
                position_ids=torch.tensor(np.maximum(np.arange(12) - PADDING[:, None], 0)),
            ).logits[:, -1]
        found[name] = {
            "config": kept,
            "shapes": shapes,
            "logits": [[round(value, 6) for value in row] for row in logits.tolist()],
        }
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
