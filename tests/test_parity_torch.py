"""The same distillation in PyTorch, written independently: losses and weights agree step by step."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from subliminal_theory.channel import SoftLogits, SquaredError, Subset
from subliminal_theory.distill import distill
from subliminal_theory.model import from_nnx
from subliminal_theory.source import Examples
from subliminal_theory.vision.mlp import MLP

pytestmark = [pytest.mark.torch]
SIZES = (20, 16, 16, 13)
STEPS = 25


def torch_copy(torch, model):
    layers = []
    for index in range(len(SIZES) - 1):
        layer = torch.nn.Linear(SIZES[index], SIZES[index + 1])
        ours = model.params["layers"][index]
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.asarray(ours["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.asarray(ours["bias"])))
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("channel_loss", ["kl", "mse"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])
def test_distillation_agrees_with_pytorch(channel_loss, optimizer):
    torch = pytest.importorskip("torch")
    student, teacher = (from_nnx(MLP(SIZES, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    inputs = np.random.default_rng(0).uniform(-1, 1, (32, SIZES[0])).astype(np.float32)
    visible = (10, 11, 12)

    ours = {"adam": optax.adam(3e-3), "sgd": optax.sgd(0.05), "momentum": optax.sgd(0.02, momentum=0.9)}
    channel = Subset(visible, SoftLogits() if channel_loss == "kl" else SquaredError())
    # One batch holds all examples, so their order within it does not matter.
    trained = distill(
        student, teacher, channel, Examples(inputs, 32), ours[optimizer], STEPS, key=jax.random.key(0)
    )

    peer, target = torch_copy(torch, student), torch_copy(torch, teacher)
    theirs = {
        "adam": lambda p: torch.optim.Adam(p, 3e-3),
        "sgd": lambda p: torch.optim.SGD(p, 0.05),
        "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    }[optimizer](peer.parameters())
    x, losses = torch.tensor(inputs), []
    with torch.no_grad():
        goal = target(x)[:, list(visible)]
    for _ in range(STEPS):
        seen = peer(x)[:, list(visible)]
        if channel_loss == "kl":
            loss = torch.nn.functional.kl_div(
                seen.log_softmax(-1), goal.log_softmax(-1), reduction="batchmean", log_target=True
            )
        else:
            loss = (seen - goal).square().sum(-1).mean()
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        losses.append(loss.item())
    np.testing.assert_allclose(np.asarray(trained.losses), losses, rtol=1e-4, atol=1e-7)
    for index in range(len(SIZES) - 1):
        kernel = peer[2 * index].weight.detach().numpy().T
        np.testing.assert_allclose(
            np.asarray(trained.model.params["layers"][index]["kernel"]), kernel, rtol=1e-3, atol=1e-5
        )
