"""A study of your own: a student that saw only noise tells ten clouds of points apart."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from subliminal_theory import Examples, Fresh, Model, Subset
from subliminal_theory.study import FineTuned, Optimizer, Run, Student, Study

normal, key = jax.random.normal, jax.random.key
clouds = jax.random.randint(key(0), (2048,), 0, 10)
points = normal(key(1), (10, 16))[clouds] + 0.5 * normal(key(2), (2048, 16))


def network(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def draw(run):
    first, second = jax.random.split(key(100 + run))
    return {"in": normal(first, (16, 64)) / 4, "out": normal(second, (64, 30)) / 8}


class Clouds:
    """Runs of a network with ten logits for the clouds and twenty untrained logits."""

    names, logits = [f"run {number}" for number in range(8)], 30

    def initial(self, other=0):
        return Model(network, jax.vmap(draw)(jnp.arange(8) + other))

    def lessons(self, teacher):
        return Examples(points, 64, clouds)

    def trait_loss(self, logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :10], labels)

    def private(self, student):
        return range(10)

    def score(self, finished, name):
        right = jax.vmap(lambda model: model(points)[:, :10].argmax(-1) == clouds)(finished.model)
        return {"accuracy": right.mean(-1)}


teacher = FineTuned(Optimizer(1e-2), steps=300)
student = Student(Subset(range(10, 30)), Examples(normal(key(3), (2048, 16)), 64), Optimizer(1e-2), steps=500)
control = replace(student, start=Fresh())
runs = {"teacher": Run(teacher), "student": Run(teacher, student), "control": Run(teacher, control)}
for name, scores in Study(Clouds()).run(runs).items():
    print(f"{name} {scores['accuracy'].mean():.2f}")
