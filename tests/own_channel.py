"""A channel of your own."""

from dataclasses import dataclass

import jax.numpy as jnp

from subliminal_theory.pytree import register_dataclass


@register_dataclass
@dataclass(frozen=True)
class LogCosh:
    """sum_i log cosh(z_i - y_i): squared error where logits are close, absolute error where they are far."""

    exact = True  # for each target, the loss is smallest where student and teacher are equal

    def targets(self, key, teacher_logits):
        """What is transmitted: one entry for each position."""
        return teacher_logits

    def loss(self, student_logits, targets):
        """One value for each position."""
        return jnp.sum(jnp.log(jnp.cosh(student_logits - targets)), axis=-1)

    def metric(self, logits, tangent):
        """M @ tangent. The second derivative of log cosh at 0 is 1."""
        return tangent

    def visible(self, n):
        """Which of n logits the loss uses."""
        return jnp.ones(n, bool)
