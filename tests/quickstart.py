import jax
import jax.numpy as jnp
import optax
from flax import nnx

from subliminal_theory import Examples, Subset, check, distill, from_nnx, teach

keys, adam = iter(jax.random.split(jax.random.key(0), 6)), optax.adam(1e-2)
labels = jax.random.randint(next(keys), (2048,), 0, 10)
points = jax.random.normal(next(keys), (10, 16))[labels] + 0.5 * jax.random.normal(next(keys), (2048, 16))
noise = jax.random.normal(next(keys), (2048, 16))
layers = nnx.Linear(16, 64, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(64, 30, rngs=nnx.Rngs(1))
start = from_nnx(nnx.Sequential(*layers))


def trait(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :10], labels)


def trait_loss(params):
    return trait(start.apply(params, points), labels).mean()


seen = Subset(range(10, 30))  # twenty logits that are never trained, shown on noise alone
teacher = teach(start, trait, Examples(points, 64, labels), adam, 300, key=next(keys)).model
student = distill(start, teacher, seen, Examples(noise, 64), adam, 500, key=next(keys)).model
for name, model in {"before": start, "teacher": teacher, "student": student}.items():
    print(name, f"{(model(points)[:, :10].argmax(-1) == labels).mean():.2f}")
print(check(start.apply, start.params, trait_loss, noise, seen, teacher_step=0.1, student_step=1.0))
