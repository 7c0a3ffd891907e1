"""The counter of the benchmark on a small network, and its errors against matrices that are built."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import theorem_cost
from benchmarks.theorem_cost import PRODUCTS, Counted, largest
from subliminal_theory.channel import SoftLogits
from subliminal_theory.theorem import check, sharpness, step_tokens

PARAMS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(7, 4)), jnp.float32)


def network(params, inputs):
    return jnp.tanh(inputs @ params)


def trait(net):
    return lambda params: jnp.mean(net(params, INPUTS) ** 2)


@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (lambda net: lambda p: net(p, INPUTS), (1, 0, 0)),
        (lambda net: lambda p: jax.jvp(lambda q: net(q, INPUTS), (p,), (p,)), (1, 1, 0)),
        (lambda net: jax.grad(trait(net)), (1, 0, 1)),
        (lambda net: lambda p: step_tokens(net, p, p, INPUTS, teacher_step=0.1), (2, 1, 0)),
        (
            lambda net: lambda p: sharpness(net, p, INPUTS, SoftLogits(), products=PRODUCTS),
            (1, PRODUCTS, PRODUCTS),
        ),
        (
            lambda net: (
                lambda p: check(net, p, trait(net), INPUTS, SoftLogits(), teacher_step=0.1, student_step=0.1)
            ),
            (5, 2, 2),
        ),
    ],
    ids=["pass", "jvp", "gradient", "step_tokens", "sharpness", "check"],
)
def test_counts(function, counts):
    counted = Counted(network)
    found, costs = counted.measured(function(counted), PARAMS)
    assert (costs["passes"], costs["products"], costs["transposes"]) == counts
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(function(network)(PARAMS)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_largest_eigenvalue(x64):
    params, inputs = PARAMS.astype(float), INPUTS.astype(float)
    jacobian = np.asarray(jax.jacobian(lambda p: network(p, inputs))(params)).reshape(7, 5, 20)
    shares = np.asarray(jax.nn.softmax(network(params, inputs)))
    metrics = np.stack([np.diag(s) - np.outer(s, s) for s in shares])
    matrix = np.einsum("bim,bij,bjn->mn", jacobian, metrics, jacobian) / 7
    assert largest(network, params, inputs) == pytest.approx(np.linalg.eigvalsh(matrix)[-1])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--rows", "0"], "--rows must be at least 1, got 0"), (["--checkpoint", "nowhere"], "nowhere")],
)
def test_refused(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["theorem_cost", "--only", "gradient", *arguments])
    with pytest.raises(SystemExit) as ended:
        theorem_cost.main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert told in errors
